"""The user's own text: JSONL or TSV files (also .gz) with a source and a target column.

A JSONL target may be a list of references. TSV has a header line and no quoting.
"""

import collections
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

from gqa.errors import UserError
from gqa.tasks import SPLITS, Example

METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "f1")
HEADLINE = "rougeL"
FORMATS = (".jsonl", ".tsv", ".jsonl.gz", ".tsv.gz")


def load(
    split: str,
    *,
    corpus=None,
    source: str,
    target: str,
    train: str = "",
    validation: str = "",
    test: str = "",
    prefix: str = "",
    metrics: tuple[str, ...] = METRICS,
) -> list[Example]:
    """Examples of one split from its file: `prefix` + column `source` -> column `target`."""
    del corpus, metrics  # for the tasks that read the corpus; for whoever scores
    path = {"train": train, "validation": validation, "test": test}[split]
    if not path:
        raise UserError(f"task files needs {split}=PATH here")
    return list(_examples(path, source, target, prefix))


def check(*, source: str = "", target: str = "", metrics=METRICS, **options) -> None:
    """Refuse wrong paths, columns or metrics, and any bad row, by reading every file given."""
    if not (source and target and options.get("train")):
        raise UserError("task files needs train=PATH and the columns source=NAME and target=NAME")
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metrics={name!r} is unknown; choose from {', '.join(METRICS)}")
    for path in dict.fromkeys(options.get(split) for split in SPLITS):
        for _ in _examples(path, source, target, "") if path else ():
            pass
    if not options.get("validation"):
        raise UserError("task files needs validation=PATH to choose a checkpoint by")


def _examples(path: str, source: str, target: str, prefix: str) -> Iterator[Example]:
    """Rows of one file; one that does not read as asked is named by its line."""
    rows = _jsonl(path) if ".jsonl" in pathlib.Path(path).suffixes else _tsv(path)
    empty = True
    for where, row in rows:
        for column in (source, target):
            if column not in row:
                raise UserError(f"{where}: no column {column!r}; this row has {', '.join(row)}")
        references = row[target] if isinstance(row[target], list) else [row[target]]
        if not references or not all(map(_is_text, (row[source], *references))):
            raise UserError(
                f"{where}: {source!r} must be text and {target!r} text or a list of "
                "texts, none empty"
            )
        empty = False
        yield Example(prefix + row[source], tuple(references))
    if empty:
        raise UserError(f"{path}: no rows")


def _is_text(value) -> bool:
    """Whether it is a string with something in it that UTF-8 can write, unlike half a surrogate."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _jsonl(path: str) -> Iterator[tuple[str, dict]]:
    for where, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except (RecursionError, ValueError) as error:  # the latter: a number of 5000 digits
            raise UserError(f"{where}: JSON nested too deeply or a number too long") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object with named columns")
        yield where, row


def _tsv(path: str) -> Iterator[tuple[str, dict]]:
    lines = _lines(path)
    where, header = next(lines, ("", ""))
    columns = header.split("\t")
    name, times = collections.Counter(columns).most_common(1)[0]
    if times > 1:
        raise UserError(f"{where}: the header has {times} columns {name!r}")
    for where, line in lines:
        values = line.split("\t")
        if len(values) != len(columns):
            raise UserError(f"{where}: {len(values)} columns, the header has {len(columns)}")
        yield where, dict(zip(columns, values, strict=True))


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its `path:line`; of tabs alone is a row of nothings."""
    if not str(path).endswith(FORMATS):
        raise UserError(f"{path}: file name must end in {', '.join(FORMATS)}")
    open_file = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        # It is read several times, and opening a pipe would wait for its writer.
        if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
            raise UserError(f"{path}: not a file")
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip(" "):
                    yield f"{path}:{number}", text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: not a whole gzip file from here on") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
