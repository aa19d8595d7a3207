"""Report how often the loss of each training spiked, and how often training had to go back."""

import itertools

from experiments.report import tables
from experiments.report.estimate import Estimate
from experiments.report.summary import Summary
from experiments.report.tables import DASH

COUNTS = {"loss spikes": "loss_spikes", "rollbacks": "rollbacks"}  # metric by title
NOTE = (
    "A loss spike is a training loss that is more than `train.spike` nats per token above its "
    "running mean. A rollback is a return to an earlier checkpoint, after a spike or a loss that "
    "is not finite. Counts are in the order of the seeds. Fine-tunings that are not listed had "
    "neither. With `train.on_divergence=stop` a spike ends the training, so that a training that "
    "is finished had none."
)


def section(summary: Summary) -> str:
    """Return the section as Markdown.

    It is empty where every training was stable, unless a grouped network was trained from scratch:
    whether that is stable is a question of its own (appendix A of the paper).
    """
    trainings = [("pretrain", None), ("uptrain", None)]
    trainings += [("finetune", task) for task in summary.tasks]
    rows, is_unstable = [], False
    for variant, (stage, task) in itertools.product(summary.variants, trainings):
        counts = [summary.get(variant, stage, metric, task) for metric in COUNTS.values()]
        known = [count for count in counts if count is not None]
        happened = any(count.value for count in known)
        is_unstable |= happened

        # Fine-tunings are many, and short.
        if known and (happened or task is None):
            seeds = ", ".join(map(str, sorted(known[0].runs)))
            title = f"{stage} {task}" if task else stage
            rows.append([summary.title(variant), title, seeds, *map(_by_seed, counts)])

    if not is_unstable and not any(variant.is_from_scratch for variant in summary.trained):
        return ""
    header = ["variant", "stage", "seeds", *COUNTS]
    return "\n\n".join(["## Stability of training", tables.markdown(header, rows), NOTE])


def _by_seed(count: Estimate | None) -> str:
    """Return the count of every seed: `0, 2, 0`."""
    if count is None:
        return DASH
    return ", ".join(f"{count.runs[seed].value:g}" for seed in sorted(count.runs))
