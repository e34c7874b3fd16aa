"""Bounds beside the defaults: `Annotated[int, Range(ge=1)]`, and the one walker that checks them."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from mcdi_fast.errors import McdiError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be. Infinity and NaN never are."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the value is in it."""
        pairs = ((self.ge, operator.ge), (self.gt, operator.gt), (self.le, operator.le), (self.lt, operator.lt))
        return math.isfinite(value) and all(bound is None or inside(value, bound) for bound, inside in pairs)

    def __str__(self) -> str:
        """For a message: 'at least 1', 'a positive number', '0 to 1', '0 or more, below 1'."""
        low = "" if self.ge is None else "0 or more" if self.ge == 0 else f"at least {self.ge}"
        if self.gt is not None:
            low = "a positive number" if self.gt == 0 else f"above {self.gt}"
        if self.ge is not None and self.le is not None:
            return f"{self.ge} to {self.le}"
        high = f"at most {self.le}" if self.le is not None else f"below {self.lt}" if self.lt is not None else ""
        return ", ".join(filter(None, (low, high))) or "a finite number"


ANY = Range()


def check(config: Config, prefix: str = "--") -> Config:
    """The configuration (a dataclass) with plain Python numbers, if every value has the declared type and lies within its bounds.

    NumPy's numbers are taken; a float for an int is not. Nested dataclasses are walked.

    Raises:
        McdiError: naming the option, the value and what was expected.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    found = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name = f"{prefix}{field.name.replace('_', '-')}" if prefix.startswith("--") else f"{prefix}{field.name}"
        found[field.name] = _value(getattr(config, field.name), hints[field.name], name)
    return dataclasses.replace(config, **found)  # type: ignore[type-var]


def _value(value: Any, hint: Any, name: str) -> Any:
    bounds = ANY
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Range)), ANY)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return check(value, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        hint = next(one for one in arguments if one is not type(None))
        return _value(value, typing.Annotated[hint, bounds] if bounds is not ANY else hint, name)
    if origin is Literal:
        if value not in arguments:
            raise McdiError(f"{name} = {value!r:.60}: expected {' or '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise McdiError(f"{name} = {value!r:.60}: expected one or more values")
        return tuple(_value(one, arguments[0], name) for one in value)
    if hint in (int, float):
        return _number(value, hint, bounds, name)
    return value


def _number(value: Any, kind: type, bounds: Range, name: str) -> Any:
    convert: Callable[[Any], Any] = operator.index if kind is int else float
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = convert(value)
    except (TypeError, ValueError):
        word = "an integer" if kind is int else "a number"
        raise McdiError(f"{name} = {value!r:.60}: expected {word}, found {type(value).__name__}") from None
    if not bounds.holds(number):
        raise McdiError(f"{name} = {number}: expected {bounds}")
    return number
