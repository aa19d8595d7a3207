"""From the docstrings and comments of one Python file to rows of the corpus tasks.

The rows are summaries, questions about parameters, and text for pretraining. The texts come from
`gqa.data.python_texts`; `gqa.data.corpus` writes the rows, and the modules of `gqa.data.tasks` make
examples of them.
"""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gqa.data.python_texts import Text

SUMMARY_WORDS = range(3, 31)
ANSWER_WORDS = range(3, 41)
MIN_BODY_WORDS = 20
MIN_CODE_LINES = 3
MAX_SOURCE = 4000  # characters, more than any inputs length used here reads

# Entries have the parameter's name as group 1 and its description on that line as group 2.
GOOGLE_HEADER = re.compile(r"\s*(?:Args|Arguments|Parameters|Params):\s*$")
GOOGLE_ENTRY = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\(.*?\))?:(?:\s+(.*)|$)")
NUMPY_HEADER = re.compile(r"\s*(?:Other )?Parameters\s*$")
NUMPY_ENTRY = re.compile(r"\s*\*{0,2}(\w+)\s*(?::.*)?()$")
SPHINX_ENTRY = re.compile(r"\s*:param\s+(?:[^:]*\s)?\*{0,2}(\w+):\s*(.*)")
UNDERLINE = re.compile(r"\s*-{3,}\s*$")


def module_rows(texts: Sequence[Text]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (task, row) for every row that the texts of one Python file give.

    The tasks and the keys of their rows are documented in `gqa.data.corpus.TASKS`.
    """
    if texts:
        yield "docstrings", {"text": "\n\n".join(text.text for text in texts)}

    # Comments are text for pretraining, but nothing asks for a summary or a parameter of one.
    for text in texts:
        if not text.is_docstring:
            continue

        # The summary of a docstring is its first paragraph, if it is short enough and prose.
        paragraph, _, body = text.text.partition("\n\n")
        summary, body = " ".join(paragraph.split()), textwrap.dedent(body).strip()
        if len(summary.split()) in SUMMARY_WORDS and summary[0].isalpha():
            if len(body.split()) >= MIN_BODY_WORDS:
                row = {"source": body[:MAX_SOURCE], "summary": summary}
                yield "docstring_summary", row

            # Classes and modules have no code here, so they count as one line.
            if text.code.count("\n") + 1 >= MIN_CODE_LINES:
                yield "code_summary", {"source": text.code[:MAX_SOURCE], "summary": summary}

        context = " ".join(text.text.split())
        for parameter in _parameters(text.text.splitlines()):
            yield "parameter_qa", {**parameter._asdict(), "context": context}


class Parameter(NamedTuple):
    """A parameter that a docstring describes.

    `answer` is the first paragraph of its description. The entry takes the words `begin` to `end`
    (exclusive) of the docstring.
    """

    parameter: str
    answer: str
    begin: int
    end: int


def _parameters(lines: Sequence[str]) -> list[Parameter]:
    """Return the parameters that a docstring describes in Google, NumPy or Sphinx style."""
    # Number of words before each line: lines of 3 and 2 words give 0, 3, 5.
    words = [0, *itertools.accumulate(len(line.split()) for line in lines)]
    parameters: dict[str, Parameter] = {}
    for name, first, last, inline in _entries(lines):
        answer = " ".join([inline, *(line.strip() for line in lines[first + 1 : last])]).strip()

        # The first description of a name counts, if it reads like prose.
        prose = len(answer.split()) in ANSWER_WORDS and any(c.isalpha() for c in answer)
        if prose and name not in parameters:
            description = " ".join(answer.split())
            parameters[name] = Parameter(name, description, words[first], words[last])
    return list(parameters.values())


def _entries(lines: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, line, line after the first paragraph, description on the line of the name).

    Sphinx marks every entry by itself. In Google and NumPy style, a header opens a section, and the
    entries are the lines with the section's indent.
    """
    entry, base = None, 0  # pattern and indent of the entries of the open section, if one is
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if match := SPHINX_ENTRY.match(line):
            yield match[1], i, _paragraph_end(lines, i), match[2]
        elif NUMPY_HEADER.match(line) and UNDERLINE.match(following):
            # NumPy's entries have the indent of their header, Google's a deeper one.
            entry, base = NUMPY_ENTRY, _indent(line)
        elif GOOGLE_HEADER.match(line):
            entry, base = GOOGLE_ENTRY, max(_indent(following), _indent(line) + 1)
        elif entry and line.strip():
            # The title of the next section, or a line to the left of the entries, ends the section.
            if UNDERLINE.match(following) or _indent(line) < base:
                entry = None
            elif _indent(line) == base and (match := entry.match(line)):
                yield match[1], i, _paragraph_end(lines, i), match[2] or ""


def _paragraph_end(lines: Sequence[str], start: int) -> int:
    """Return the number of the first line that does not continue line `start`.

    A line continues it if it is not blank and has a deeper indent.
    """
    end = start + 1
    while end < len(lines) and lines[end].strip() and _indent(lines[end]) > _indent(lines[start]):
        end += 1
    return end


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
