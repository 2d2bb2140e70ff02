"""A policy: observations and instructions to action chunks, its session in an episode, and its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla.policy.interface import ChunkPolicy, Prediction
    from vla.policy.policy import Policy

__all__ = ["ChunkPolicy", "Policy", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import `Policy`, and with it torch, on first use: processes that run environments only import `session`."""
    if name not in __all__:
        raise AttributeError(f"module 'vla.policy' has no attribute {name!r}")
    if name == "Policy":
        from vla.policy.policy import Policy

        return Policy
    from vla.policy import interface

    return getattr(interface, name)
