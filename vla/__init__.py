"""Action-token robot policies: train on demonstrations, roll out in simulation, deploy in real time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla.policy import Policy
    from vla.spec import RobotSpec

__version__ = "0.1.0"
__all__ = ["Policy", "RobotSpec", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Policy` and `RobotSpec` on first use, so that `vla --help` does not wait for torch."""
    module = {"Policy": "vla.policy", "RobotSpec": "vla.spec"}.get(name)
    if module is None:
        raise AttributeError(f"module 'vla' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
