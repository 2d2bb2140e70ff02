"""Shifting, padding and averaging of action chunks [H, ...]: actions, tokens or distributions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def remainder(chunk: np.ndarray, executed: int) -> np.ndarray:
    """Drop the first `executed` rows and pad to H rows by repeating the last one."""
    return np.concatenate([chunk[executed:], np.repeat(chunk[-1:], executed, axis=0)])


def completed(chunk: np.ndarray, length: int) -> np.ndarray:
    """Pad a partly decoded chunk to `length` rows by repeating its last row."""
    return np.concatenate([chunk, np.repeat(chunk[-1:], length - len(chunk), axis=0)])


def ensemble(votes: Sequence[np.ndarray], coefficient: float) -> np.ndarray:
    """Temporal ensembling (Zhao et al. 2023, ACT): the weighted average of all predictions for one step.

    The weights are exp(-coefficient * i), with i = 0 for the oldest prediction: a positive coefficient favours old
    predictions, a negative one new predictions.

    Args:
        votes: predictions for the same step, oldest first: actions [D] or distributions over bins.
    """
    weights = np.exp(-coefficient * np.arange(len(votes)))
    return np.average(votes, axis=0, weights=weights).astype(votes[-1].dtype)


def ensemble_chunks(chunks: Sequence[np.ndarray], coefficient: float) -> np.ndarray:
    """Temporal ensembling of chunks [n, ...] that begin at the same step, oldest first. The last chunk determines the
    length of the result."""
    return np.stack(
        [
            ensemble([chunk[step] for chunk in chunks if step < len(chunk)], coefficient)
            for step in range(len(chunks[-1]))
        ]
    )
