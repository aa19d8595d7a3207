"""Draw the figure at the top of the README from results/words/results.jsonl.

    python results/headline.py

Left: validation loss straight after conversion, by KV heads. Right: word accuracy after
fine-tuning, the average of the tasks. Points are means over seeds, bars their 95% intervals
(Student's t).
"""

import json
import os
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent
KV_HEADS = (8, 4, 2, 1)
SIZE, PARENT = "nano", ("none", None, 16, 0.0)

ORANGE, BLUE, SKY, GREEN = "#d55e00", "#0072b2", "#56b4e9", "#009e73"
LOSSES = {
    # (method, space): label and colour
    ("mean", None): ("mean (the paper's)", ORANGE),
    ("svd", "logit"): ("svd-logit (closed form)", BLUE),
}
SCORES = {
    # (method, space, alpha): label and colour
    ("none", None, 0.05): ("from scratch", GREEN),
    ("svd", "logit", 0.05): ("svd-logit, uptrained", BLUE),
    ("svd", "logit", 0.0): ("svd-logit, not uptrained", SKY),
    ("mean", None, 0.05): ("mean, uptrained", ORANGE),
}
Network = tuple  # (method, space, KV heads, alpha)


def records() -> list[dict]:
    """Return the records of plain conversions of both decoder attentions."""
    lines = (RESULTS / "words" / "results.jsonl").read_text().splitlines()
    return [record for line in lines if is_plain((record := json.loads(line))["variant"])]


def is_plain(variant: dict) -> bool:
    """Return whether the method was run with its default settings."""
    return (
        variant["size"] == SIZE
        and variant["num_kv_heads"] == variant["num_kv_heads_cross_attention"]
        and variant["grouping"] in (None, "contiguous")
        and not (variant["renorm"] or variant["sequential"] or variant["per_layer_budget"])
        and not variant["beta"]
        and variant["calibration_tokens"] in (None, 65_536)
        and variant["shrinkage"] in (None, 0.01)
    )


def network(record: dict) -> Network:
    """Return what tells the network of a record from others, but for its seed."""
    return tuple(record["variant"][key] for key in ("method", "space", "num_kv_heads", "alpha"))


def losses(found: list[dict]) -> dict[Network, list[float]]:
    """Return the validation losses of pretrained and converted networks, one a seed."""
    by_network: dict[Network, list[float]] = {}
    for record in found:
        if record["metric"] == "validation_loss" and record["stage"] in ("pretrain", "convert"):
            by_network.setdefault(network(record), []).append(record["value"])
    return by_network


def scores(found: list[dict]) -> dict[Network, list[float]]:
    """Return the average score over the tasks, one a seed."""
    by_seed: dict[tuple, list[float]] = {}
    for record in found:
        if record["metric"] == "headline":
            key = network(record), record["variant"]["seed"]
            by_seed.setdefault(key, []).append(record["value"])
    tasks = max(map(len, by_seed.values()))
    by_network: dict[Network, list[float]] = {}
    for (which, _), values in by_seed.items():
        if len(values) == tasks:
            by_network.setdefault(which, []).append(float(np.mean(values)))
    return by_network


def draw(axes, lines: dict[str, tuple[str, list]], parent: list[float]) -> None:
    """Draw one line for each label, which stands beside its end, and the parent's level.

    Args:
        lines: by label, the colour and (place, values of the seeds) of each point.
        parent: values of the multi-head parent's seeds.
    """
    axes.axhline(np.mean(parent), color="black", ls="--", lw=1)
    for i, (label, (colour, points)) in enumerate(lines.items()):
        # Bars side by side, so that each is seen.
        places, means = [p + 0.05 * i for p, _ in points], [np.mean(v) for _, v in points]
        bars = [stats.sem(v) * stats.t.ppf(0.975, len(v) - 1) for _, v in points]
        axes.errorbar(places, means, bars, color=colour, marker="o", capsize=3, lw=2)
        axes.annotate(
            label, (places[-1], means[-1]), (8, 0), textcoords="offset points", va="center",
            color=colour, fontsize=9, annotation_clip=False,
        )  # fmt: skip
    axes.set(xlabel="KV heads", xlim=(-0.3, len(KV_HEADS) - 0.7))
    axes.set_xticks(range(len(KV_HEADS)), map(str, KV_HEADS))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def points(by_network: dict, method: str, space: str | None, alpha: float) -> list[tuple]:
    """Return (place on the axis, values of the seeds) for each number of KV heads measured."""
    values = [(i, by_network.get((method, space, K, alpha))) for i, K in enumerate(KV_HEADS)]
    return [(place, seeds) for place, seeds in values if seeds]


def main() -> None:
    """Write results/headline.png."""
    os.environ["MPLBACKEND"] = "Agg"  # the figure goes into a file, also from a notebook
    import matplotlib.pyplot as plt  # only after the backend is chosen

    found = records()
    by_loss, by_score = losses(found), scores(found)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))

    lines = {
        label: (colour, points(by_loss, method, space, 0.0))
        for (method, space), (label, colour) in LOSSES.items()
    }
    draw(left, lines, by_loss[PARENT])
    left.set_title("Straight after conversion", loc="left")
    left.set(ylabel="validation loss (nats a token)", ylim=0)

    lines = {
        label: (colour, points(by_score, *which[:2], which[2]))
        for which, (label, colour) in SCORES.items()
    }
    draw(right, lines, by_score[PARENT])
    # The dashed line means the same in both panels; only here is there room for its name.
    where = 1, np.mean(by_score[PARENT])
    right.annotate("multi-head parent", where, (0, 4), textcoords="offset points", fontsize=9)
    right.set_title("After fine-tuning", loc="left")
    right.set(ylabel="words said right (%)")

    figure.tight_layout(w_pad=4)
    figure.savefig(RESULTS / "headline.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
