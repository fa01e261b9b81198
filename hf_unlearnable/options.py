"""Command-line flags from dataclass fields."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection
from typing import Any


def add_fields(
    parser: argparse._ActionsContainer, cls: type, *, skip: Collection[str] = (), defaults: Any = None
) -> None:
    """One flag for every field of a dataclass: `kernel_size: int | None` becomes `--kernel-size INT`.

    Plain values, literals, and tuples of them (several values after one flag) are understood; other fields have none.
    The help tells the fields' own defaults, or those of `defaults`, a value of the class.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        described = None if field.name in skip or not field.init else _describe(hints[field.name])
        if described is not None:
            flag = "--" + field.name.replace("_", "-")
            told = _default(field) if defaults is None else f"default: {getattr(defaults, field.name)}"
            parser.add_argument(flag, default=argparse.SUPPRESS, help=told, **described)


def given(arguments: argparse.Namespace, cls: type, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that the command line gave."""
    names = {field.name for field in dataclasses.fields(cls)} - set(skip)
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return f"default: {field.default}"


def _describe(hint: Any) -> dict[str, Any] | None:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _describe(parts[0]) if len(parts) == 1 else None
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        inner = _describe(typing.get_args(hint)[0])
        return None if inner is None else {**inner, "nargs": "+"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint in (int, float, str):
        return {"type": hint, "metavar": hint.__name__.upper()}
    return None
