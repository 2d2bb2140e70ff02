"""Policies: prediction of action chunks, the state within an episode, and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla.policy.interface import ChunkPolicy, Prediction
    from vla.policy.policy import Policy

__all__ = ["ChunkPolicy", "Policy", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import on first use: `Policy` needs torch, but processes that run environments only need `session`."""
    if name not in __all__:
        raise AttributeError(f"module 'vla.policy' has no attribute {name!r}")
    if name == "Policy":
        from vla.policy.policy import Policy

        return Policy
    from vla.policy import interface

    return getattr(interface, name)
