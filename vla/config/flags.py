"""Command-line flags for the fields of configurations, parsed with tyro.

Owns: the names of flags, and the changes to tyro so that flags accept the same values as YAML files. It does not know
verbs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast, get_type_hints


def parse(default: Any, arguments: Sequence[str], prog: str, description: str) -> tuple[Any, list[str]]:
    """Parse flags into a configuration. Returns it and the remaining arguments.

    The flags of nested fields have no prefix (`--backbone`), except if a top-level field has the same name
    (`--adapter.robot` of `vla deploy`). If two nested fields have the same name, all flags use full names
    (`--train.model.backbone` of `vla dagger`).

    Args:
        default: the configuration that the flags override.
    """
    import tyro

    cls = type(default)
    return tyro.cli(
        cls,
        prog=prog,
        description=description,
        args=_with_values(cls, arguments),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,) if _unprefixed(cls) else (),
        registry=_type_rules(cls),
        return_unknown_args=True,
    )


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """The types of a configuration's fields. Cached, because `get_type_hints` is slow."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def renamed(cls: Any) -> dict[str, str]:
    """Old names of flags -> new names."""
    nested = [kind for kind in hints(cls).values() if dataclasses.is_dataclass(kind)]
    return getattr(cls, "RENAMED", {}) | {old: new for kind in nested for old, new in renamed(kind).items()}


def names(cls: Any) -> list[str]:
    """The flags of a configuration, as in `vla <verb> --help`."""
    full = _prefixed(cls) if _unprefixed(cls) else _fields(cls)
    found = [path if path in full else path.rpartition(".")[2] for path in _fields(cls)]
    return [f"--{name.replace('_', '-')}" for name in found]


def _unprefixed(cls: Any) -> bool:
    """Whether all nested fields have different names, so that their flags need no prefix."""
    prefixed = _prefixed(cls)
    names = [path.rpartition(".")[2] for path in _fields(cls) if path not in prefixed]
    return len(names) == len(set(names))


def _prefixed(cls: Any) -> list[str]:
    """Dotted names of the nested fields (one level deep) with the name of a top-level field."""
    return [path for path in _fields(cls) if path.count(".") == 1 and path.partition(".")[2] in hints(cls)]


def _fields(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration, including nested ones."""
    found = []
    for name, kind in hints(cls).items():
        found += _fields(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return found


def _type_rules(cls: Any) -> Any:
    """A tyro registry with four changes:

    * The help shows an empty list or mapping as "none".
    * Unknown choices are rejected by `config.check` instead of tyro, because it suggests the nearest valid choice.
    * A `dict[str, Any]` field is a single flag that takes a YAML mapping.
    * Individual nested fields can keep their prefix.
    """
    from tyro.conf import arg
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructTypeInfo,
    )

    registry, asked = ConstructorRegistry(), set[Any]()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin not in (tuple, dict, Literal) or info.type in asked:
            return None
        asked.add(info.type)  # the next lookup then uses tyro's own rule
        usual = registry.get_primitive_spec(info)
        asked.remove(info.type)
        if info.type == dict[str, Any]:
            return PrimitiveConstructorSpec(
                1, "{KEY: VALUE, ...}", _mapping, lambda value: isinstance(value, dict), _flow
            )
        if not isinstance(usual, PrimitiveConstructorSpec):
            return None
        if info.type_origin is Literal:
            return dataclasses.replace(usual, choices=None, instance_from_str=lambda words: words[0])
        return dataclasses.replace(usual, str_from_instance=lambda value: usual.str_from_instance(value) or ["none"])

    full = _prefixed(cls) if _unprefixed(cls) else []
    owners = {kind: name for name, kind in hints(cls).items() if dataclasses.is_dataclass(kind)}

    @registry.struct_rule
    def keep_prefix(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not full or info.type not in owners or info.type in asked:
            return None
        asked.add(info.type)
        usual = registry.get_struct_spec(info)
        asked.remove(info.type)
        assert isinstance(usual, StructConstructorSpec)
        paths = {field.name: f"{owners[info.type]}.{field.name}" for field in usual.fields}
        fields = [
            dataclasses.replace(field, type=cast(Any, Annotated[field.type, arg(name=paths[field.name])]))
            if paths[field.name] in full
            else field
            for field in usual.fields
        ]
        return dataclasses.replace(usual, fields=tuple(fields))

    return registry


def _mapping(words: list[str]) -> dict[str, Any]:
    import yaml

    value = yaml.safe_load(words[0])
    if not isinstance(value, dict):
        raise ValueError(f"expected {{key: value}}, got {words[0]!r}")
    return value


def _flow(mapping: dict[str, Any]) -> list[str]:
    import yaml

    return [yaml.safe_dump(mapping, default_flow_style=True, width=10_000).strip() if mapping else "none"]


def _with_values(cls: Any, flags: Sequence[str]) -> list[str]:
    """Replace `--x` by `--x True` and `--no-x` by `--x False` for fields of type `bool | None`. tyro has such switches
    only for `bool`."""
    written: list[str] = []
    for index, flag in enumerate(flags):
        prefix, _, name = flag.removeprefix("--").replace("_", "-").rpartition(".")
        value = not name.startswith("no-")
        follows = flags[index + 1] if index + 1 < len(flags) else ""
        bare = flag.startswith("--") and follows not in ("True", "False", "None")
        if bare and (name := name.removeprefix("no-")) in _optional_switches(cls):
            written += [f"--{prefix}{'.' * bool(prefix)}{name}", str(value)]
        else:
            written.append(flag)
    return written


def _optional_switches(cls: Any) -> set[str]:
    found = set()
    for name, kind in hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _optional_switches(kind)
        elif kind == bool | None:
            found.add(name.replace("_", "-"))
    return found
