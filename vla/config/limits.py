"""Types with limits, so that a field's valid range is part of its declaration.

Owns: the types, and the messages for values outside their limits. A YAML file is checked when it is read
(`files.load`), and the whole configuration before its job starts (`check`). It does not know the jobs.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic
from annotated_types import Ge, Gt, Le, Lt, MinLen

from vla.errors import ConfigError, unknown

_Finite = pydantic.AllowInfNan(False)

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), _Finite]
NonNegative = Annotated[float, Ge(0), _Finite]
Finite = Annotated[float, _Finite]
Share = Annotated[float, Ge(0), Le(1)]  # includes 0 and 1
Fraction = Annotated[float, Ge(0), Lt(1)]  # excludes 1
Quota = Annotated[float, Gt(0), Le(1)]  # excludes 0
Port = Annotated[int, Ge(0), Le(65_535)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # NumPy's limit
Dtype = Literal["float32", "bfloat16", "float16"]


def check(config: Any) -> None:
    """Raise ConfigError if a field of `config` or of a nested configuration is outside its limits, or if fields
    contradict each other (`contradiction() -> str | None` of a configuration)."""
    try:
        pydantic.TypeAdapter(type(config)).validate_python(dataclasses.asdict(config))
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(explain(type(config), error))) from None
    for nested in _configurations(config):
        if (reason := getattr(nested, "contradiction", lambda: None)()) is not None:
            raise ConfigError(reason)


def explain(cls: Any, error: pydantic.ValidationError) -> list[str]:
    """One sentence per problem: the field, the valid values and the invalid value."""
    # pydantic does not count invalid entries, and therefore also reports that their list is too short.
    problems = [problem for problem in error.errors() if problem["type"] != "too_short" or not problem["input"]]
    return [_sentence(cls, problem) for problem in problems]


def _sentence(cls: Any, problem: Any) -> str:
    path = [str(part) for part in problem["loc"]] or [""]
    name, got = ".".join(path), problem["input"]
    parent = _type_at(cls, path[:-1])
    if problem["type"] == "unexpected_keyword_argument" and dataclasses.is_dataclass(parent):
        if (new := getattr(parent, "RENAMED", {}).get(path[-1])) is not None:
            return f"{name} is now called {'.'.join([*path[:-1], new])}."
        return unknown("key", name, [field.name for field in dataclasses.fields(parent)])
    if problem["type"] == "literal_error":
        return unknown(name, got, get_args(_unwrapped(_type_at(cls, path))))
    if problem["type"] == "finite_number":
        return f"{name} must be a finite number, got {got}."
    if problem["type"] in _OUTSIDE:
        return f"{name} must {_words(_type_at(cls, path))}, got {got}."
    return f"{name}: {problem['msg']}, got {got!r}."


_OUTSIDE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than", "too_short"}


def _words(kind: Any) -> str:
    """The limits of a type as text, e.g. "be between 0 and 1"."""
    limits = {type(limit): limit for limit in _without_none(kind).__metadata__}
    low, above = limits.get(Ge), limits.get(Gt)
    high, below = limits.get(Le), limits.get(Lt)
    if MinLen in limits:
        return "not be empty"
    start = f"at least {low.ge}" if low else f"above {above.gt}" if above else ""
    end = f"at most {high.le}" if high else f"below {below.lt}" if below else ""
    if low and high:
        return f"be between {low.ge} and {high.le}"
    if start and end:
        return f"be {start} and {end}"
    if above and above.gt == 0:
        return "be positive"
    if low and low.ge == 0:
        return "not be negative"
    return f"be {start or end}"


def _type_at(cls: Any, path: list[str]) -> Any:
    """The type of the value at `path` in a configuration of class `cls`."""
    for part in path:
        inner = _unwrapped(cls)
        if dataclasses.is_dataclass(inner):
            cls = get_type_hints(inner, include_extras=True).get(part)
        elif get_origin(inner) is dict:
            cls = get_args(inner)[1]
        else:  # tuple[X, ...], or a tuple of fixed length
            kinds = get_args(inner)
            cls = kinds[0] if not part.isdigit() or Ellipsis in kinds else kinds[int(part)]
    return cls


def _without_none(kind: Any) -> Any:
    """`X` for `X | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _unwrapped(kind: Any) -> Any:
    kind = _without_none(kind)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _configurations(config: Any) -> Iterator[Any]:
    yield config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from _configurations(value)
