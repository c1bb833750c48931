"""Check the values of settings against the types of their fields."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from brfx.errors import ConfigError

#: A pattern, and what it sets (``None``: nothing is quantized there).
Override = tuple[str, dict[str, Any] | None]


def _is(kind: type) -> Callable[[Any], bool]:
    """Whether a value is of this kind; ``True`` is no number."""
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _are(one: Callable[[Any], bool], *counts: int) -> Callable[[Any], bool]:
    """Whether a value is a list or a tuple of what ``one`` accepts, of one of these lengths."""
    return lambda value: (
        isinstance(value, list | tuple) and (not counts or len(value) in counts) and all(map(one, value))
    )


def _is_override(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return isinstance(value[0], str) and isinstance(value[1], Mapping | None)


#: By type: whether a value is of it, and the type in words.
_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (_is(bool), "true or false"),
    int: (_is(Integral), "a whole number"),
    float: (_is(Real), "a number"),
    str: (_is(str), "a string"),
    Path: (_is(Path), "a pathlib.Path"),
    tuple[float, ...]: (_are(_is(Real), 1, 3), "one number or three"),
    tuple[str, ...]: (_are(_is(str)), "a list of strings"),
    tuple[Override, ...]: (_are(_is_override), "a list of (pattern, settings or None)"),
}


@cache
def _types(settings: Hashable) -> dict[str, tuple[Any, bool]]:
    """Of each field of a dataclass its type, and whether ``None`` is accepted too."""
    found = {}
    for name, hint in get_type_hints(settings).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        found[name] = next(kind for kind in kinds if kind is not NoneType), NoneType in kinds
    return found


def check_types(settings: Any) -> None:
    """Check every field of a dataclass.

    Raises:
        ConfigError: a value is not of its field's type; names the first such field.
    """
    types = _types(settings.__class__)
    for declared in fields(settings):
        kind, optional = types[declared.name]
        value = getattr(settings, declared.name)
        if optional and value is None:
            continue
        fits, words = _TYPES.get(kind) or (_is(kind), f"a {kind.__name__}")
        if not fits(value):
            raise ConfigError(f"{declared.name}={shown(value)}: takes {words}{', or None' if optional else ''}")


def shown(value: Any) -> str:
    """Its ``repr``, cut to what fits into one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, tables in tables without end
        return f"({type(value).__name__} too long to show)"
    return text if len(text) <= 200 else text[:200] + " ..."
