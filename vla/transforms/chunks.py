"""Arithmetic of action chunks [H, D]. It does not know tokens or robots."""

from __future__ import annotations

import numpy as np


def remainder(chunk: np.ndarray, executed: int) -> np.ndarray:
    """What a chunk still says after its first `executed` actions, the last one held: a draft of the next chunk."""
    return np.concatenate([chunk[executed:], np.repeat(chunk[-1:], executed, axis=0)])


def completed(chunk: np.ndarray, length: int) -> np.ndarray:
    """A chunk that was decoded in part, its last action held until it has `length` actions."""
    return np.concatenate([chunk, np.repeat(chunk[-1:], length - len(chunk), axis=0)])
