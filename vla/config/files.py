"""Strict conversion between YAML files and configurations.

Owns: reading and writing YAML files, and the errors for invalid files. It does not know the jobs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from vla.config.limits import explain
from vla.errors import ConfigError

Config = TypeVar("Config")


class Strict:
    """Base class of configurations: unknown keys are errors. Strings are converted to numbers, because PyYAML reads
    "1e-4" as a string."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "configuration") -> Config:
    """Build `cls` from plain values. ConfigError for unknown keys, wrong types and values outside a field's limits."""
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {reason}" for reason in explain(cls, error))) from None


def load(cls: type[Config], path: str | Path) -> Config:
    """Read a YAML file into `cls`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(values).__name__}.")
    return from_dict(cls, values, str(path))


def dump(config: Any, path: str | Path) -> None:
    """Write a configuration as YAML, atomically. `load` returns an equal object."""
    scratch = Path(path).with_suffix(".partial")
    scratch.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    scratch.replace(path)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values (paths as strings, tuples as lists)."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")
