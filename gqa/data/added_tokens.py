"""The special and added tokens of a Hugging Face folder, from the files beside its vocabulary.

`tokenizer.json` and `tokenizer_config.json` list tokens with their ids; older folders have
`added_tokens.json` and `special_tokens_map.json`. Files that contradict each other are refused. The
vocabulary itself is read in `gqa.data.tokenizer`.
"""

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa.model.special_tokens import SpecialTokens
from gqa.runtime import regular_files
from gqa.runtime.errors import UserError

SENTINEL = re.compile(r"<extra_id_(\d+)>")
MOST_BYTES = 1 << 28  # of a tokenizer.json; those of the largest vocabularies have 35 MB


class AddedTokens(NamedTuple):
    """The tokens that the files of a folder describe; the defaults are T5's.

    Attributes:
        pad, eos, unknown: the texts of these tokens.
        ids: the id of each token that a file gives an id, by its text.
        plain: those of `ids` that are words like any other, and not special.
        extra_ids: how many sentinels there are, where `ids` has none.
        tokenizer_class: Transformers' class, "" if no file says so.
    """

    pad: str = "<pad>"
    eos: str = "</s>"
    unknown: str = "<unk>"
    ids: Mapping[str, int] = types.MappingProxyType({})
    plain: frozenset[str] = frozenset()
    extra_ids: int = 100
    tokenizer_class: str = ""


T5 = AddedTokens()


class Tokens(NamedTuple):
    """The ids of a vocabulary that are not cut out of a text, but recognised in it.

    Attributes:
        ids: every such token by its text.
        plain: those that are words like any other, and not special.
        special: padding and the end of a text; texts start with padding, as in T5.
        unknown: the id of what no piece stands for.
        sentinels: the ids that span corruption puts in the place of spans, the first one first.
    """

    ids: dict[str, int]
    plain: frozenset[str]
    special: SpecialTokens
    unknown: int
    sentinels: np.ndarray


def sentinels(ids: Mapping[str, int]) -> np.ndarray:
    """Return the ids of `<extra_id_0>`, `<extra_id_1>`, ... as far as there are."""
    found: list[int] = []
    while (token := ids.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(token)
    return np.array(found, np.int32)


def read(folder: Path) -> AddedTokens:
    """Return what the files of a folder say; a folder with none of them has T5's tokens.

    Raises:
        UserError: naming the file whose content is none that Transformers writes.
    """
    config = _read_json(folder / "tokenizer_config.json")
    names = _read_json(folder / "special_tokens_map.json") | config

    ids: dict[str, int] = {}
    plain: set[str] = set()
    for path, tokens in _lists(folder, config):
        for token, number, is_special in tokens:
            if not isinstance(token, str) or not token or type(number) is not int or number < 0:
                raise UserError(f"{path}: {token!r:.40} with id {number!r:.40} is no token")
            if ids.setdefault(token, number) != number:
                raise UserError(f"{path}: {token} has id {number}, another file says {ids[token]}")
            if not is_special:
                plain.add(token)

    # A token that any file calls special is special.
    texts = {kind: _text(names.get(f"{kind}_token")) for kind in ("pad", "eos", "unk")}
    special = {*filter(None, texts.values()), *_special(names)}
    plain -= special | {token for token in plain if SENTINEL.fullmatch(token)}

    extra_ids = config.get("extra_ids", T5.extra_ids)
    if type(extra_ids) is not int or not 0 <= extra_ids < 1 << 20:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: extra_ids={extra_ids!r:.40} is no count"
        )
    return AddedTokens(
        texts["pad"] or T5.pad,
        texts["eos"] or T5.eos,
        texts["unk"] or T5.unknown,
        ids,
        frozenset(plain),
        extra_ids,
        str(config.get("tokenizer_class") or "").removesuffix("Fast"),
    )


def _lists(folder: Path, config: dict) -> list[tuple[Path, list[tuple[Any, Any, bool]]]]:
    """Return the tokens of each file as (text, id, whether it is special)."""
    fast = _read_json(folder / "tokenizer.json").get("added_tokens") or []
    decoder = config.get("added_tokens_decoder") or {}
    old = _read_json(folder / "added_tokens.json")
    if not isinstance(fast, list) or not isinstance(decoder, dict):
        raise UserError(f"{folder}: the added tokens of its tokenizer are no list")
    return [
        (folder / "tokenizer.json", [_entry(x, "id") for x in fast]),
        (
            folder / "tokenizer_config.json",
            [_entry(x, "id", int(i) if i.isdecimal() else i) for i, x in decoder.items()],
        ),
        (folder / "added_tokens.json", [(token, i, False) for token, i in old.items()]),
    ]


def _entry(token: Any, key: str, number: Any = None) -> tuple[Any, Any, bool]:
    token = token if isinstance(token, dict) else {}
    return token.get("content"), token.get(key, number), token.get("special") is True


def _special(names: dict) -> list[str]:
    """Return the further special tokens that a file lists, under its old or its new key."""
    tokens: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = names.get(key)
        tokens += value if isinstance(value, list) else list((value or {}).values())
    return [text for text in map(_text, tokens) if text]


def _text(token: Any) -> str:
    """Return the text of a token, which a file may keep as an object with settings."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    content = regular_files.read_json(path, MOST_BYTES)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
