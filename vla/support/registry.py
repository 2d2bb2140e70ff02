"""Registries of named components, such as action tokenizers and wire protocols.

Owns: the lookup of a component by its name in a configuration or checkpoint. A lookup never imports a module. Users
register their own components in a module and import it with `vla --plugin MODULE <verb>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vla.errors import ConfigError, unknown

Member = TypeVar("Member")


class Registry(Generic[Member]):
    """A mapping from names to components, in the order of registration.

    Args:
        kind: the kind of component, for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._members: dict[str, Member] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def register(self, name: str) -> Callable[[Member], Member]:
        """Decorator that registers a component as `name`. ConfigError if the name is already registered."""

        def add(member: Member) -> Member:
            if name in self._members:
                raise ConfigError(f"{self.kind} {name!r} is already registered; choose another name.")
            self._members[name] = member
            return member

        return add

    def get(self, name: str) -> Member:
        """The component registered as `name`. ConfigError if there is none."""
        if name not in self._members:
            hint = "If it is registered in your own module, import the module with `vla --plugin MODULE <verb> ...`."
            raise ConfigError(unknown(self.kind, name, self._members, hint))
        return self._members[name]
