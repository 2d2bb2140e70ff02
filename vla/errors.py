"""The package's one error tree.

Owns: the exception classes and the wording of "you named something that does not exist". It knows nothing of robots,
models or files. A message says what was wrong, what was expected and what to do; `vla <verb>` prints it without a
traceback and exits with status 2.
"""

import difflib
from collections.abc import Iterable


class VLAError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(VLAError):
    """A configuration value is unknown, has the wrong type or contradicts another one."""


class SpecError(VLAError):
    """An observation or an action does not fit the robot it is meant for."""


class DataError(VLAError):
    """A dataset is missing, incomplete or holds values that cannot be trained on."""


class TrainingError(VLAError):
    """Training cannot go on: what it computes is no longer a number."""


class CheckpointError(VLAError):
    """A checkpoint lacks something that is needed to use it correctly."""


class SimulatorError(VLAError):
    """An environment cannot be made, does not offer what was asked for, or failed."""


class ServerError(VLAError):
    """A policy server cannot be reached, is too busy, or answered with an error."""


def unknown(what: str, value: object, choices: Iterable[object], fix: str = "") -> str:
    """Message for a name that does not exist: the value, the nearest valid one, all valid ones, the fix.

    >>> unknown("camera", "fornt", ["front", "wrist"])
    "unknown camera 'fornt'. Did you mean 'front'? Valid: 'front', 'wrist'."
    """
    valid = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(repr(choice) for choice in valid) if valid else "(none)"
    return f"unknown {what} {str(value)!r}.{hint} Valid: {listed}." + (f" {fix}" if fix else "")
