"""Rows of a JSON file that is one list of objects, read one element at a time.

The list stands alone, or under `data`. In SQuAD's layout every question is a row. Only one element
is held in memory, because a file of a few kilobytes may decompress to gigabytes of brackets.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from gqa.data import text_lines
from gqa.data.text_lines import WrongText
from gqa.runtime.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()


def read(path: str) -> Iterator[tuple[int, dict | str]]:
    """Yield the numbered elements of a list, or the questions of a file in SQuAD's layout.

    Raises:
        UserError: naming the file, if it is no JSON, or holds neither of the two.
    """
    try:
        rows = (row for item in _Reader(path).elements() for row in _questions(item))
        yield from enumerate(rows, start=1)
    except WrongText as error:
        raise UserError(f"{path}: {error}; if each line is an object, name it .jsonl") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: neither a list of objects nor in SQuAD's layout") from error


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        WrongText: if it is no JSON, is nested too deeply or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise WrongText(f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # the latter: a number of 5000 digits
        raise WrongText("JSON nested too deeply or a number too long") from error


def _questions(item: Any) -> Iterator[dict | str]:
    """Yield an element as a row, or the questions of one of SQuAD's articles."""
    if not isinstance(item, dict):
        yield "not a JSON object with named columns"
    elif "paragraphs" not in item:
        yield item
    else:
        for paragraph in item["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"context": paragraph["context"], **question}


class _Reader:
    """The text of a file, of which as much is held as the element that is read needs."""

    def __init__(self, path: str):
        self._chunks = text_lines.chunks(path)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._place = 0
        self._is_complete = False

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the list.

        Raises:
            WrongText: if the text is no JSON, or an element is longer than LONGEST.
            KeyError: if there is no list.
        """
        # The list itself, an object with the list under `data`, or neither. The latter is read too,
        # so that an error in its JSON is reported as such.
        lists = 0
        if self._peek() == "[":
            yield from self._list()
            lists += 1
        elif self._peek() == "{":
            for key in self._members():
                if key == "data" and self._peek() == "[":
                    yield from self._list()
                    lists += 1
                else:
                    self._value()  # of another key, which is dropped
        else:
            self._value()

        if self._peek():
            raise WrongText("not JSON: Extra data behind the first value")

        if not lists:
            raise KeyError("data")

    def _list(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        yield self._value()
        while self._peek() == ",":
            self._expect(",")
            yield self._value()
        self._expect("]")

    def _members(self) -> Iterator[str]:
        """Yield the keys of an object; whoever takes a key reads its value before the next."""
        self._expect("{")
        if self._peek() == "}":
            self._expect("}")
            return
        while True:
            if self._peek() != '"':
                raise WrongText("not JSON: a key must be a text in double quotes")
            key = self._value()
            self._expect(":")
            yield key
            if self._peek() != ",":
                break
            self._expect(",")
        self._expect("}")

    def _value(self) -> Any:
        """Read one value; more of the file is read until it is whole."""
        self._peek()
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._place)
            except RecursionError as error:
                raise WrongText("JSON nested too deeply or a number too long") from error
            except json.JSONDecodeError as error:
                # Before the end of the file, an error may only mean that the value is not whole
                # yet.
                if self._is_complete:
                    rest = self._text[error.pos : error.pos + 20]
                    raise WrongText(f"not JSON: {error.msg} at {rest!r}") from error
            except ValueError as error:  # a number of more than 4300 digits
                raise WrongText("JSON nested too deeply or a number too long") from error
            else:
                # A number may go on in what has not been read yet.
                if end < len(self._text) or self._is_complete:
                    self._place = end
                    return value
            self._read_more()

    def _read_more(self) -> None:
        """Double what is held of the element, so that a long one is not parsed too often."""
        self._text = self._text[self._place :]
        self._place = 0
        if len(self._text) > text_lines.LONGEST:
            raise WrongText(f"an element is longer than {text_lines.LONGEST} bytes or no JSON")

        pieces, size = [self._text], 0
        while size <= len(self._text):
            chunk = next(self._chunks, b"")
            try:
                # The decoder keeps the first bytes of a character that two chunks share.
                pieces.append(self._decode(chunk, final=not chunk))
            except UnicodeDecodeError as error:
                raise WrongText("not UTF-8 text") from error
            size += len(chunk)
            if not chunk:
                self._is_complete = True
                break
        self._text = "".join(pieces)

    def _peek(self) -> str:
        """Return the next character that is no white space; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None  # it matches nothing, too
            self._place = match.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if self._is_complete:
                return ""
            self._read_more()

    def _expect(self, character: str) -> None:
        if self._peek() != character:
            rest = self._text[self._place : self._place + 20]
            raise WrongText(f"not JSON: {character!r} expected at {rest!r}")
        self._place += 1
