"""Principal components: a chunk as a sum of patterns, from coarse to fine.

Owns: the patterns, fitted to the chunks of a dataset, and the bins of their coefficients. The first token is the
coefficient of the pattern that explains most of the variance; each further token adds detail. The first n tokens
therefore decode to a whole chunk, and decoding can stop at a deadline (`DecodingConfig.deadline_ms`). Ordered Action
Tokenization (Liu et al., 2026, arXiv:2602.04215) learns such tokens with a neural network. Principal components are the
linear case: they need no training, and minimise the squared error among linear patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from vla.errors import ConfigError
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer
from vla.transforms.tokenizers.bins import DEFAULT_BINS

RESIDUAL = 0.05  # maximum RMS error per entry, before rounding; determines the number of patterns
CHUNKS = 20_000  # maximum number of chunks used to fit the patterns


@TOKENIZERS.register("pca")
class Components(ActionTokenizer):
    """chunk = mean + sum_k c_k * pattern_k, one token per coefficient c_k, in the order of their variance.

    All coefficients are rounded to multiples of the same step, which needs the fewest bits for a given error (reverse
    water-filling). Later coefficients are smaller and use fewer of the ids.

    Attributes:
        n_bins: number of ids.
        limit: largest magnitude of a coefficient; larger ones are clipped.
        mean: mean chunk [H * n active].
        patterns: orthonormal patterns [T, H * n active].
    """

    anytime = True

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        n_bins: int,
        limit: float,
        mean: Sequence[float],
        patterns: Sequence[Sequence[float]],
        active: Sequence[int] | None = None,
    ) -> None:
        super().__init__(horizon, action_dim, active)
        self.mean, self.patterns = np.asarray(mean, np.float64), np.asarray(patterns, np.float64)
        size = horizon * len(self.active)
        if self.mean.shape != (size,) or self.patterns.ndim != 2 or self.patterns.shape[1] != size:
            raise ValueError(
                f"chunks have {size} values, got a mean of {self.mean.shape} and patterns of {self.patterns.shape}."
            )
        if n_bins < 3 or n_bins % 2 == 0:
            raise ValueError(f"n_bins must be odd and at least 3, so that a coefficient can be 0, got {n_bins}.")
        if not limit > 0:
            raise ValueError(f"limit must be positive, got {limit}.")
        self.vocab_size, self.limit, self.max_tokens = n_bins, float(limit), len(self.patterns)
        self._zero = n_bins // 2  # the id of a coefficient of 0

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        """Add patterns until chunks are approximated to `RESIDUAL`. `n_bins` must be odd."""
        if n_bins is not None and (n_bins < 3 or n_bins % 2 == 0):
            raise ConfigError(f"tokenizer 'pca' needs an odd number of bins, at least 3, got {n_bins}.")
        dims = list(range(actions.shape[-1])) if active is None else list(active)
        # These include a few chunks that span two episodes.
        starts = np.unique(np.linspace(0, len(actions) - 1, min(len(actions), CHUNKS)).astype(int))
        steps = np.minimum(starts[:, None] + np.arange(horizon), len(actions) - 1)
        chunks = np.clip(actions[steps][..., dims], -1, 1).reshape(len(starts), -1).astype(np.float64)
        mean = chunks.mean(0)
        variances, patterns = np.linalg.eigh(np.cov(chunks.T, bias=True).reshape(len(mean), len(mean)))
        variances, patterns = np.maximum(variances[::-1], 0), patterns[:, ::-1].T
        patterns *= np.sign(patterns[np.arange(len(patterns)), np.abs(patterns).argmax(1)])[:, None]
        left = np.sqrt((variances.sum() - np.cumsum(variances)).clip(0) / len(mean))
        patterns = patterns[: int(np.argmax(left <= RESIDUAL)) + 1]
        limit = np.abs((chunks - mean) @ patterns.T).max() or 1.0
        values = (n_bins or DEFAULT_BINS, round(float(limit) * 1.01, 4), mean.round(6).tolist())
        return cls(horizon, actions.shape[-1], *values, patterns.round(6).tolist(), active)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "n_bins": self.vocab_size,
            "limit": self.limit,
            "mean": self.mean.tolist(),
            "patterns": self.patterns.tolist(),
        }

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        entries = self.entries(chunks)
        flat = entries.reshape(*entries.shape[:-2], len(self.mean))
        scaled = np.rint((flat - self.mean) @ self.patterns.T / self.limit * self._zero).astype(np.int64)
        return (scaled + self._zero).clip(0, self.vocab_size - 1)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        ids = self.check_ids(ids)
        coefficients = (ids - self._zero) * (self.limit / self._zero)
        flat = self.mean + coefficients @ self.patterns[: ids.shape[-1]]
        return self.chunks(np.clip(flat, -1, 1).reshape(*ids.shape[:-1], self.horizon, len(self.active)))
