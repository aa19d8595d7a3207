"""Make text from outside safe to show: predictions, data, and names of runs, tasks and networks.

`visible` is for every text that is shown: in Markdown, in HTML, on a terminal and in a figure.
`markdown` is for text that stands inside Markdown; HTML is rendered from that Markdown, and the
renderer escapes it (`html_page.py`).
"""

import re
import unicodedata

# General categories of characters that nobody sees but that change what is seen: control codes
# (of terminals too), formats (overrides of the direction, zero widths, tags), surrogates,
# characters without a meaning, and separators of lines and paragraphs.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
# Joiners inside words: Persian, Hindi and emoji need them.
_JOINERS = frozenset("\u200c\u200d")
# The brackets of an interval, such as `[1.5, 2.0]`, stay as they are, because people read the
# source too; they are no link without an address after them.
_SPECIAL = re.compile(r"([\\`*<>|!#&~$]|\[(?![-+\d.]+, [-+\d.]+\](?![(\[:])))")
_EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # `_` inside a word means nothing
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto)(?=:)|\b(www)(?=\.)")


def visible(text: str) -> str:
    """Write hidden characters as their numbers, such as `<U+202E>`; keep the ends of lines."""
    # Nearly every text is such, and needs no look at each character.
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\n" or character in _JOINERS:
        return character
    if unicodedata.category(character) in _HIDDEN:
        return f"<U+{ord(character):04X}>"
    return character


def markdown(text: str) -> str:
    """Return the text as one line that Markdown shows as it is: no markup, no HTML, no link."""
    # A line end could begin a heading, a list or a new row of a table, so white space is collapsed
    # first.
    text = visible(" ".join(text.split()))
    text = _EDGE_UNDERSCORE.sub(r"\\_", _SPECIAL.sub(r"\\\1", text))
    # Viewers make links of bare addresses; a character reference shows the letter and is no link.
    return _LINK.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", text)
