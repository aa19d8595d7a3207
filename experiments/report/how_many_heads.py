"""Answer "how many KV heads?": the fewest whose score is shown to be near enough to MHA's.

Only networks whose decoder attentions have equally many KV heads take part. `markdown` gives the
answer for the report, `plain` for the terminal.
"""

import math
import textwrap
from typing import NamedTuple

from experiments.report import tables
from experiments.report.estimate import Difference
from experiments.report.summary import Summary
from experiments.report.variant import Variant
from experiments.report.variants_section import signed

TITLE = "How many KV heads?"
YES, NO, UNKNOWN = "yes", "no", "cannot tell"
COSTS = ("sample_seconds", "token_seconds", "kv_cache_bytes")
WIDTH = 100
PRACTICAL = 100  # more times the test examples than this, nobody will collect


class Point(NamedTuple):
    """A number of KV heads, its score minus MHA's, and whether this difference is small enough."""

    variant: Variant
    difference: Difference
    verdict: str

    @property
    def heads(self) -> str:
        """Name the point in a sentence."""
        count = self.variant.num_kv_heads
        return f"{count} KV head{'s' if count > 1 else ''}"


class Answer(NamedTuple):
    """The answer for one size, method and alpha: a table of all points, then sentences."""

    title: str
    header: list[str]
    rows: list[list[str]]
    sentences: list[str]


def markdown(summary: Summary, within: float) -> str:
    """Return the section as Markdown; empty if too little was measured for an answer."""
    answers = _answers(summary, within)
    if not answers:
        return ""
    parts = [f"## {TITLE}", _rule(summary, within)]
    for answer in answers:
        parts += [f"### {answer.title}", " ".join(answer.sentences)]
        parts.append(tables.markdown(answer.header, answer.rows))
    return "\n\n".join(parts)


def plain(summary: Summary, within: float) -> str:
    """Return the answer for the terminal, at most 100 columns wide."""
    answers = _answers(summary, within)
    parts = [textwrap.fill(f"{TITLE} {_rule(summary, within)}", WIDTH)] if answers else []
    for answer in answers:
        parts.append(f"{answer.title}\n{textwrap.fill(' '.join(answer.sentences), WIDTH)}")
        parts.append(tables.plain(answer.header, answer.rows, WIDTH))
    return "\n\n".join(parts)


def _rule(summary, within):
    return (
        f"The fewest whose {_score(summary)} is within {_points(within)} of MHA's, of those "
        "measured. A number qualifies if the 95% interval of its difference to MHA lies above "
        f"{-within:g}, and fails if it lies below; otherwise the data cannot tell."
    )


def _score(summary):
    return "score" if len(summary.tasks) == 1 else "average score"


def _points(within):
    return f"{within:g} point{'s' if within != 1 else ''}"


def _answers(summary, within):
    groups: dict = {}
    for v in summary.variants:
        if v.groups_decoder_evenly and v.shape != v.parent and _complete(summary, v):
            groups.setdefault((v.size, v.method, v.alpha), []).append(v)
    return [_answer(summary, found, within) for found in groups.values() if len(found) > 1]


def _complete(summary, variant):
    """Whether the variant and its parent are both scored and timed."""
    both = (variant, variant.parent)
    timed = all(summary.get(v, "benchmark", metric) for v in both for metric in COSTS)
    return timed and summary.against_parent(variant) is not None


def _answer(summary, variants, within):
    points = []
    for v in sorted(variants, key=lambda v: v.num_kv_heads):
        found = summary.against_parent(v)
        points.append(Point(v, found, _verdict(found, within)))
    v = variants[0]
    way = f"{v.method.label}, alpha {v.alpha:g}" if v.is_converted else "from scratch"
    near = f"within {within:g}"
    header = ["KV heads", "difference to MHA, points", near, "speed / sample", "speed / token"]
    header.append("KV cache")
    rows = [
        [
            str(p.variant.num_kv_heads),
            signed(p.difference),
            p.verdict,
            *(f"{_gain(summary, p.variant, metric):.2f}x" for metric in COSTS[:2]),
            f"{1 / _gain(summary, p.variant, 'kv_cache_bytes'):.2f}x",
        ]
        for p in points
    ]
    sentences = [*_conclusion(summary, points, within), *_one_seed(summary, variants)]
    return Answer(f"{v.size}, {way}", header, rows, sentences)


def _verdict(difference, within):
    if difference.low is not None and difference.low > -within:
        return YES
    if difference.high is not None and difference.high < -within:
        return NO
    return UNKNOWN


def _gain(summary, variant, metric):
    """Return MHA's cost over the variant's."""
    own = summary.get(variant, "benchmark", metric).value
    return summary.get(variant.parent, "benchmark", metric).value / own


def _conclusion(summary, points, within):
    chosen = next((p for p in points if p.verdict == YES), None)
    unknown = [p for p in points if p.verdict == UNKNOWN]
    heads = points[0].variant.num_heads
    if chosen:
        fewer = [p for p in unknown if p.variant.num_kv_heads < chosen.variant.num_kv_heads]
        return [
            f"{chosen.heads} will do: {_score(summary)} {chosen.difference.value:+.2f} points "
            f"from MHA's, 95% {_interval(chosen)}.",
            *_gains(summary, chosen.variant),
            *(f"{p.heads} may do, too: the data cannot tell; {_interval(p)}." for p in fewer),
        ]
    if not unknown:
        return [f"None below MHA's {heads}: every one measured is further than that below MHA."]
    reasons = "; ".join(f"{p.heads}, {_interval(p)}" for p in unknown)
    return [
        f"The data cannot tell: none is shown to be within {_points(within)} of MHA, and not all "
        f"are shown to be further below ({reasons}).",
        *(_would_tell(summary, p, within) for p in unknown if p.difference.low is not None),
    ]


def _gains(summary, variant):
    sample, token, cache = (_gain(summary, variant, metric) for metric in COSTS)
    size = tables.size(summary.get(variant, "benchmark", "kv_cache_bytes").value)
    yield f"Against MHA it is {sample:.2f}x as fast per sample, {token:.2f}x per token."
    yield (
        f"Its KV cache is {size} a sequence, {1 / cache:.2f}x of MHA's: the same memory holds "
        f"{cache:.1f}x as many sequences (counting the KV cache alone)."
    )


def _interval(point):
    d = point.difference
    if d.low is None:
        return "its difference has no interval"
    return f"interval [{d.low:+.2f}, {d.high:+.2f}]"


def _would_tell(summary, point, within):
    """Say how many test examples would decide; their half width shrinks as 1/sqrt(n)."""
    d = point.difference
    room = (d.value + within) ** 2 - d.seeds**2
    if room <= 0 and d.seeds:
        return f"More test examples alone would not tell for {point.heads}; more seeds might."
    factor = d.examples**2 / room if room > 0 else math.inf
    if factor > PRACTICAL:
        return f"{point.heads}: {d.value:+.2f} is too near {-within:g} to be told from it."
    sizes = {task: summary.headline(point.variant, task).n for task in summary.tasks}
    needed = [f"{task} {_round(factor * n)}" for task, n in sizes.items() if n]
    these = f" ({', '.join(needed)})" if needed else ""
    return f"About {factor:.1f} times the test examples{these} would tell for {point.heads}."


def _round(count):
    """Round up to two digits."""
    step = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / step) * step


def _one_seed(summary, variants):
    if any(summary.average(v).seeds == 1 for v in [*variants, variants[0].parent]):
        yield "The intervals are over test examples: with one seed, chance in training is not in."
