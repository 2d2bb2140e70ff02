"""Where a policy is: names that are folders, hub ids or addresses, told apart without loading anything."""

from __future__ import annotations

from pathlib import Path

from vla.errors import CheckpointError


def is_address(policy: str) -> bool:
    """Whether it is served elsewhere (`vla serve`)."""
    return policy.startswith(("ws://", "wss://"))


def check_policy(name: str) -> None:
    """CheckpointError when `name` is neither the embedded policy, a folder, an address nor possibly a hub id."""
    if name == "nano" or is_address(name) or Path(name).exists():
        return
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"no policy at {name!r}: there is no such folder (and it is not a hub id, 'owner/name').")
