"""From the source of one Python file to its texts: docstrings, and comments that read like prose.

Source files are parsed with `ast`; nothing is imported or run. Which files are read is decided in
`gqa.data.corpus`, and what tasks make of the texts in `gqa.data.docstring_rows`.
"""

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

NOT_PROSE = re.compile(r"copyright|licen[cs]e|pylint|noqa|mypy|type:|pragma|-\*-|^!", re.IGNORECASE)


class Text(NamedTuple):
    """A docstring, or a block of comments, of a Python file.

    `line` is the line on which it begins. `code` is the source of the function that a docstring
    documents, without the docstring; it is empty for classes, modules and comments.
    """

    line: int
    text: str
    code: str = ""
    is_docstring: bool = False


# The nodes that may have a docstring.
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_texts(source: bytes) -> list[Text]:
    """Return the docstrings and the comments of one Python file, in the order of its lines.

    Raises:
        SyntaxError, ValueError, RecursionError: if `ast` cannot parse the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)

    lines = source.decode("utf-8", errors="replace").splitlines()
    texts: list[Text] = []
    docstring_lines: set[int] = set()  # a line with # in a docstring is no comment
    for node in _definitions(tree):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            string = node.body[0]
            assert string.end_lineno is not None  # the parser sets it for every statement
            docstring_lines.update(range(string.lineno, string.end_lineno + 1))

            # The code that a summary is to be written from must not show the docstring.
            code = ""
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                code_lines = lines[node.lineno - 1 : string.lineno - 1]
                code_lines += lines[string.end_lineno : node.end_lineno]
                code = textwrap.dedent("\n".join(code_lines)).strip()

            texts.append(Text(string.lineno, inspect.cleandoc(docstring), code, True))

    texts += _comments(lines, docstring_lines)
    return sorted(texts)


def _definitions(tree: ast.Module) -> Iterator[_Definition]:
    """Yield the module, its classes and its functions.

    Statements alone are visited, because expressions are most of the nodes and hold no docstring.
    """
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _Definition):
            yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            children = getattr(node, block, ())
            stack += children if isinstance(children, list) else ()


def _comments(lines: Sequence[str], docstring_lines: set[int]) -> Iterator[Text]:
    """Yield the blocks of consecutive comment lines that read like prose."""
    # An empty line behind the last one ends a block with which the file ends.
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        stripped = line.lstrip()
        if stripped.startswith("#") and number not in docstring_lines:
            block.append(stripped.lstrip("#").strip())
        elif block:
            text = " ".join(block).strip()
            # Prose: six words or more, mostly letters, and neither a licence nor a linter's mark.
            letters = sum(c.isalpha() or c.isspace() for c in text)
            if len(text.split()) > 5 and letters > 0.8 * len(text) and not NOT_PROSE.search(text):
                yield Text(number - len(block), text)
            block = []
