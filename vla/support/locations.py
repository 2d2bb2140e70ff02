"""Classification of policy and model names as folders, hub ids or server addresses."""

from __future__ import annotations

import difflib
from pathlib import Path

from vla.errors import CheckpointError


def is_address(policy: str) -> bool:
    """Whether `policy` is the address of a policy server (`vla serve`)."""
    return policy.startswith(("ws://", "wss://"))


def missing_folder(name: str) -> str | None:
    """Error message if `name` is a path that does not exist; None if it exists or may be a hub id."""
    path = Path(name).expanduser()
    known_parent = path.parent.is_dir() and path.parent != Path()
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or known_parent
    if path.exists() or not is_path:
        return None
    beside = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    near = [str(path.parent / match) for match in difflib.get_close_matches(path.name, beside, n=3)]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"there is no such folder.{hint} (A hub id has the form 'owner/name'.)"


def check_policy(name: str) -> None:
    """Raise CheckpointError if `name` is the path of a policy that does not exist."""
    if name != "nano" and not is_address(name) and (problem := missing_folder(name)):
        raise CheckpointError(f"no policy at {name!r}: {problem}")
