"""Answer "how many KV heads?": the fewest whose score is shown to be near enough to MHA's.

Only networks whose decoder attentions have equally many KV heads take part. `markdown` gives the
answer for the report, `plain` for the terminal.
"""

import math
import textwrap
from typing import NamedTuple

from experiments.report import safe_text, tables
from experiments.report.estimate import Difference
from experiments.report.summary import Summary
from experiments.report.variants_section import signed
from experiments.stages.variant import Variant

TITLE = "How many KV heads?"
YES, NO, UNKNOWN = "yes", "no", "cannot tell"
COSTS = ("sample_seconds", "token_seconds", "kv_cache_bytes")
WIDTH = 100  # columns of a terminal
# Do not advise more than this many times as many test examples: nobody would collect them.
PRACTICAL = 100


class Point(NamedTuple):
    """One number of KV heads.

    Args:
        variant: the network with so many KV heads.
        difference: its score minus MHA's.
        verdict: whether the difference is small enough: YES, NO or UNKNOWN.
    """

    variant: Variant
    difference: Difference
    verdict: str

    @property
    def heads(self) -> str:
        """The number of KV heads in words: `8 KV heads`."""
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
        parts += [
            f"### {safe_text.markdown(answer.title)}",
            safe_text.markdown(" ".join(answer.sentences)),
        ]
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
    """Return the rule by which the answer is chosen, for readers."""
    limit = _limit(summary, within)
    better, worse = ("below", "above") if summary.scores_are_errors else ("above", "below")
    return (
        "The answer is the smallest measured number of KV heads whose "
        f"{_score(summary)} is shown to be within {_points(within)} of the score of multi-head "
        "attention (MHA). For each number of KV heads, the difference is its score minus MHA's, "
        f"with a 95% interval. If the whole interval lies {better} {limit:g}, the number of KV "
        f"heads is good enough (yes). If the whole interval lies {worse} {limit:g}, it is not "
        "(no). Otherwise these results cannot tell."
    )


def _limit(summary, within):
    """Return the difference to MHA that is `within` points worse than none."""
    return within if summary.scores_are_errors else -within


def _score(summary):
    return "score" if len(summary.tasks) == 1 else "average score"


def _points(within):
    return f"{within:g} point{'s' if within != 1 else ''}"


def _answers(summary, within):
    """Return one answer for each size, method and alpha with two or more numbers of KV heads."""
    groups: dict = {}
    for v in summary.variants:
        if v.groups_decoder_evenly and v.shape != v.parent and _is_complete(summary, v):
            groups.setdefault((v.size, v.conversion, v.alpha), []).append(v)
    return [_answer(summary, variants, within) for variants in groups.values() if len(variants) > 1]


def _is_complete(summary, variant):
    """Return whether the variant and its parent are both scored and timed."""
    both = (variant, variant.parent)
    timed = all(summary.get(v, "benchmark", metric) for v in both for metric in COSTS)
    return timed and summary.against_parent(variant) is not None


def _answer(summary, variants, within):
    points = []
    for v in sorted(variants, key=lambda v: v.num_kv_heads):
        difference = summary.against_parent(v)
        points.append(Point(v, difference, _verdict(summary, difference, within)))

    header = ["KV heads", "difference to MHA, points", f"within {within:g}"]
    header += ["speed / sample", "speed / token", "KV cache"]
    rows = [
        [
            str(p.variant.num_kv_heads),
            signed(p.difference),
            p.verdict,
            # Speeds read "2.00x as fast"; the cache reads "0.25x as large", the inverse of a gain.
            *(f"{_gain(summary, p.variant, metric):.2f}x" for metric in COSTS[:2]),
            f"{1 / _gain(summary, p.variant, 'kv_cache_bytes'):.2f}x",
        ]
        for p in points
    ]

    sentences = [*_conclusion(summary, points, within), *_one_seed(summary, variants)]
    return Answer(f"{variants[0].size}, {variants[0].origin}", header, rows, sentences)


def _verdict(summary, difference, within):
    """Return whether the score is shown to be at most `within` points worse than MHA's."""
    limit = _limit(summary, within)
    if difference.low is None or difference.low <= limit <= difference.high:
        return UNKNOWN
    return YES if (difference.low > limit) != summary.scores_are_errors else NO


def _gain(summary, variant, metric):
    """Return MHA's cost divided by the variant's."""
    parent_cost = summary.get(variant.parent, "benchmark", metric).value
    return parent_cost / summary.get(variant, "benchmark", metric).value


def _conclusion(summary, points, within):
    """Return the answer in sentences; `points` have ascending numbers of KV heads."""
    chosen = next((p for p in points if p.verdict == YES), None)
    unknown = [p for p in points if p.verdict == UNKNOWN]

    # Some number is shown to be near enough. Fewer KV heads may be, too, where nothing is shown.
    if chosen:
        fewer = [p for p in unknown if p.variant.num_kv_heads < chosen.variant.num_kv_heads]
        return [
            f"{chosen.heads} will do: the {_score(summary)} differs from MHA's by "
            f"{chosen.difference.value:+.2f} points, 95% {_interval(chosen)}.",
            *_gains(summary, chosen.variant),
            *(
                f"{p.heads} may do as well, but these results cannot tell: {_interval(p)}."
                for p in fewer
            ),
        ]

    # All are shown to be too far below.
    if not unknown:
        heads = points[0].variant.num_heads
        return [
            f"No measured number of KV heads below MHA's {heads} will do: all are shown to be more "
            f"than {_points(within)} worse than MHA."
        ]

    # Say for each undecided number what would decide it.
    reasons = "; ".join(f"{p.heads}, {_interval(p)}" for p in unknown)
    return [
        f"These results cannot tell. No number of KV heads is shown to be within {_points(within)} "
        f"of MHA, and these are not shown to be worse than that: {reasons}.",
        *(_would_tell(summary, p, within) for p in unknown if p.difference.low is not None),
    ]


def _gains(summary, variant):
    sample, token, cache = (_gain(summary, variant, metric) for metric in COSTS)
    size = tables.size(summary.get(variant, "benchmark", "kv_cache_bytes").value)
    yield f"This network is {sample:.2f}x as fast as MHA per sample, {token:.2f}x per token."
    yield (
        f"Its KV cache takes {size} for each sequence, {1 / cache:.2f}x of MHA's, so that the same "
        f"memory holds the KV caches of {cache:.1f}x as many sequences."
    )


def _interval(point):
    d = point.difference
    if d.low is None:
        return "its difference has no interval"
    return f"interval [{d.low:+.2f}, {d.high:+.2f}]"


def _would_tell(summary, point, within):
    """Say how many test examples would decide about a point whose difference has an interval."""
    d = point.difference

    # The interval must not hold the limit, so its half width must be below |value - limit|: 0.4 if
    # the difference is -0.6 and the limit is -1. The half width is the hypotenuse of two: that of
    # the seeds stays, and that of the n test examples shrinks as 1/sqrt(n).
    limit = _limit(summary, within)
    room = (d.value - limit) ** 2 - d.seeds**2
    if room <= 0 and d.seeds:
        return f"For {point.heads}, more test examples alone would not decide; more seeds might."
    factor = d.examples**2 / room if room > 0 else math.inf
    if factor > PRACTICAL:
        return (
            f"For {point.heads}, the difference of {d.value:+.2f} is too near {limit:g} for any "
            "practical number of test examples to decide."
        )

    # Name the numbers of examples too, so that the reader need not look up the sizes.
    sizes = {task: summary.headline(point.variant, task).n for task in summary.tasks}
    needed = [f"{task} {_round(factor * n)}" for task, n in sizes.items() if n]
    counts = f" ({', '.join(needed)})" if needed else ""
    return f"For {point.heads}, about {factor:.1f} times the test examples{counts} would decide."


def _round(count):
    """Round up to two significant digits."""
    # For example, 1234 is rounded up to 1300.
    step = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / step) * step


def _one_seed(summary, variants):
    """Warn if an average is over one seed."""
    if any(summary.average(v).seeds == 1 for v in [*variants, variants[0].parent]):
        yield (
            "The intervals are over test examples. With one seed, they do not include the chance "
            "in training."
        )
