"""Decimal digits: each entry of a chunk as an integer, digit by digit (after VLA-0; Goyal et al., 2025,
arXiv:2510.13054).

Owns: the conversion of values to integers with a fixed number of digits. VLA-0 writes such numbers as text; here, the
ten digits are action tokens, so sequences have a fixed length and need no separators. The resolution is fine with only
ten ids, but every entry takes `n_digits` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from vla.errors import ConfigError
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer

DIGITS = 3
_MOST = 6  # maximum number of digits, about the resolution of a float32


@TOKENIZERS.register("digits")
class Digits(ActionTokenizer):
    """The number round((value + 1) / 2 * (10^n_digits - 1)), most significant digit first; digit k has the id k."""

    vocab_size = 10

    def __init__(
        self, horizon: int, action_dim: int, n_digits: int = DIGITS, active: Sequence[int] | None = None
    ) -> None:
        super().__init__(horizon, action_dim, active)
        if not 1 <= n_digits <= _MOST:
            raise ValueError(f"n_digits must be between 1 and {_MOST}, got {n_digits}.")
        self.n_digits, self._highest = n_digits, 10**n_digits - 1
        self.tokens_per_action = n_digits * len(self.active)
        self.max_tokens = horizon * self.tokens_per_action
        self._places = 10 ** np.arange(n_digits)[::-1]

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        """`n_bins` must be the number of ids, 10."""
        if n_bins not in (None, 10):
            raise ConfigError(f"tokenizer 'digits' has 10 ids, not {n_bins}; omit `bins`.")
        return cls(horizon, actions.shape[-1], active=active)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"n_digits": self.n_digits}

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        numbers = np.rint((self.entries(chunks) + 1) / 2 * self._highest).astype(np.int64)
        digits = numbers[..., None] // self._places % 10
        return digits.reshape(*numbers.shape[:-2], self.max_tokens)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        ids = self.check_ids(ids)
        digits = ids.reshape(*ids.shape[:-1], -1, len(self.active), self.n_digits)
        return self.chunks((digits @ self._places) * (2 / self._highest) - 1)
