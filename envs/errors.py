"""Argument checks. Messages state the invalid value, the valid values and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np


def check_choice(name: str, value: object, valid: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `valid`."""
    valid = list(valid)
    if value in valid:
        return
    close = difflib.get_close_matches(str(value), [str(choice) for choice in valid], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name}={value!r} is not valid: pass one of {', '.join(map(repr, valid))}.{hint}")


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not valid: pass an integer from {low} to {high}.")


def check_action(action: object, names: tuple[str, ...]) -> np.ndarray:
    """Return `action` as float64 [len(names)], clipped to [-1, 1]. ValueError for a wrong shape, NaN or infinity."""
    array = np.asarray(action, dtype=np.float64)
    if array.shape != (len(names),):
        raise ValueError(f"action has shape {array.shape}: pass {len(names)} numbers ({', '.join(names)}).")
    if not np.isfinite(array).all():
        bad = [f"{name}={value}" for name, value in zip(names, array, strict=True) if not np.isfinite(value)]
        raise ValueError(f"action contains {', '.join(bad)}: every value must be a finite number in [-1, 1].")
    return np.clip(array, -1.0, 1.0)
