"""A text corpus from the Python packages that are already installed.

Docstrings and comments are read with `ast`, nothing is imported and nothing downloaded. Whole
packages are held out for validation and test: a random split of rows would leak, because one
package describes the same parameter in many places.
"""

import ast
import dataclasses
import gc
import gzip
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import pathlib
import re
import textwrap
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gqa.runtime import atomic_files
from gqa.runtime.errors import UserError

FORMAT = 1  # part of what makes a cache valid: raise it when the extraction changes
TASKS = ("docstrings", "parameter_qa", "docstring_summary", "code_summary")
SPLITS = ("train", "validation", "test")
TEXT_FIELDS = {"text", "source", "summary", "context", "answer"}
# Held-out projects, all their distributions together; every other package is for training.
HELD_OUT = {"test": ("flax", "rich"), "validation": ("optax", "fsspec")}

SUMMARY_WORDS = range(3, 31)
ANSWER_WORDS = range(3, 41)
MIN_BODY_WORDS = 20
MIN_CODE_LINES = 3
MAX_SOURCE = 4000  # characters, more than any inputs length used here reads
NGRAM = 8
NEAR_DUPLICATE = 0.5  # of the n-grams were seen before

TEST_MODULE = re.compile(r"(^|[/_])(tests?|testing|testdata|conftest)([/_.]|$)")
NOT_PROSE = re.compile(r"copyright|licen[cs]e|pylint|noqa|mypy|type:|pragma|-\*-|^!", re.IGNORECASE)
GOOGLE_HEADER = re.compile(r"\s*(?:Args|Arguments|Parameters|Params):\s*$")
GOOGLE_ENTRY = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\(.*?\))?:(?:\s+(.*)|$)")
NUMPY_HEADER = re.compile(r"\s*(?:Other )?Parameters\s*$")
NUMPY_ENTRY = re.compile(r"\s*\*{0,2}(\w+)\s*(?::.*)?()$")
SPHINX_ENTRY = re.compile(r"\s*:param\s+(?:[^:]*\s)?\*{0,2}(\w+):\s*(.*)")
UNDERLINE = re.compile(r"\s*-{3,}\s*$")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A built corpus on disk.

    `manifest` has, per package, its version, sha256 over the files read and split; the counts of
    rows and words per task and split; and `sha256`, the hash of every row.
    """

    folder: pathlib.Path
    manifest: dict

    def rows(self, task: str, split: str) -> list[dict]:
        """Rows of one task (see `TASKS`) in a fixed order.

        Raises:
            UserError: naming a file that was damaged after `build`, which would have noticed.
        """
        return [json.loads(line) for line in _lines(self.folder, task, split).splitlines()]


def build(folder: str | os.PathLike, packages: Sequence[str]) -> Corpus:
    """Extract the corpus of installed distributions into `folder`, or `find` it there."""
    found = find(folder, packages)
    return found or Corpus(
        pathlib.Path(folder), _extract(pathlib.Path(folder), distributions(packages))
    )


def find(folder: str | os.PathLike, packages: Sequence[str]) -> Corpus | None:
    """The corpus in `folder` if it is whole and of the same packages at the same versions."""
    folder = pathlib.Path(folder)
    installed = distributions(packages).items()
    versions = {name: distribution.version for name, distribution in installed}
    manifest = _read_manifest(folder / "manifest.json", versions)
    whole = manifest is not None and _is_whole(folder, manifest)
    return Corpus(folder, manifest) if whole else None


def distributions(packages: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by canonical name (PEP 503), sorted.

    Raises:
        UserError: for one that is not installed, or none that is held out for a split.
    """
    found = {}
    for name in packages:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"corpus packages: {name!r} is not installed: pip install it"
            ) from error
        found[re.sub(r"[-_.]+", "-", name).lower()] = distribution
    for split, held_out in HELD_OUT.items():
        if not set(held_out) & set(found):
            raise UserError(f"corpus packages give no {split} text: add {' or '.join(held_out)}")
    return dict(sorted(found.items()))


def _read_manifest(path: pathlib.Path, versions: dict[str, str]) -> dict | None:
    """The manifest, or None if it is of something else, is damaged or is not there."""
    try:
        manifest = json.loads(path.read_bytes())
        same = {name: p["version"] for name, p in manifest["packages"].items()} == versions
        return manifest if same and manifest["format"] == FORMAT else None
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_whole(folder: pathlib.Path, manifest: dict) -> bool:
    """Whether the rows are those that the manifest was written for."""
    digest = hashlib.sha256()
    try:
        for task, split in itertools.product(TASKS, SPLITS):
            digest.update(_lines(folder, task, split))
    except UserError:
        return False
    return digest.hexdigest() == manifest.get("sha256")


def _lines(folder: pathlib.Path, task: str, split: str) -> bytes:
    """The rows of one file as JSON lines."""
    path = folder / f"{task}-{split}.jsonl.gz"
    try:
        return gzip.decompress(path.read_bytes())
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged; run again to have it made again") from error


def _split(package: str) -> str:
    return next((split for split, names in HELD_OUT.items() if package in names), "train")


def _extract(folder: pathlib.Path, distributions: dict) -> dict:
    """Read every package; write rows, then the manifest, which is what makes them valid."""
    packages, unreadable, dropped = {}, [], Counter()
    rows = {task: defaultdict(list) for task in TASKS}
    seen_text, seen_code = Seen(), Seen()
    # Held-out packages go first, so that of two near duplicates the training one is dropped.
    order = [*itertools.chain(*HELD_OUT.values()), *distributions]
    gc.disable()  # walking the live ast nodes again and again adds half to the time
    try:
        for name in dict.fromkeys(name for name in order if name in distributions):
            sources, digest = _sources(distributions[name])
            version, split = distributions[name].version, _split(name)
            packages[name] = {"version": version, "split": split, "sha256": digest}
            for path, source in sources:
                try:
                    texts = _texts(source)
                except (SyntaxError, ValueError, RecursionError):
                    unreadable.append(path)
                    continue
                for task, row in _rows(list(_novel(texts, seen_text, seen_code, dropped))):
                    rows[task][split].append({"package": name, **row})
    finally:
        gc.enable()
    manifest = {"format": FORMAT, "packages": dict(sorted(packages.items()))}
    manifest |= {"unreadable": unreadable, "duplicates": dict(sorted(dropped.items()))}
    return _write(folder, rows, manifest)


def _write(folder: pathlib.Path, rows: dict, manifest: dict) -> dict:
    """Write each task and split as JSONL, then the manifest with their counts and hash."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # of other versions, whose rows go now
    digest = hashlib.sha256()
    counts = {task: {} for task in TASKS}
    for task, split in itertools.product(TASKS, SPLITS):
        part = rows[task][split]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part).encode()
        digest.update(lines)
        atomic_files.write(folder / f"{task}-{split}.jsonl.gz", gzip.compress(lines, 6, mtime=0))
        words = sum(len(row[key].split()) for row in part for key in row.keys() & TEXT_FIELDS)
        counts[task][split] = {"rows": len(part), "words": words}
    manifest |= {"counts": counts, "sha256": digest.hexdigest()}
    atomic_files.write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


# --- files to texts -------------------------------------------------------------------------------


class Text(NamedTuple):
    """A docstring or a block of comments; `code` is the function it documents, without it."""

    line: int
    text: str
    code: str = ""
    is_docstring: bool = False


def _sources(distribution: importlib.metadata.Distribution) -> tuple[list, str]:
    """Its Python files but tests as (path, bytes), and the sha256 over them."""
    sources, digest = [], hashlib.sha256()
    if distribution.files is None:
        name = distribution.metadata["Name"]
        raise UserError(f"corpus package {name!r} has no list of its files: reinstall it with pip")
    for file in sorted(distribution.files, key=str):
        path, location = file.as_posix(), pathlib.Path(distribution.locate_file(file))
        test = TEST_MODULE.search(path)
        if file.suffix != ".py" or path.startswith("..") or test or not location.is_file():
            continue
        source = location.read_bytes()
        digest.update(f"{path}\n{len(source)}\n".encode() + source)
        sources.append((path, source))
    return sources, digest.hexdigest()


def _texts(source: bytes) -> list[Text]:
    """Docstrings and comment blocks of one module in the order they stand in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    lines = source.decode("utf-8", errors="replace").splitlines()
    texts, inside = [], set()
    for node in _definitions(tree):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            string = node.body[0]
            inside.update(range(string.lineno, string.end_lineno + 1))
            code = ""
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kept = lines[node.lineno - 1 : string.lineno - 1]
                kept += lines[string.end_lineno : node.end_lineno]
                code = textwrap.dedent("\n".join(kept)).strip()
            texts.append(Text(string.lineno, inspect.cleandoc(docstring), code, True))
    texts += _comments(lines, inside)
    return sorted(texts)


def _definitions(tree: ast.AST) -> Iterator[ast.AST]:
    """The module, its classes and functions; visits statements only, not expressions."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for block in ("body", "orelse", "finalbody", "handlers"):
            children = getattr(node, block, ())
            stack += children if isinstance(children, list) else ()


def _comments(lines: Sequence[str], inside: set[int]) -> Iterator[Text]:
    """Blocks of whole-line comments that read as prose; `inside` are lines of docstrings."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        stripped = line.lstrip()
        if stripped.startswith("#") and number not in inside:
            block.append(stripped.lstrip("#").strip())
        elif block:
            text = " ".join(block).strip()
            letters = sum(c.isalpha() or c.isspace() for c in text)
            if len(text.split()) > 5 and letters > 0.8 * len(text) and not NOT_PROSE.search(text):
                yield Text(number - len(block), text)
            block = []


# --- duplicates -----------------------------------------------------------------------------------


class Seen:
    """Texts and 8-grams that went by, to name what a new text repeats."""

    def __init__(self):
        self._texts: set[str] = set()
        self._ngrams: set[int] = set()

    def repeats(self, text: str) -> str:
        """`exact`, `near` (over half of its 8-grams were seen) or nothing; then remember it."""
        words = text.split()
        joined = " ".join(words)
        if joined in self._texts:
            return "exact"
        self._texts.add(joined)
        ngrams = {
            zlib.crc32(" ".join(words[i : i + NGRAM]).encode("utf-8", "replace"))
            for i in range(len(words) - NGRAM + 1)
        }
        seen = len(ngrams & self._ngrams)
        if ngrams and seen > NEAR_DUPLICATE * len(ngrams):
            return "near"
        self._ngrams |= ngrams
        return ""


def _novel(
    texts: Iterable[Text], seen_text: Seen, seen_code: Seen, dropped: Counter
) -> Iterator[Text]:
    """Texts that are no duplicate; one whose code alone is known loses the code."""
    for text in texts:
        repeated = seen_text.repeats(text.text)
        if repeated:
            dropped[f"{repeated} text"] += 1
            continue
        repeated = text.code and seen_code.repeats(text.code)
        if repeated:
            dropped[f"{repeated} code"] += 1
        yield text._replace(code="") if repeated else text


# --- texts to rows --------------------------------------------------------------------------------


def _rows(texts: Sequence[Text]) -> Iterator[tuple[str, dict]]:
    """Rows of every task from the texts of one module, as (task, row)."""
    if texts:
        yield "docstrings", {"text": "\n\n".join(text.text for text in texts)}
    for text in texts:
        if not text.is_docstring:
            continue
        paragraph, _, body = text.text.partition("\n\n")
        summary, body = " ".join(paragraph.split()), textwrap.dedent(body).strip()
        if len(summary.split()) in SUMMARY_WORDS and summary[0].isalpha():
            if len(body.split()) >= MIN_BODY_WORDS:
                row = {"source": body[:MAX_SOURCE], "summary": summary}
                yield "docstring_summary", row
            if text.code.count("\n") + 1 >= MIN_CODE_LINES:
                yield "code_summary", {"source": text.code[:MAX_SOURCE], "summary": summary}
        for parameter, answer, begin, end in _parameters(text.text.splitlines()):
            context = " ".join(text.text.split())
            row = {"parameter": parameter, "answer": answer, "begin": begin, "end": end}
            yield "parameter_qa", {**row, "context": context}


def _parameters(lines: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Parameters a docstring describes, in Google, NumPy or Sphinx style.

    Each is (name, first paragraph of the description, begin, end), the last two the words of the
    docstring that the entry takes.
    """
    words = [0, *itertools.accumulate(len(line.split()) for line in lines)]
    found = {}
    for name, first, last, inline in _entries(lines):
        answer = " ".join([inline, *(line.strip() for line in lines[first + 1 : last])]).strip()
        prose = len(answer.split()) in ANSWER_WORDS and any(c.isalpha() for c in answer)
        if prose and name not in found:
            found[name] = (name, " ".join(answer.split()), words[first], words[last])
    return list(found.values())


def _entries(lines: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    """(name, line, line after its first paragraph, description on the entry's own line)."""
    entry, base = None, 0  # how an entry of the open section looks, and its indent
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if match := SPHINX_ENTRY.match(line):
            yield match[1], i, _paragraph_end(lines, i), match[2]
        elif NUMPY_HEADER.match(line) and UNDERLINE.match(following):
            entry, base = NUMPY_ENTRY, _indent(line)
        elif GOOGLE_HEADER.match(line):
            entry, base = GOOGLE_ENTRY, max(_indent(following), _indent(line) + 1)
        elif entry and line.strip():
            if UNDERLINE.match(following) or _indent(line) < base:
                entry = None
            elif _indent(line) == base and (match := entry.match(line)):
                yield match[1], i, _paragraph_end(lines, i), match[2] or ""


def _paragraph_end(lines: Sequence[str], start: int) -> int:
    """The line after those that continue `start`: not blank, and deeper."""
    end = start + 1
    while end < len(lines) and lines[end].strip() and _indent(lines[end]) > _indent(lines[start]):
        end += 1
    return end


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
