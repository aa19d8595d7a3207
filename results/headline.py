"""Draw the figure at the top of the README from results/conversion-multi30k/results.jsonl.

    python results/headline.py

Left: validation loss straight after conversion, by KV heads. Right: along uptraining, with 4 KV
heads. Points are means over seeds, bars their 95% intervals (Student's t).
"""

import json
import os
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent
METHODS = {
    # (method, space): label and colour
    ("mean", None): ("mean (the paper's)", "#d55e00"),
    ("svd", "logit"): ("svd-logit (closed form)", "#0072b2"),
}
KV_HEADS = (8, 4, 2, 1)
ALPHAS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)


def losses() -> dict[tuple, list[float]]:
    """Return validation losses, one per seed, by (method, space, KV heads, alpha).

    Only both attentions of the decoder converted alike, by the method without further options.
    """
    by_network: dict[tuple, list[float]] = {}
    for line in (RESULTS / "conversion-multi30k" / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        variant = record["variant"]
        plain = (
            record["metric"] == "validation_loss"
            and record["stage"] in ("pretrain", "convert", "uptrain")
            and variant["num_kv_heads"] == variant["num_kv_heads_cross_attention"]
            and variant["grouping"] in (None, "contiguous")
            and not (variant["renorm"] or variant["sequential"] or variant["per_layer_budget"])
            and not variant["beta"]
            and variant["calibration_tokens"] in (None, 65_536)
            and variant["shrinkage"] in (None, 0.01)
        )
        if plain:
            keys = ("method", "space", "num_kv_heads", "alpha")
            by_network.setdefault(tuple(variant[key] for key in keys), []).append(record["value"])
    return by_network


def draw(axes, networks: list[list[float]], label: str, colour: str) -> None:
    """Draw the mean and the interval of each network's losses, and a label at the first."""
    means = [np.mean(values) for values in networks]
    half_widths = [stats.sem(v) * stats.t.ppf(0.975, len(v) - 1) for v in networks]
    places = range(len(networks))
    axes.errorbar(
        places, means, half_widths, color=colour, marker="o", capsize=3, lw=2, label=label
    )


def main() -> None:
    """Write results/headline.png."""
    os.environ["MPLBACKEND"] = "Agg"  # the figure goes into a file, also from a notebook
    import matplotlib.pyplot as plt  # only after the backend is chosen

    by_network = losses()
    parent = np.mean(by_network["none", None, 16, 0.0])
    figure, (at_once, along) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)

    for (method, space), (label, colour) in METHODS.items():
        draw(at_once, [by_network[method, space, K, 0.0] for K in KV_HEADS], label, colour)
        draw(along, [by_network[method, space, 4, alpha] for alpha in ALPHAS], label, colour)
    for axes in (at_once, along):
        axes.axhline(parent, color="black", ls="--", lw=1, label="multi-head parent, 16 KV heads")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)

    at_once.set_title("Straight after conversion")
    at_once.set(xlabel="KV heads", ylabel="validation loss (nats a token)")
    at_once.set_xticks(range(len(KV_HEADS)), map(str, KV_HEADS))
    along.set_title("4 KV heads, along uptraining")
    along.set(xlabel="alpha (uptraining steps / pretraining steps)")
    along.set_xticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS])
    along.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "headline.png", dpi=120)


if __name__ == "__main__":
    main()
