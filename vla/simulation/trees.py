"""Nested observations (mappings, tuples and lists of arrays) and their Gymnasium spaces.

Owns: the lookup of entries by dotted path ("robot.hand.position", "images.0").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces


def children(tree: Any) -> Iterator[tuple[str, Any]]:
    """Pairs (name, child) of a mapping, a tuple or a list, or of a Dict or Tuple space."""
    if isinstance(tree, Mapping):
        yield from ((str(key), child) for key, child in tree.items())
    elif isinstance(tree, tuple | list | spaces.Tuple):
        names = getattr(tree, "_fields", None) or map(str, range(len(tree)))
        yield from zip(names, tree, strict=True)


def look_up(tree: Any, path: str) -> Any:
    """The entry of `tree` at a dotted path; "" is `tree` itself. KeyError if it does not exist. Keys may have dots."""
    if not path:
        return tree
    for name, child in children(tree):
        if path == name:
            return child
        if path.startswith(f"{name}."):
            with contextlib.suppress(KeyError):
                return look_up(child, path[len(name) + 1 :])
    raise KeyError(path)


def is_nested(tree: Any) -> bool:
    """Whether `tree` is a mapping, or a tuple or list that contains arrays or nested values."""
    if isinstance(tree, tuple | list):
        return any(getattr(child, "ndim", 0) or is_nested(child) for child in tree)
    return isinstance(tree, Mapping)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (dotted path, value) of all leaves. If `tree` itself is a leaf, its path is ""."""
    if not is_nested(tree):
        yield path, tree
        return
    for name, child in children(tree):
        yield from leaves(child, f"{path}.{name}" if path else name)


def shapes(tree: Any) -> str:
    """The paths and shapes of all leaves, for messages."""
    return ", ".join(f"{path!r} {list(np.shape(value))}" for path, value in leaves(tree))
