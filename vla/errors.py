"""Exceptions of the package.

Owns: the exception classes and the message for an unknown name. Every message states what was wrong, what was expected
and what to do. `vla <verb>` prints it without a traceback and exits with status 2.
"""

import difflib
from collections.abc import Iterable


class VLAError(Exception):
    """Base class of this package's errors."""


class ConfigError(VLAError):
    """A configuration key or value is unknown, has the wrong type, or contradicts another one."""


class SpecError(VLAError):
    """An observation, an action or a policy does not match the robot."""


class DataError(VLAError):
    """A dataset is missing or incomplete, or contains values that cannot be used for training."""


class TrainingError(VLAError):
    """Training cannot continue because the loss or a weight is not finite."""


class CheckpointError(VLAError):
    """A checkpoint is missing, incomplete or invalid."""


class SimulatorError(VLAError):
    """An environment cannot be created, lacks something that was requested, or failed."""


class ServerError(VLAError):
    """A policy server is unreachable or overloaded, or returned an error."""


def unknown(what: str, value: object, choices: Iterable[object], fix: str = "") -> str:
    """Message for an unknown name: the name, the closest valid one, all valid ones, and the remedy.

    >>> unknown("camera", "fornt", ["front", "wrist"])
    "unknown camera 'fornt'. Did you mean 'front'? Valid: 'front', 'wrist'."
    """
    valid = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(repr(choice) for choice in valid) if valid else "(none)"
    return f"unknown {what} {str(value)!r}.{hint} Valid: {listed}." + (f" {fix}" if fix else "")
