"""The settings that determine a stage's result, and the options that do not.

The settings of a stage are hashed into its key, so a class here has a field if and only if the
field can change the stage's result. `Setup` holds the rest: where the text lies, what to keep, how
to spread the network over devices. The plan (`experiments/graph/plan.py`) makes these objects from
a config, a stage's folder keeps them as JSON, and nothing below the plan reads a config.
"""

from dataclasses import dataclass, field
from typing import Any

from experiments.stages.variant import Variant
from gqa.model.config import Config
from gqa.runtime.mesh import Layout

# Fields of `Config` that came after the first release, with the values of every earlier network.
LATER = {
    "position_bias_per_layer": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, by pretraining or fine-tuning; its checkpoints carry it along.

    Args:
        inputs_length, targets_length: tokens of a row of a batch.
        pack: put several examples into a row.
        schedule: "rsqrt", for a learning rate of `learning_rate / sqrt(max(step, warmup))`, or
            "constant", for `learning_rate` itself.
        every: steps between validations, each of which saves a checkpoint.
    """

    task: str
    steps: int
    batch_size: int
    num_microbatches: int
    inputs_length: int
    targets_length: int
    pack: bool
    schedule: str
    learning_rate: float
    warmup: int
    dropout_rate: float
    z_loss: float
    every: int
    validation_examples: int
    seed: int

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of a row, by the names that functions of batches have for them."""
        return {"inputs_length": self.inputs_length, "targets_length": self.targets_length}


@dataclass(frozen=True)
class InitialCheckpoint:
    """A checkpoint of another program that takes the place of pretraining.

    Args:
        kind: which program wrote it: "huggingface" or "t5x".
        contents: a hash of its files.
    """

    kind: str
    folder: str
    contents: str


@dataclass(frozen=True)
class PretrainSettings:
    """The settings that determine a network that is trained from scratch, or taken over.

    Args:
        text: a hash of the pretraining text without the split test; None before it is prepared.
        vocabulary: a hash of the vocabulary; None before it is prepared.
    """

    variant: Variant
    recipe: Recipe
    model: Config
    text: str | None
    vocabulary: str | None
    initial_checkpoint: InitialCheckpoint | None


@dataclass(frozen=True)
class ConvertSettings:
    """The settings that determine a conversion; the variant holds most of them.

    Args:
        optimizer: "map" the optimizer's state to the grouped network, or "reset" it.
        cache_lengths: with `variant.per_layer_budget`, the positions that the cache of each of the
            decoder's attentions holds, by which the budget is counted.
    """

    variant: Variant
    optimizer: str
    cache_lengths: dict[str, int] | None


@dataclass(frozen=True)
class UptrainSettings:
    """The settings that determine an uptraining; recipe and text are those of pretraining."""

    variant: Variant


@dataclass(frozen=True)
class FinetuneSettings:
    """The settings that determine a fine-tuning.

    Args:
        text: a hash of the task's text for training and validation; None before the text is
            prepared.
    """

    variant: Variant
    recipe: Recipe
    text: str | None


@dataclass(frozen=True)
class EvaluateSettings:
    """The settings that determine the scores of a checkpoint.

    Args:
        metrics: names of the task's metrics; None before the text is prepared.
        text: a hash of the task's text for all splits; None before the text is prepared.
        checkpoint: a folder that the user named, to be scored instead of a parent stage's.
        examples: how many of the split's first examples to score; 0 for all.
        top_k: sample from the k likeliest tokens; 0 for all.
        cache_dtype: of keys and values; "" for the backend's own.
    """

    variant: Variant
    task: str
    metrics: tuple[str, ...] | None
    text: str | None
    checkpoint: str | None
    split: str
    examples: int
    batch_size: int
    search: str
    num_beams: int
    length_penalty: float
    temperature: float
    top_k: int
    top_p: float
    cache_dtype: str


@dataclass(frozen=True)
class TimedNetwork:
    """A network to time; without a `model`, that of the parent stage's checkpoint."""

    variant: Variant
    model: Config | None


@dataclass(frozen=True)
class BenchmarkSettings:
    """The settings that determine timings: networks that take turns, the reference first."""

    variant: Variant
    networks: tuple[TimedNetwork, ...]
    batch_size: int
    inputs_length: int
    targets_length: int
    repetitions: int


Settings = (
    PretrainSettings
    | ConvertSettings
    | UptrainSettings
    | FinetuneSettings
    | EvaluateSettings
    | BenchmarkSettings
)
# The kinds of stages in the order they run, each with the class of its settings.
SETTINGS: dict[str, type[Settings]] = {
    "pretrain": PretrainSettings,
    "convert": ConvertSettings,
    "uptrain": UptrainSettings,
    "finetune": FinetuneSettings,
    "evaluate": EvaluateSettings,
    "benchmark": BenchmarkSettings,
}


@dataclass(frozen=True)
class TextSettings:
    """The text that `experiments.stages.text.prepare` prepares for a run; paths are absolute.

    Args:
        packages: whose documentation is the default corpus.
        vocabulary: a SentencePiece file, or a folder of Hugging Face; "" to train one on the text
            of the `pretraining` task.
        vocabulary_model: the kind of SentencePiece model to train, "unigram" or "bpe".
        options: of each task, the keyword arguments that its module takes.
    """

    packages: tuple[str, ...]
    vocabulary: str
    vocabulary_model: str
    vocab_size: int
    pretraining: str
    tasks: tuple[str, ...]
    options: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CheckpointOptions:
    """The config's section `checkpoint`."""

    keep_last: int = 1
    on_damage: str = "stop"


@dataclass(frozen=True)
class TrainOptions:
    """The config's section `train`."""

    on_divergence: str = "stop"
    max_rollbacks: int = 3
    spike: float = 3.0
    profile: str = ""


@dataclass(frozen=True)
class TrackingOptions:
    """The config's section `wandb`."""

    mode: str = "off"
    project: str = "gqa"


@dataclass(frozen=True)
class PretrainOptions:
    """Keys of the config's section `pretrain` that conversion and uptraining take from the config.

    The other keys are in the recipe of the multi-head parent's checkpoint.
    """

    num_microbatches: int = 1
    every: int = 1
    validation_examples: int = 1


@dataclass(frozen=True)
class Setup:
    """The options of a stage that do not determine its result, and so are no part of its key.

    Args:
        run: the config's name, which result records carry.
        remat: which activations the backward pass computes again.
        mesh: how networks are spread over devices.
        profile_benchmark: whether the benchmark leaves a trace of one more repetition.
    """

    run: str
    text: TextSettings
    remat: str = "none"
    pretrain: PretrainOptions = PretrainOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    train: TrainOptions = TrainOptions()
    wandb: TrackingOptions = TrackingOptions()
    mesh: Layout = field(default_factory=Layout)
    profile_benchmark: bool = False
