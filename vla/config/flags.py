"""Configurations as command-line flags, through tyro.

Owns: the names of flags, and where tyro differs from what YAML files accept. It does not know verbs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast, get_type_hints


def parse(default: Any, arguments: Sequence[str], prog: str, description: str) -> tuple[Any, list[str]]:
    """A configuration with the values of flags, and the arguments that are not flags of it.

    Nested fields are flags without a prefix (`--backbone`). One that shares its name with a field of the configuration
    itself keeps its prefix (`--adapter.robot` of `vla deploy`). If two nested fields share a name, as where a whole job
    is nested, every field has its full name (`--train.model.backbone`).

    Args:
        default: the configuration without flags.
    """
    import tyro

    cls = type(default)
    return tyro.cli(
        cls,
        prog=prog,
        description=description,
        args=_with_values(cls, arguments),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,) if _short(cls) else (),
        registry=_type_rules(cls),
        return_unknown_args=True,
    )


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """The types of a configuration's fields. Python evaluates them anew at every call, which takes milliseconds."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def renamed(cls: Any) -> dict[str, str]:
    """Old names of flags -> new names."""
    nested = [kind for kind in hints(cls).values() if dataclasses.is_dataclass(kind)]
    return getattr(cls, "RENAMED", {}) | {old: new for kind in nested for old, new in renamed(kind).items()}


def names(cls: Any) -> list[str]:
    """The flags of a configuration, as `vla <verb> --help` spells them."""
    full = _prefixed(cls) if _short(cls) else _fields(cls)
    found = [path if path in full else path.rpartition(".")[2] for path in _fields(cls)]
    return [f"--{name.replace('_', '-')}" for name in found]


def _short(cls: Any) -> bool:
    """Whether no two nested fields of a configuration share a name, so that their flags need no prefix."""
    prefixed = _prefixed(cls)
    names = [path.rpartition(".")[2] for path in _fields(cls) if path not in prefixed]
    return len(names) == len(set(names))


def _prefixed(cls: Any) -> list[str]:
    """The fields one level down that share their name with a field of the configuration itself."""
    return [path for path in _fields(cls) if path.count(".") == 1 and path.partition(".")[2] in hints(cls)]


def _fields(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration, including nested ones."""
    found = []
    for name, kind in hints(cls).items():
        found += _fields(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return found


def _type_rules(cls: Any) -> Any:
    """What to change in tyro: its help shows an empty list or mapping as nothing instead of "none", it refuses an
    unknown choice without naming the nearest one, as `config.check` does, it has no flag for a mapping of anything, and
    it cannot keep the prefix of a single field.
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
        asked.add(info.type)  # so that the next lookup uses tyro's own rule
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

    full = _prefixed(cls) if _short(cls) else []
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
    """Add the value to `--x` and `--no-x` for fields `x: bool | None`: tyro supports such switches only for plain
    booleans.
    """
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
