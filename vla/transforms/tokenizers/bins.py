"""Binning tokenizers: the token of an action dimension is the index of its bin.

Owns: uniform bins, quantile bins, and OpenVLA's bins (arXiv:2406.09246). A chunk [H, D] is flattened action by action,
in the order of the dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from vla.errors import ConfigError
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer

DEFAULT_BINS = 255  # odd, so that one bin centre is exactly 0


class _Bins(ActionTokenizer):
    """Base class of the three tokenizers. Subclasses define the map between values and ids."""

    def __init__(self, horizon: int, action_dim: int, n_bins: int, active: Sequence[int] | None = None) -> None:
        super().__init__(horizon, action_dim, active)
        if n_bins < 2:
            raise ValueError(f"n_bins must be at least 2, got {n_bins}.")
        self.vocab_size, self.tokens_per_action = n_bins, len(self.active)
        self.max_tokens = horizon * self.tokens_per_action

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        return cls(horizon, actions.shape[-1], n_bins or DEFAULT_BINS, active)

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        ids = self._to_ids(self.entries(chunks))
        return ids.reshape(*ids.shape[:-2], self.max_tokens)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        ids = self.check_ids(ids)
        return self.chunks(self._to_values(ids.reshape(*ids.shape[:-1], -1, len(self.active))))

    def expect(self, probabilities: np.ndarray) -> np.ndarray:
        by_action = probabilities.reshape(*probabilities.shape[:-2], -1, len(self.active), self.vocab_size)
        return self.chunks((by_action * self.centres()).sum(-1))

    def centres(self) -> np.ndarray:
        """Bin centres, float32 [n active, vocab_size]: the value of each id, per active dimension."""
        ids = np.broadcast_to(np.arange(self.vocab_size)[:, None], (self.vocab_size, len(self.active)))
        return self._to_values(ids).T.astype(np.float32)

    def soft_targets(self, sigma: float) -> np.ndarray:
        ids = np.arange(self.vocab_size)
        weights = np.exp(-(((ids[:, None] - ids) / sigma) ** 2) / 2)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    @abstractmethod
    def _to_ids(self, values: np.ndarray) -> np.ndarray:
        """Clipped values [..., n active] -> ids of the same shape."""

    @abstractmethod
    def _to_values(self, ids: np.ndarray) -> np.ndarray:
        """Ids [..., n active] -> bin centres of the same shape."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"n_bins": self.vocab_size}


@TOKENIZERS.register("uniform")
class UniformBins(_Bins):
    """`n_bins` equal bins on [-1, 1]. With an odd number, one centre is exactly 0. Round-trip error <= 1 / n_bins."""

    def _to_ids(self, values: np.ndarray) -> np.ndarray:
        ids = np.floor((values + 1) * (self.vocab_size / 2)).astype(np.int64)
        return np.minimum(ids, self.vocab_size - 1)

    def _to_values(self, ids: np.ndarray) -> np.ndarray:
        return (2 * ids + 1) / self.vocab_size - 1


@TOKENIZERS.register("openvla")
class OpenVLABins(_Bins):
    """OpenVLA's tokenizer: 256 edges on [-1, 1] and 255 centres; the highest value has the lowest id.

    With `d = digitize(a, linspace(-1, 1, 256))` in 1..256, the id is `256 - d`, relative to the first action token.
    d = 255 and d = 256 share the last centre. Source: OpenVLA (Kim et al., arXiv:2406.09246).
    """

    def __init__(self, horizon: int, action_dim: int, n_bins: int = 256, active: Sequence[int] | None = None) -> None:
        super().__init__(horizon, action_dim, n_bins, active)
        self._edges = np.linspace(-1.0, 1.0, n_bins)
        self._centres = (self._edges[:-1] + self._edges[1:]) / 2

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        """`active` is ignored: as in OpenVLA, constant dimensions also have tokens."""
        if n_bins not in (None, 256):
            raise ConfigError(f"tokenizer 'openvla' has 256 bins, not {n_bins}; omit `bins`.")
        return cls(horizon, actions.shape[-1])

    def _to_ids(self, values: np.ndarray) -> np.ndarray:
        return self.vocab_size - np.digitize(values, self._edges)

    def _to_values(self, ids: np.ndarray) -> np.ndarray:
        return self._centres[np.clip(self.vocab_size - ids - 1, 0, self.vocab_size - 2)]


@TOKENIZERS.register("quantile")
class QuantileBins(_Bins):
    """Bins with equal counts, per dimension: narrow where actions are frequent, wide where they are rare.

    A value is encoded as the bin with the nearest centre.

    Attributes:
        values: float [n active, n_bins], the bin centres in increasing order.
    """

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        n_bins: int,
        values: Sequence[Sequence[float]],
        active: Sequence[int] | None = None,
    ) -> None:
        super().__init__(horizon, action_dim, n_bins, active)
        self.values = np.asarray(values, np.float64)
        if self.values.shape != (len(self.active), n_bins) or (np.diff(self.values, axis=1) <= 0).any():
            raise ValueError(
                f"values must increase and have shape [{len(self.active)}, {n_bins}], got {self.values.shape}."
            )
        self._edges = (self.values[:, :-1] + self.values[:, 1:]) / 2

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        """Fit the centres to the quantiles (k + 1/2) / n_bins of normalised actions [N, D]."""
        n_bins = n_bins or DEFAULT_BINS
        dims = list(range(actions.shape[-1]) if active is None else active)
        shares = (np.arange(n_bins) + 0.5) / n_bins
        values = np.quantile(np.clip(actions, -1, 1), shares, axis=0).T[dims]
        # Repeated actions would give equal centres. Blending in 1 % of the uniform grid keeps them distinct.
        values = 0.99 * values + 0.01 * (2 * shares - 1)
        return cls(horizon, actions.shape[-1], n_bins, values.tolist(), active)

    def _to_ids(self, values: np.ndarray) -> np.ndarray:
        columns = [np.searchsorted(edges, values[..., i], side="right") for i, edges in enumerate(self._edges)]
        return np.stack(columns, axis=-1)

    def _to_values(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([centres[ids[..., i]] for i, centres in enumerate(self.values)], axis=-1)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"values": self.values.tolist()}
