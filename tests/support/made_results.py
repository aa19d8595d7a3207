"""Result records like the ones runs write, for the tests of the report."""

import dataclasses

import numpy as np

from experiments.graph import method_names
from experiments.stages.variant import NOT_CONVERTED
from gqa.conversion import SHRINKAGE, calibration
from tests.support.variants import grouped

TASKS = {"parameter_qa": "f1 %", "docstring_summary": "rougeL %"}
EXAMPLES = 400
KEY = "key"  # of all stages: a report takes what has the keys of its command
REPLICATES = np.random.default_rng(0).normal(size=(len(TASKS), 200))
REPLICATES -= REPLICATES.mean(1, keepdims=True)
REPLICATES /= REPLICATES.std(1, ddof=1, keepdims=True)


def variant(num_kv_heads, method="mean", alpha=0.05, seed=0, size="nano"):
    """Return the variant of a network in a result record; `method` is a name as in a sweep.

    As in the records of runs, a setting that makes a difference has its default where the name does
    not say otherwise.
    """
    conversion = {}
    if method != NOT_CONVERTED:
        conversion = {"grouping": "contiguous"}
        if "activation" in method or "logit" in method:
            conversion |= {"calibration_tokens": calibration.TOKENS, "shrinkage": SHRINKAGE}
        keys = method_names.keys(method)
        conversion |= {key.split(".")[1]: value for key, value in keys.items()}
    return dataclasses.asdict(
        grouped(num_kv_heads=num_kv_heads, size=size, alpha=alpha, seed=seed, **conversion)
    )


def record(variant, stage, metric, value, unit="", task=None, interval=None, n=None, **more):
    low, high = interval or (None, None)
    where = {
        "run": f"run-{variant['num_kv_heads']}",
        "stage": stage,
        "stage_key": KEY,
        "task": task,
    }
    number = {"metric": metric, "value": value, "unit": unit, "low": low, "high": high, "n": n}
    origin = {"commit": "abc1234", "device": "cpu, 2 cores", "time": "2025-01-01T00:00:00+00:00"}
    return where | {"variant": variant} | number | origin | more


def score(variant, task, value, width=1.5, n=EXAMPLES, **more):
    interval = (value - width, value + width)
    return record(variant, "evaluate", "headline", value, TASKS[task], task, interval, n, **more)


def paired_score(settings, task, value, error, n=EXAMPLES):
    """A score whose difference to one with error 0 has that standard error."""
    own = REPLICATES[list(TASKS).index(task)]
    replicates = value + error * own
    return score(settings, task, value, n=n, replicates=replicates.tolist())


def timings(num_kv_heads, sample_seconds, size="nano", **beside):
    """What the benchmark leaves of a network, however its weights were reached."""
    settings = variant(num_kv_heads, "none", 0.0, size=size)
    sizes = {"num_params": 1_200_000 + 20_000 * num_kv_heads}
    sizes |= {"kv_cache_bytes": num_kv_heads * 32768}
    sizes |= {"batch_size": 8, "inputs_length": 256, "targets_length": 40}
    times = {"prefill_seconds": 3e-3, "token_seconds": sample_seconds / 40}
    records = [record(settings, "benchmark", m, v) for m, v in sizes.items()]
    for metric, value in (times | {"sample_seconds": sample_seconds}).items():
        bars = (value * 0.9, value * 1.2)
        timed = record(settings, "benchmark", metric, value, "s", interval=bars)
        records.append(timed | beside)
    return records


def network(settings, quality, speed, error=None):
    """All that is measured of one variant; with `error`, scores with replicates."""

    def add(stage, task=None, **metrics):
        return [record(settings, stage, m, v, task=task) for m, v in metrics.items()]

    heads, alpha, records = settings["num_kv_heads"], settings["alpha"], []
    if settings["method"] != "none":
        records += add("convert", validation_loss=4.6 - heads / 20)
    elif not alpha:
        records += add("pretrain", validation_loss=3.9, steps=2000, train_seconds=200.0)
    if alpha:
        records += add("uptrain", validation_loss=4.2 - 2 * alpha, steps=2000 * alpha)
    for task in TASKS:
        records += add("finetune", task, validation_loss=2.4, steps=300)
        losses = {"test_loss": 2.5, "test_loss_other_input": 3.5, "test_loss_unigram": 5.0}
        records += add("evaluate", task, rouge1=quality + 2, bleu=quality / 2, **losses)
        records += add("evaluate", task, constant_answer=11.0, first_sentence=9.0)
        if error is None:
            records.append(score(settings, task, quality))
        else:
            records.append(paired_score(settings, task, quality, error))
    return records + timings(heads, speed, settings["size"])


def curve(settings, stage, losses, task=None):
    """A learning curve with a point every 100 steps."""
    return [
        record(settings, stage, "learning_curve", loss, task=task, step=100 * i)
        for i, loss in enumerate(losses, 1)
    ]


PARENT = variant(16, "none", 0.0)
WHOLE = [
    *network(PARENT, 25.0, 0.04),
    *network(variant(8), 24.0, 0.03),
    *network(variant(1), 15.0, 0.02),
]
