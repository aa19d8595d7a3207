"""Frozen dataclasses as JSON, and back with every key and type checked.

Settings, a stage's description, its outcome and the description of a checkpoint's network are all
dataclasses of this package that are kept on disk as JSON.
"""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from gqa.runtime.errors import UserError

T = TypeVar("T")


def to_json(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, and of dataclasses in it, as dicts that JSON can hold."""
    return dataclasses.asdict(value)


def from_json(kind: type[T], values: Any, name: str) -> T:
    """Make a dataclass of type `kind` from a dict that `to_json` returned and a file kept.

    Args:
        name: the name of `values` in an error message, e.g. "config.recipe".

    Raises:
        UserError: naming the first key that is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise _wrong_type(name, values, dict)

    # All keys in alphabetical order, so that the first wrong one is the same in every run.
    field_types = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in sorted({*values, *names}):
        if key not in names:
            raise UserError(f"{name}.{key} is unknown")
        if key not in values:
            raise UserError(f"{name}.{key} is missing")

    fields = {key: _read(field_types[key], values[key], f"{name}.{key}") for key in names}
    return kind(**fields)


def _read(kind: Any, value: Any, name: str) -> Any:
    """Return `value` as an instance of `kind`: JSON has lists for tuples, dicts for dataclasses."""
    # Of a union, such as Config | None, take the type that the value has. If the value has none of
    # them, the whole union stays for the error message.
    if isinstance(kind, types.UnionType):
        kind = next((k for k in typing.get_args(kind) if _is_a(value, k)), kind)
    if not _is_a(value, kind):
        raise _wrong_type(name, value, kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_json(kind, value, name)

    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_read(arguments[0], x, f"{name}[{i}]") for i, x in enumerate(value))
    if origin is list:
        return [_read(arguments[0], x, f"{name}[{i}]") for i, x in enumerate(value)]
    if origin is dict:
        return {key: _read(arguments[1], x, f"{name}.{key}") for key, x in value.items()}
    return value


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether JSON's `value` can stand for a `kind`, without looking into its elements."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(kind))
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)

    origin = typing.get_origin(kind) or kind
    if origin is tuple:  # of any length and of one type: no other is needed
        origin = (list, tuple)
    # A user may set a fraction to 1, which JSON keeps as an integer.
    if origin is float:
        origin = (int, float)
    # Python counts True as the integer 1; a file that says so is wrong.
    return isinstance(value, origin) and (kind is bool or not isinstance(value, bool))


def _wrong_type(name: str, value: Any, kind: Any) -> UserError:
    type_name = kind.__name__ if isinstance(kind, type) else str(kind)
    return UserError(f"{name} is {value!r:.40} instead of a value of type {type_name}")
