"""Named members of one kind: tokenizers, wire protocols and the like.

Owns: looking a member up by the name that a configuration or a checkpoint holds. Modules of a user add members of their
own; `vla --plugin MODULE <verb>` imports such a module first. A name never makes anything be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vla.errors import ConfigError, unknown

Member = TypeVar("Member")


class Registry(Generic[Member]):
    """Members by name, in the order of their registration.

    Args:
        kind: what a member is, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._members: dict[str, Member] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def register(self, name: str) -> Callable[[Member], Member]:
        """Decorator that adds a member. ConfigError if the name is taken."""

        def add(member: Member) -> Member:
            if name in self._members:
                raise ConfigError(f"{self.kind} {name!r} is already registered; choose another name.")
            self._members[name] = member
            return member

        return add

    def get(self, name: str) -> Member:
        """The member called `name`. ConfigError if there is none."""
        if name not in self._members:
            hint = "A module of your own that registers it is imported with `vla --plugin MODULE <verb> ...`."
            raise ConfigError(unknown(self.kind, name, self._members, hint))
        return self._members[name]
