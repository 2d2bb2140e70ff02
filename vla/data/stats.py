"""Feature statistics with LeRobot's names and shapes.

Owns: min, max, mean, std, count and quantiles of vectors and images. Quantiles are exact, unlike LeRobot's estimates.
Actions are normalised with the statistics of `vla.transforms.normalize` instead. It does not know files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

STRIDE = 4  # image statistics use every fourth row and column, because neighbouring pixels are similar


def vector_stats(values: np.ndarray) -> dict[str, list[Any]]:
    """Statistics of `values` [N] or [N, D] over the N frames, as lists of length 1 or D."""
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    quantiles = np.quantile(table, list(QUANTILES.values()), axis=0)
    return {
        "min": table.min(0).tolist(),
        "max": table.max(0).tolist(),
        "mean": table.mean(0).tolist(),
        "std": table.std(0).tolist(),
        "count": [len(table)],
        **{name: row.tolist() for name, row in zip(QUANTILES, quantiles, strict=True)},
    }


def histogram(image: np.ndarray) -> np.ndarray:
    """Histogram int64 [3, 256] of the values in each channel of `image`, uint8 [H, W, 3]. Histograms of several frames
    can be added."""
    pixels = image[::STRIDE, ::STRIDE].reshape(-1, 3).astype(np.int64)
    return np.bincount((pixels + np.arange(3) * 256).ravel(), minlength=3 * 256).reshape(3, 256)


def image_stats(counts: np.ndarray, frames: int) -> dict[str, list[Any]]:
    """Per-channel statistics in [0, 1] from the histogram [3, 256] of `frames` images. As in LeRobot, each has shape
    [3, 1, 1]."""
    levels = np.arange(256) / 255.0
    total = counts.sum(1)
    mean = counts @ levels / total
    std = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0.0))
    share = counts.cumsum(1) / total[:, None]
    present = counts > 0
    stats: dict[str, np.ndarray] = {
        "min": levels[present.argmax(1)],
        "max": levels[255 - present[:, ::-1].argmax(1)],
        "mean": mean,
        "std": std,
        **{name: levels[(share >= q).argmax(1)] for name, q in QUANTILES.items()},
    }
    return {name: value.reshape(3, 1, 1).tolist() for name, value in stats.items()} | {"count": [frames]}
