"""A config as a graph of stages.

    pretrain (multi-head) ---------------------> finetune -> evaluate     a task each
        `-> convert -> uptrain ----------------> finetune -> evaluate     a task each
    pretrain (grouped, for convert.method=none) -> uptrain -> finetune -> evaluate   a task each
    benchmark (both networks in turn; needs no checkpoint unless its KV heads differ by layer)

Without uptraining the converted network is fine-tuned. Uptraining also reads the multi-head parent,
unless it goes on with a network that was trained from scratch.

A stage's key is a hash of its settings and its parents' keys, so a stage that several configs have
in common is one stage, done once. This module alone turns config keys into settings; it must put
into them whatever determines a result, and nothing else. What a stage is, is in `stage.py`.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.graph.stage import Stage
from experiments.stages import initial_checkpoint, text
from experiments.stages.network import network_config
from experiments.stages.settings import (
    BenchmarkSettings,
    CheckpointOptions,
    ConvertSettings,
    EvaluateSettings,
    FinetuneSettings,
    PretrainOptions,
    PretrainSettings,
    Recipe,
    Setup,
    TimedNetwork,
    TrackingOptions,
    TrainOptions,
    UptrainSettings,
)
from experiments.stages.variant import NOT_CONVERTED, Variant
from gqa import conversion
from gqa.model.config import Config
from gqa.runtime.mesh import Layout

# The decoder's attentions that each value of convert.where converts; the others stay multi-head.
WHERE = {
    "self_attention": ("self_attention",),
    "cross_attention": ("cross_attention",),
    "both": ("self_attention", "cross_attention"),
}
# The keys of a config's section pretrain or finetune that a recipe takes as they are.
RECIPE_KEYS = (
    *("steps", "batch_size", "num_microbatches", "inputs_length", "targets_length"),
    *("dropout_rate", "z_loss", "every", "validation_examples"),
)


def plan(
    config: ConfigDict, prepared: text.Text | None, reference: ConfigDict | None = None
) -> list[Stage]:
    """Return the stages of a config in the order they run.

    Args:
        prepared: the text; None where only the shape of the graph is asked for. Such stages have
            keys under which nothing must be kept.
        reference: the config whose multi-head network is timed beside this one's; itself if None.
    """
    setup = make_setup(config)
    pretrained = _pretrain_settings(config, prepared, _multi_head(config), parent_config(config))
    pretrain = Stage("pretrain", pretrained, (), setup)
    grouped = list(_grouped(config, prepared, pretrain))
    stages = [pretrain, *grouped]
    tasks = text.split_names(config.finetune.tasks)
    if not tasks:
        return stages

    # Both the multi-head parent and the network at the end of conversion and uptraining are
    # fine-tuned, because the report compares their scores.
    leaves = [pretrain, *grouped[-1:]]
    for leaf, task in itertools.product(leaves, tasks):
        stages += _tune_and_score(config, leaf, task, prepared)
    return [*stages, _benchmark(config, reference or config, leaves[-1])]


def evaluate_checkpoint(config: ConfigDict, path: Path, variant: Variant, task: str) -> Stage:
    """Return the stage that scores any checkpoint on one task."""
    # Metrics and text are None, because `pipeline.score_checkpoint` prepares no text to plan with.
    options = config.evaluate.to_dict()
    settings = EvaluateSettings(
        variant, task, metrics=None, text=None, checkpoint=str(path), **options
    )
    return Stage("evaluate", settings, (), make_setup(config))


def parent_config(config: ConfigDict) -> Config:
    """Return the multi-head network that everything starts from."""
    heads = {f"num_kv_heads_{name}": config.model.num_heads for name in conversion.ATTENTIONS}
    return network_config(text.model_section(config), heads)


def target_heads(config: ConfigDict) -> dict[str, int]:
    """Return the number of KV heads of each attention after conversion."""
    heads = {name: config.convert[f"num_kv_heads_{name}"] for name in conversion.ATTENTIONS}
    # An attention that convert.where leaves out stays multi-head, whatever its own key says.
    multi_head = {*WHERE["both"]} - {*WHERE[config.convert.where]}
    return heads | dict.fromkeys(multi_head, config.model.num_heads)


def converts(config: ConfigDict) -> bool:
    """Return whether any attention of a config gets fewer KV heads than its multi-head parent."""
    return set(target_heads(config).values()) != {config.model.num_heads}


def converted_config(config: ConfigDict) -> Config:
    """Return the network after conversion, with one number of KV heads for all layers."""
    heads: dict[str, Any] = {f"num_kv_heads_{name}": K for name, K in target_heads(config).items()}
    return dataclasses.replace(parent_config(config), **heads)


def pretrain_recipe(config: ConfigDict) -> Recipe:
    """Return how the multi-head parent, or a network from scratch, is trained."""
    section = config.pretrain
    return Recipe(
        task=section.task,
        pack=section.pack,
        schedule="rsqrt",
        learning_rate=section.scale,
        warmup=section.warmup,
        seed=config.seed,
        **{key: section[key] for key in RECIPE_KEYS},
    )


def finetune_recipe(config: ConfigDict, task: str) -> Recipe:
    """Return how a network is fine-tuned on one task."""
    section = config.finetune
    # A length of 0 in the config stands for the task's own length.
    keys = {key: section[key] for key in RECIPE_KEYS} | text.lengths(section, task)
    return Recipe(
        task=task,
        pack=section.pack,
        schedule="constant",
        learning_rate=section.learning_rate,
        warmup=0,
        seed=config.seed,
        **keys,
    )


def make_setup(config: ConfigDict) -> Setup:
    """Return the options of a stage that do not determine its result."""
    return Setup(
        run=config.name,
        text=text.settings(config),
        remat=config.model.remat,
        pretrain=PretrainOptions(
            num_microbatches=config.pretrain.num_microbatches,
            every=config.pretrain.every,
            validation_examples=config.pretrain.validation_examples,
        ),
        checkpoint=CheckpointOptions(**config.checkpoint),
        train=TrainOptions(**config.train),
        wandb=TrackingOptions(**config.wandb),
        mesh=Layout(**config.mesh),
        profile_benchmark=config.benchmark.profile,
    )


def _pretrain_settings(
    config: ConfigDict, prepared: text.Text | None, variant: Variant, model: Config
) -> PretrainSettings:
    return PretrainSettings(
        variant=variant,
        recipe=pretrain_recipe(config),
        model=model,
        text=prepared and prepared.training_source(config.pretrain.task),
        vocabulary=prepared and prepared.tokenizer.hash,
        initial_checkpoint=initial_checkpoint.identity(config),
    )


def _grouped(config: ConfigDict, prepared: text.Text | None, pretrain: Stage) -> Iterator[Stage]:
    """Yield the stages that lead to the network that is compared with the multi-head parent."""
    heads, alpha, beta = target_heads(config), config.uptrain.alpha, config.uptrain.beta
    parents: tuple[Stage, ...]
    how_converted: dict[str, Any] = {}

    # A network that keeps all its heads is not converted. With an alpha it is uptrained all the
    # same, as a control that shows what more training gives without a conversion.
    if not converts(config):
        parents = (pretrain,)

    # A network that is trained from scratch has the recipe of the multi-head parent, and its
    # uptraining goes on with it. Together they have as many steps as pretraining and uptraining of
    # a converted network, at the same learning rates. All alphas share the pretraining.
    elif config.convert.method == NOT_CONVERTED:
        variant, model = _variant(config, heads), converted_config(config)
        settings = _pretrain_settings(config, prepared, variant, model)
        from_scratch = Stage("pretrain", settings, (), pretrain.setup)
        yield from_scratch
        # It has no multi-head parent to be kept near to.
        parents, beta = (from_scratch,), 0.0

    else:
        how_converted = _conversion(config)
        conversion_settings = ConvertSettings(
            variant=_variant(config, heads, **how_converted),
            optimizer=config.convert.optimizer,
            cache_lengths=_cache_lengths(config) if config.convert.per_layer_budget else None,
        )
        converted = Stage("convert", conversion_settings, (pretrain,), pretrain.setup)
        yield converted
        parents = (converted, pretrain)

    if alpha > 0:
        variant = _variant(config, heads, alpha=alpha, beta=beta, **how_converted)
        yield Stage("uptrain", UptrainSettings(variant), parents, pretrain.setup)


def _conversion(config: ConfigDict) -> dict[str, Any]:
    """Return the fields of a variant that say how it is converted.

    A key of the config is left out where it makes no difference, so that one conversion has one
    stage: the mean of kernels, say, depends neither on a space nor on calibration tokens.
    """
    section = config.convert
    keys = {"method", "grouping", "renorm", "per_layer_budget"}
    if section.method in conversion.ABSORBING or section.per_layer_budget:
        keys |= {"space"}
    if conversion.needs_input_covariances(section.method, section.space, section.grouping):
        keys |= {"calibration_tokens"}
    if conversion.needs_input_covariances(section.method, section.space):
        keys |= {"sequential"}
        # The other method that reads covariances, "prune", inverts none of them.
        keys |= {"shrinkage"} if section.method in conversion.ABSORBING else set()
    # A budget is spread by what svd would lose in each layer, whatever the method is.
    if section.per_layer_budget and section.space != "weight":
        keys |= {"calibration_tokens", "shrinkage"}
    return {key: section[key] for key in keys}


def _cache_lengths(config: ConfigDict) -> dict[str, int]:
    """Return the positions that the cache of each of the decoder's attentions is counted with."""
    return {
        "self_attention": config.benchmark.targets_length,
        "cross_attention": config.benchmark.inputs_length,
    }


def _tune_and_score(
    config: ConfigDict, leaf: Stage, task: str, prepared: text.Text | None
) -> list[Stage]:
    settings = FinetuneSettings(
        variant=leaf.variant,
        recipe=finetune_recipe(config, task),
        text=prepared and prepared.training_source(task),
    )
    tuned = Stage("finetune", settings, (leaf,), leaf.setup)

    metrics = tuple(prepared.metrics(task)) if prepared else None
    source = prepared and prepared.source(task)
    scores = EvaluateSettings(
        leaf.variant, task, metrics, source, checkpoint=None, **config.evaluate.to_dict()
    )
    return [tuned, Stage("evaluate", scores, (tuned,), leaf.setup)]


def _benchmark(config: ConfigDict, reference: ConfigDict, leaf: Stage) -> Stage:
    """Return the stage that times the multi-head reference and the network of `leaf` in turn.

    Times depend on shapes alone: neither on how a network was reached nor on the seed. Only KV
    heads that a budget spread over the layers are not known before the conversion: then the network
    is that of the checkpoint of `leaf`, and its variant says how it was converted.
    """
    heads = target_heads(config)
    parents: tuple[Stage, ...] = ()
    how_converted: dict[str, Any] = {}
    model: Config | None = converted_config(config)
    # Without a budget the stage has no parents, so that one benchmark serves every seed and method.
    if leaf.variant.per_layer_budget:
        parents, how_converted, model = (leaf,), _conversion(config), None

    networks = [
        TimedNetwork(_multi_head(reference, seed=0), parent_config(reference)),
        TimedNetwork(_variant(config, heads, seed=0, **how_converted), model),
    ]

    options = config.benchmark.to_dict()
    del options["profile"]  # changes no number: part of the setup
    settings = BenchmarkSettings(
        variant=networks[-1].variant,
        networks=tuple(dict.fromkeys(networks)),  # one, if the network is the reference itself
        **options,
    )
    return Stage("benchmark", settings, parents, leaf.setup)


def _multi_head(config: ConfigDict, **fields: Any) -> Variant:
    return _variant(config, dict.fromkeys(conversion.ATTENTIONS, config.model.num_heads), **fields)


def _variant(config: ConfigDict, heads: dict[str, int], **fields: Any) -> Variant:
    """Return the variant with these KV heads by attention; `fields` are those without a default."""
    fixed = {"alpha": 0.0, "seed": config.seed}
    return Variant(
        size=config.size,
        num_heads=config.model.num_heads,
        num_kv_heads=heads["self_attention"],
        num_kv_heads_cross_attention=heads["cross_attention"],
        num_kv_heads_encoder=heads["encoder"],
        **fixed | fields,
    )
