"""Write the text at the end of a run: the answer, its table, examples, and what to try next.

The numbers are those of `headline` and `how_many_heads`; the examples are those of the report.
"""

import itertools
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from experiments.report import headline, how_many_heads, learning_section, safe_text, tables
from experiments.report.summary import Summary
from experiments.stages.folder import StageFolder
from experiments.stages.variant import Variant
from gqa.runtime.errors import UserError

WIDTH = 100  # columns of a terminal
EXAMPLES = 5  # that are shown where targets are short
DIFFERING = 3  # further ones on which the networks differ
SHORT = 40  # characters of a short target
NETWORKS = 4  # whose answers are shown
DEFAULT_SIZE, DEFAULT_WORKDIR = "nano", "runs"
RIGHT, WRONG = "= ", "  "  # before a text that equals a reference, and before any other


def text(summary: Summary, within: float, workdir: Path, folder: Path) -> str:
    """Return the text as plain lines of at most 100 characters, but for paths and commands.

    Args:
        within: as for `headline.chosen`.
        workdir: where the stages are, of which commands are shown.
        folder: where the report is.
    """
    parts = [
        how_many_heads.plain(summary, within),
        _filled(headline.sentence(summary, within)),
        _filled(learning_section.answers_without_a_network(summary)),
        tables.plain(*headline.table(summary, within), WIDTH),
        _filled(headline.note(summary, within)),
        examples(summary, within),
        f"report: {folder / 'report.md'}, {folder / 'report.html'}",
        _next(summary, within, workdir),
    ]
    return safe_text.visible("\n\n".join(filter(None, parts)))


def _filled(sentences: str) -> str:
    return textwrap.fill(safe_text.visible(sentences), WIDTH, break_on_hyphens=False)


# --- examples -------------------------------------------------------------------------------------


def examples(summary: Summary, within: float) -> str:
    """Return test examples with every network's text: first ones, then some that tell most.

    The tasks take turns. Of short targets the first examples are shown, and after them the first on
    which the networks differ. Of long targets, one example of each task is shown. Tokens by which a
    text departs from its nearest reference stand in brackets; where one is missing they are empty.
    """
    networks = _networks(summary, within)
    by_task = [_aligned(summary, networks, task) for task in summary.tasks]
    short = [rows for rows in by_task if all(_is_short(row) for row in rows)]

    # The first example of each task, then the second of each, and so on.
    turns = [row for rows in itertools.zip_longest(*short) for row in rows if row]
    first, rest = turns[:EXAMPLES], turns[EXAMPLES:]
    first = first or [rows[0] for rows in by_task if rows][:EXAMPLES]
    telling = [row for row in rest if len({r["prediction"] for r in row.values()}) > 1][:DIFFERING]

    intro = f"What the networks say ({RIGHT.strip()}: as a reference; [ ]: differs from it)"
    blocks = [intro, *map(_example, first)] if first else []
    if telling:
        blocks += ["The first examples after these on which they differ", *map(_example, telling)]
    return "\n\n".join(blocks)


def _is_short(row: dict[str, dict]) -> bool:
    return max(map(len, _targets(row))) <= SHORT


def _networks(summary: Summary, within: float) -> list[Variant]:
    """Return the multi-head parent, the network of the sentence, and others from the table."""
    variants = headline.shown(summary, within)
    main = headline.chosen(summary, within)
    wanted = [main.parent, main] if main else []
    kept = list(dict.fromkeys([v for v in wanted if v in variants] + variants))[:NETWORKS]
    return [v for v in variants if v in kept]


def _aligned(summary, networks, task) -> list[dict[str, dict]]:
    """Return, for each example of a task, the record of every network's prediction by its name."""
    records = {summary.title(v): summary.predictions(v, task) for v in networks}
    records = {name: found for name, found in records.items() if found}

    # All networks were scored on the same examples in the same order.
    rows = zip(*records.values(), strict=False)
    return [dict(zip(records, row, strict=True)) for row in rows]


def _targets(row: dict[str, dict]) -> list[str]:
    return next(iter(row.values()))["targets"]


def _example(row: dict[str, dict]) -> str:
    """Return the lines of one example: its input, its reference and the networks' texts."""
    first, targets = next(iter(row.values())), _targets(row)
    names, texts = list(row), [record["prediction"] for record in row.values()]

    # Equal texts need one line, so that the eye finds those that differ.
    if len(row) > 1 and len(set(texts)) == 1:
        names, texts = [f"all {len(row)} networks"], texts[:1]
    width = max(len(safe_text.visible(name)) for name in [*row, "reference"])
    lines = [first["inputs"], f"  {'reference':{width}}  {WRONG}{targets[0]}"]
    for name, text in zip(names, texts, strict=True):
        mark = RIGHT if _tokens(text) in map(_tokens, targets) else WRONG
        lines.append(f"  {safe_text.visible(name):{width}}  {mark}{_marked(text, targets)}")
    return "\n".join(map(_line, lines))


def _tokens(string: str) -> list[str]:
    return string.split()


def _marked(prediction: str, targets: list[str]) -> str:
    """Put brackets around the tokens by which a text departs from the nearest target."""
    said = _tokens(prediction)
    nearest = min(map(_tokens, targets), key=lambda target: Levenshtein.distance(target, said))
    steps = Levenshtein.opcodes(nearest, said)

    # A replacement beside an insertion or a deletion is one difference to the reader.
    words: list[str] = []
    for is_equal, group in itertools.groupby(steps, lambda step: step.tag == "equal"):
        own = [token for step in group for token in said[step.dest_start : step.dest_end]]
        words += own if is_equal else [f"[{' '.join(own)}]"]
    return " ".join(words)


def _line(string: str) -> str:
    """Return the text as one line that is cut at the width of a terminal."""
    # White space at the beginning is the indentation of this page.
    indent = string[: len(string) - len(string.lstrip(" "))]
    line = indent + safe_text.visible(string.strip().replace("\n", " "))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


# --- what to try next -----------------------------------------------------------------------------


def _next(summary: Summary, within: float, workdir: Path) -> str:
    """Return commands worth trying, each below the reason for it."""
    variant = headline.chosen(summary, within)
    if variant is None:
        return ""
    steps = [*_generate(summary, variant, workdir), *_fewer(summary, variant, workdir)]
    return "\n".join(["next:", *(line for step in steps for line in step)])


def _generate(summary: Summary, variant: Variant, workdir: Path) -> Iterator[tuple[str, str]]:
    """Yield the command that generates with the parent and the network of the sentence."""
    for task in summary.tasks:
        paths = [_checkpoint(summary, v, task, workdir) for v in (variant.parent, variant)]
        found = summary.predictions(variant, task)
        if all(paths) and found:
            inputs = textwrap.shorten(found[0]["inputs"], SHORT, placeholder="")
            arguments = " ".join(shlex.quote(str(argument)) for argument in (*paths, inputs))
            yield (
                f"  your own inputs, said by MHA and by {variant.label}:",
                f"    {_python()} -m gqa generate {arguments}",
            )
            return


def _checkpoint(summary: Summary, variant: Variant, task: str, workdir: Path) -> Path | None:
    """Return the path of the fine-tuned checkpoint that was scored; None if it is not there."""
    key = summary.stage_key(variant, "finetune", task)
    if key is None:
        return None
    folder = StageFolder.of(workdir, "finetune", key)
    try:
        outcome = folder.load_outcome()
    except UserError:  # a damaged folder has no command to show, and is no reason to stop
        return None
    return folder.checkpoints / outcome["checkpoint"] if outcome else None


def _fewer(summary: Summary, variant: Variant, workdir: Path) -> Iterator[tuple[str, str]]:
    """Yield commands for fewer KV heads, and for every number of them."""
    measured = {v.num_kv_heads for v in summary.scored if v.size == variant.size}
    fewer = [k for k in range(1, min(measured)) if variant.num_heads % k == 0]
    where = "" if str(workdir) == DEFAULT_WORKDIR else f" --workdir={shlex.quote(str(workdir))}"
    size = "" if variant.size == DEFAULT_SIZE else variant.size
    if fewer:
        argument = f"kv_heads={fewer[-1]}" + (f",size={size}" if size else "")
        yield (
            f"  {fewer[-1]} KV heads (give the same other flags, to go on from the same parent):",
            f"    {_python()} launch.py --config=configs/gqa.py:{shlex.quote(argument)}{where}",
        )
    if len(measured) < 4:
        argument = f":{shlex.quote(size)}" if size else ""
        yield (
            "  how many KV heads are enough, of all numbers:",
            f"    {_python()} launch.py --config=configs/sweeps/groups.py{argument}{where}",
        )


def _python() -> str:
    """Return the interpreter as a command: its path where it lies in this folder, as .venv does."""
    path, here = Path(sys.executable), Path.cwd()
    return shlex.quote(str(path.relative_to(here))) if path.is_relative_to(here) else "python"
