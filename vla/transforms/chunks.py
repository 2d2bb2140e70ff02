"""Shifting and padding of action chunks [H, D]. It does not know tokens or robots."""

from __future__ import annotations

import numpy as np


def remainder(chunk: np.ndarray, executed: int) -> np.ndarray:
    """Drop the first `executed` actions and pad to H by repeating the last one: a draft of the next chunk."""
    return np.concatenate([chunk[executed:], np.repeat(chunk[-1:], executed, axis=0)])


def completed(chunk: np.ndarray, length: int) -> np.ndarray:
    """Pad a partly decoded chunk to `length` actions by repeating its last action."""
    return np.concatenate([chunk, np.repeat(chunk[-1:], length - len(chunk), axis=0)])
