"""Per-dimension normalisation of actions and states, with exact statistics.

Owns: the statistics, and the functions `normalize` and `unnormalize`. Statistics are plain lists, because a checkpoint
stores them in its config.json. It does not know tokens, datasets or models.

    q01_q99:   x = 2 (a - q01) / (q99 - q01) - 1     (OpenVLA's BOUNDS_Q99, arXiv:2406.09246)
    min_max:   x = 2 (a - min) / (max - min) - 1
    mean_std:  x = (a - mean) / (3 std)              (three standard deviations fill [-1, 1])

There are two exceptions. A dimension that moves in less than 0.1 % of the frames is constant: it normalises to 0 and
un-normalises to its median. If a dimension's quantile range is less than 1 % of its full range, q01_q99 uses min and
max for it, because division by a vanishing q99 - q01 would give extreme values. These exceptions do not apply to
statistics of other packages, which have no `median` and `moving`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.errors import DataError, unknown

METHODS = ("q01_q99", "min_max", "mean_std")
NAMES = ("mean", "std", "min", "max", "q01", "median", "q99", "moving")

_BOUNDS = {"q01_q99": ("q01", "q99"), "min_max": ("min", "max"), "mean_std": ("mean", "std")}
_OURS = ("median", "moving")  # only in statistics of this package
_DEGENERATE = 1e-2  # minimum quantile range, as a fraction of the full range
_STILL = 1e-3  # a dimension that moves in a smaller fraction of the frames is constant


def compute_statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Exact per-dimension statistics of `values` [N, D], as lists of D floats.

    The statistics are mean, std, min, max, q01, median, q99 and `moving`, the fraction of frames that differ from the
    median.

    Raises:
        DataError: there are no rows, or values are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not len(values):
        raise DataError(f"statistics need at least one frame; got values of shape {values.shape}.")
    if not np.isfinite(values).all():
        frame, dim = np.argwhere(~np.isfinite(values))[0]
        raise DataError(f"statistics need finite values; frame {frame}, dimension {dim} is {values[frame, dim]}.")
    q01, median, q99 = np.quantile(values, [0.01, 0.5, 0.99], axis=0)
    # Differences below the float32 resolution are rounding errors.
    moving = (np.abs(values - median) > 1e-6 * np.maximum(1.0, np.abs(median))).mean(0)
    named = {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
        "q01": q01,
        "median": median,
        "q99": q99,
        "moving": moving,
    }
    return {name: array.tolist() for name, array in named.items()}


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """Affine map per dimension: `x = (a - offset) / scale` where `mask` is True, identity elsewhere.

    Attributes:
        offset, scale: float64 [D]; the scale of a constant dimension is 0.
        mask: bool [D]; False leaves a dimension, which must be in [-1, 1], unchanged.
        limit: normalised values are clipped to [-limit, limit].
    """

    offset: np.ndarray
    scale: np.ndarray
    mask: np.ndarray
    limit: float = 1.0

    @classmethod
    def from_statistics(
        cls,
        statistics: Mapping[str, Any],
        method: str = "q01_q99",
        mask: Sequence[bool] | None = None,
        limit: float = 1.0,
    ) -> Normalizer:
        """Build a normaliser from the result of `compute_statistics`, or from the statistics of another package."""
        if method not in METHODS:
            raise DataError(unknown("normalization", method, METHODS))
        ours = any(name in statistics for name in _OURS)
        needed = NAMES if ours else _BOUNDS[method]
        missing = [name for name in needed if name not in statistics]
        if missing:
            raise DataError(f"statistics lack {', '.join(missing)}; compute them again with `compute_statistics`.")
        stats = {name: np.asarray(statistics[name], np.float64) for name in needed}
        first, second = (stats[name] for name in _BOUNDS[method])
        if method == "mean_std":
            offset, scale = first, 3 * second
        else:
            if ours:
                degenerate = (second - first) < _DEGENERATE * (stats["max"] - stats["min"])
                first, second = np.where(degenerate, stats["min"], first), np.where(degenerate, stats["max"], second)
            offset, scale = (first + second) / 2, (second - first) / 2
        if ours:
            constant = stats["moving"] < _STILL
            scale, offset = np.where(constant, 0.0, scale), np.where(constant, stats["median"], offset)
        chosen = np.ones(len(scale), bool) if mask is None else np.asarray(mask, bool)
        return cls(offset, scale, chosen, limit)

    @property
    def constant(self) -> np.ndarray:
        """bool [D]: dimensions that are constant in the data."""
        return (self.scale == 0) & self.mask

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """[..., D] in the robot's units -> float32 [..., D] in [-limit, limit]."""
        values = np.asarray(values, np.float64)
        scaled = np.where(self.scale == 0, 0.0, (values - self.offset) / np.where(self.scale == 0, 1.0, self.scale))
        return np.clip(np.where(self.mask, scaled, values), -self.limit, self.limit).astype(np.float32)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """[..., D] in [-1, 1] -> float32 [..., D] in the robot's units."""
        values = np.asarray(values, np.float64)
        return np.where(self.mask, values * self.scale + self.offset, values).astype(np.float32)
