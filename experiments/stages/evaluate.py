"""Score a fine-tuned checkpoint on a held-out split; predictions are kept beside the scores."""

import json
from pathlib import Path

from experiments.stages.folder import NATS, Outcome, StageFolder, record
from experiments.stages.inputs import Job, load_params, open_parent
from experiments.stages.settings import EvaluateSettings
from experiments.stages.text import say_what_is_cut
from experiments.workdir import write_whole
from gqa.data import tasks
from gqa.data.examples import Example
from gqa.evaluation import metrics, scoring
from gqa.inference import decoding
from gqa.inference.generator import Generator
from gqa.inference.step import Inference
from gqa.runtime.mesh import resolve_layout
from gqa.training import training_step

SHOWN = 10  # examples whose prediction stands in the report
CANDIDATES = 20_000  # training targets that the best constant answer is chosen from


def run(
    label: str, settings: EvaluateSettings, folder: StageFolder, parents: list[Path], job: Job
) -> Outcome:
    """Answer the examples of a split and score the answers; lengths are the checkpoint's."""
    parent, task = open_parent(parents[0]), settings.task
    params = load_params(parent, job)

    # `examples` is 0 for all of them, and a slice to None is the whole list.
    examples = job.text.examples(task, settings.split)[: settings.examples or None]
    pairs = job.text.pairs(examples)
    train_examples = job.text.examples(task, "train")

    batch_size, recipe = settings.batch_size, parent.info.recipe
    say_what_is_cut(recipe, "finetune", settings.split, pairs)
    lengths = recipe.lengths

    # Which way of decoding moves fewer bytes depends on the lengths, which only the checkpoint has.
    layout = resolve_layout(parent.config, job.layout, job.mesh, batch_size, *lengths.values())
    generator = Generator(
        Inference(parent.config, settings.cache_dtype, layout=layout),
        decoding.search_of(settings, settings.variant.seed),
        recipe.targets_length,
        mesh=job.mesh,
    )
    tokens = scoring.predict(
        generator,
        generator.prepare(params),
        [inputs for inputs, _ in pairs],
        inputs_length=recipe.inputs_length,
        batch_size=batch_size,
        together=job.mesh.is_multi_process,
    )
    predictions = [job.text.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    shown = _keep(folder.predictions, examples, predictions)

    validation_loss = training_step.make_validation(parent.config, job.mesh)
    losses = scoring.losses(
        validation_loss,
        params,
        pairs,
        job.text.pairs(train_examples),
        batch_size=batch_size,
        pack=recipe.pack,
        shard=job.text.share,
        special=parent.config.special_tokens,
        **lengths,
    )

    n = len(pairs)
    records = [record(metric, value, NATS, n=n) for metric, value in losses.items()]
    records += _scores(task, job, examples, predictions, train_examples)
    for entry in records:
        print(f"{label}: {entry['metric']} {entry['value']:.2f} {entry['unit']}")
    return Outcome(records + shown)


def _keep(path: Path, examples: list[Example], predictions: list[str]) -> list[dict]:
    """Write one JSON object an example; return records of the first few for the report."""
    rows = [
        {"inputs": example.inputs, "targets": list(example.targets), "prediction": prediction}
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_whole(path, "\n".join(lines) + "\n")
    return [
        record("prediction", len(row["prediction"]), "characters", example=i, **row)
        for i, row in enumerate(rows[:SHOWN])
    ]


def _scores(
    task: str,
    job: Job,
    examples: list[Example],
    predictions: list[str],
    train_examples: list[Example],
) -> list[dict]:
    """Score the predictions by every metric of the task.

    The headline metric is reported again for two answers that need no network: the best constant
    answer, and the task's own baseline or else the first sentence of the input.
    """
    options = job.text.options.get(task, {})
    names, headline = tasks.scoring(task, **options)

    # A network can only write what the vocabulary's normalization leaves of a text.
    normalize = job.text.tokenizer.normalize
    references = [list(map(normalize, example.targets)) for example in examples]
    validation = [
        list(map(normalize, example.targets)) for example in job.text.examples(task, "validation")
    ]
    # Of many training targets, an even sample is enough to find a good constant answer among.
    step = -(-len(train_examples) // CANDIDATES)
    targets = [normalize(example.targets[0]) for example in train_examples[::step]]
    for line in filter(None, (metrics.note(name, references) for name in names)):
        print(f"task {task}: {line}")

    # The constant is chosen on the validation split, because choosing it by the scored examples
    # would flatter it.
    constant = metrics.constant_answer(targets, headline, validation)
    baseline, answers = _baseline(task, options, examples, train_examples)
    # By the name of the record: the metric, the texts to score and the unit.
    scored = {name: (name, predictions, "%") for name in names} | {
        "headline": (headline, predictions, f"{headline} %"),
        "constant_answer": (headline, [constant] * len(examples), f"{headline} %"),
        baseline: (headline, list(map(normalize, answers)), f"{headline} %"),
    }

    records = []
    for key, (metric, texts, unit) in scored.items():
        number = metrics.score(metric, texts, references)._asdict()
        # Only the headline is compared between networks, and needs the bootstrap replicates.
        if key != "headline":
            del number["replicates"]
        records.append(record(key, unit=unit, **number))
    return records


def _baseline(
    task: str, options: dict, examples: list[Example], train_examples: list[Example]
) -> tuple[str, list[str]]:
    """Return the name and the answers of the baseline that reads the inputs without a network."""
    module = tasks.get(task)
    if hasattr(module, "BASELINE"):
        name, answer = module.BASELINE
        return name, answer(train_examples, [example.inputs for example in examples])
    # The prefix, such as "summarize: ", tells the network its task. It is no part of the text whose
    # first sentence is the answer.
    prefix = str(options.get("prefix") or getattr(module, "PREFIX", ""))
    sources = [example.inputs.removeprefix(prefix) for example in examples]
    return "first_sentence", metrics.first_sentence(sources)
