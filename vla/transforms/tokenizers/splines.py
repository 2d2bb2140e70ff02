"""B-splines: a chunk as a smooth curve with few control points (after BEAST; Zhou et al., 2025, arXiv:2506.06072).

Owns: the basis, the least-squares fit of a chunk, and the bins of the control points. A sequence has a fixed length and
is shorter than with one token per entry. The first control point is the first action of the chunk, so that consecutive
chunks join smoothly. Dimensions that switch between their limits, such as a gripper, are piecewise constant instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer
from vla.transforms.tokenizers.bins import DEFAULT_BINS

DEGREE = 3  # of the polynomials between knots
OVERSHOOT = 1.5  # limit of a curve's control points; the curve itself is clipped to [-1, 1]
SWITCHED = 0.9  # a dimension with more than this share of values at a limit counts as switching


@TOKENIZERS.register("spline")
class Splines(ActionTokenizer):
    """One token per control point and dimension; the dimensions of a control point are adjacent.

    Attributes:
        n_points: control points per dimension. Half the horizon by default, at least 2.
        switches: dimensions that are piecewise constant, with `n_points` pieces.
    """

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        n_bins: int,
        n_points: int,
        switches: Sequence[int] = (),
        active: Sequence[int] | None = None,
    ) -> None:
        super().__init__(horizon, action_dim, active)
        if n_bins < 2:
            raise ValueError(f"n_bins must be at least 2, got {n_bins}.")
        if not 1 <= n_points <= horizon:
            raise ValueError(f"n_points must be between 1 and the horizon {horizon}, got {n_points}.")
        self.n_points, self.vocab_size, self.switches = n_points, n_bins, [int(dim) for dim in switches]
        self.max_tokens = n_points * len(self.active)
        curve, steps = basis(horizon, n_points, DEGREE), basis(horizon, n_points, 0)
        # Control points as a linear function of the entries: the first one is the first entry, the others fit the rest.
        first = np.eye(horizon)[:1]
        rest = np.linalg.pinv(curve[:, 1:]) @ (np.eye(horizon) - curve[:, :1] @ first)
        to_curve, to_steps = np.concatenate([first, rest]), np.linalg.pinv(steps)
        switching = [dim in self.switches for dim in self.active]
        self._fit = np.stack([to_steps if switch else to_curve for switch in switching])  # [n active, n_points, H]
        self._basis = np.stack([steps if switch else curve for switch in switching])  # [n active, H, n_points]
        self._limits = np.where(switching, 1.0, OVERSHOOT)

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        points = max(min(horizon, 2), horizon // 2)
        switches = np.flatnonzero((np.abs(actions) > 0.99).mean(0) > SWITCHED).tolist()
        return cls(horizon, actions.shape[-1], n_bins or DEFAULT_BINS, points, switches, active)

    def to_dict(self) -> dict[str, Any]:
        values = {"n_bins": self.vocab_size, "n_points": self.n_points, "switches": self.switches}
        return super().to_dict() | values

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        points = np.einsum("dph,...hd->...pd", self._fit, self.entries(chunks)) / self._limits
        ids = np.floor((points + 1) * (self.vocab_size / 2)).astype(np.int64).clip(0, self.vocab_size - 1)
        return ids.reshape(*ids.shape[:-2], self.max_tokens)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        return self._entries((2 * self.check_ids(ids) + 1) / self.vocab_size - 1)

    def expect(self, probabilities: np.ndarray) -> np.ndarray:
        centres = (2 * np.arange(self.vocab_size) + 1) / self.vocab_size - 1
        return self._entries((probabilities * centres).sum(-1))

    def _entries(self, points: np.ndarray) -> np.ndarray:
        """Control points [..., T], in units of their limits -> chunks [..., H, D]."""
        points = points.reshape(*points.shape[:-1], self.n_points, len(self.active)) * self._limits
        return self.chunks(np.clip(np.einsum("dhp,...pd->...hd", self._basis, points), -1, 1))


def basis(n: int, points: int, degree: int) -> np.ndarray:
    """The values of `points` B-splines at `n` equidistant steps, float64 [n, points], by de Boor's recursion.

    The knots are clamped: a curve begins at the first control point and ends at the last. Rows are non-negative and sum
    to 1, so a curve stays within the range of its control points. The degree is at most `points` - 1.
    """
    degree = min(degree, points - 1)
    knots = np.concatenate([np.zeros(degree), np.linspace(0, 1, points - degree + 1), np.ones(degree)])
    steps = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
    # Degree 0: the interval between two knots that contains the step; the last step belongs to the last interval.
    interval = np.clip(np.searchsorted(knots, steps, side="right") - 1, degree, points - 1)
    values = (np.arange(len(knots) - 1) == interval[:, None]).astype(float)
    for k in range(1, degree + 1):
        width = knots[k:] - knots[:-k]
        share = (steps[:, None] - knots[:-k]) / np.where(width > 0, width, np.inf)
        values = share[:, :-1] * values[:, :-1] + (1 - share[:, 1:]) * values[:, 1:] * (width[1:] > 0)
    return values
