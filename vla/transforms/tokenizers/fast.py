"""FAST: a chunk as compressed frequencies, in a sequence of variable length (Pertsch et al., 2025, arXiv:2501.09747).

Owns: the discrete cosine transform (DCT) of a chunk, the rounding of its coefficients, and their byte-pair encoding
(BPE). A BPE piece represents one or more coefficients; it is allowed if a chunk has that many coefficients left. A
piece of length one exists for every value, so every sequence can be completed.

Rounding costs accuracy: for smooth chunks, the error of an entry is up to 0.06 with scale 10, compared with 0.004 for
255 bins. FAST is efficient for long, smooth chunks, most of whose coefficients are 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from vla.errors import ConfigError
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer

SCALE = 10.0  # coefficients are rounded to multiples of 1 / SCALE
ROWS = 256  # default number of ids
CHUNKS = 20_000  # maximum number of chunks used to fit a vocabulary
Coefficients = tuple[int, ...]
_FIRST = 0x4E00  # code point of the lowest coefficient; this range has no special characters


@TOKENIZERS.register("fast")
class Fast(ActionTokenizer):
    """Pieces of rounded DCT coefficients.

    With C = DCT-II(chunk, over time, orthonormal), the coefficients are round(scale * C), lowest frequency first and
    all dimensions of a frequency together. |C| <= sqrt(H) for entries in [-1, 1], so no coefficient is ever clipped.

    Attributes:
        scale: resolution of the coefficients.
        merges: for each piece of more than one coefficient, the ids of its two parts. The first ids are single
            coefficients.
    """

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        scale: float,
        merges: Sequence[Sequence[int]],
        active: Sequence[int] | None = None,
    ) -> None:
        super().__init__(horizon, action_dim, active)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive, got {scale}.")
        self.scale, self.merges = float(scale), [(int(first), int(second)) for first, second in merges]
        self._lowest = -_highest(horizon, scale)
        self._pieces = [[code] for code in range(1 - 2 * self._lowest)]
        for first, second in self.merges:
            if not (0 <= first < len(self._pieces) and 0 <= second < len(self._pieces)):
                raise ValueError(f"merge ({first}, {second}) refers to an id that is not defined before it.")
            self._pieces.append(self._pieces[first] + self._pieces[second])
        self.max_tokens = horizon * len(self.active)
        self.end = len(self._pieces)
        self.vocab_size = self.end + 1
        self._lengths = np.array([*map(len, self._pieces), 0])
        self._dct = dct_matrix(horizon)
        texts = ["".join(chr(_FIRST + code) for code in piece) for piece in self._pieces]
        vocabulary = {text: id for id, text in enumerate(texts)}
        if len(vocabulary) < len(texts):
            raise ValueError("two pieces represent the same coefficients.")
        self._bpe = Tokenizer(BPE(vocabulary, [(texts[first], texts[second]) for first, second in self.merges]))

    @classmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        """Fit the vocabulary to the most frequent sequences of coefficients. `n_bins` is the number of ids."""
        rows = n_bins or ROWS
        _check_ids(rows, horizon, SCALE)
        plain = cls(horizon, actions.shape[-1], SCALE, [], active)
        # These include a few chunks that span two episodes.
        last = max(len(actions) - horizon, 0)
        starts = np.unique(np.linspace(0, last, min(last + 1, CHUNKS)).astype(int))
        steps = np.minimum(starts[:, None] + np.arange(horizon), len(actions) - 1)
        texts = plain._texts(np.clip(actions[steps], -1, 1))
        bpe = Tokenizer(BPE())
        alphabet = [chr(_FIRST + code) for code in range(len(plain._pieces))]
        bpe.train_from_iterator(
            texts, BpeTrainer(vocab_size=rows - 1, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
        )
        merges = [
            tuple(tuple(ord(character) - _FIRST + plain._lowest for character in text) for text in pair)
            for pair in json.loads(bpe.to_str())["model"]["merges"]
        ]
        return cls.from_pieces(horizon, actions.shape[-1], SCALE, merges, rows, active)

    @classmethod
    def from_pieces(
        cls,
        horizon: int,
        action_dim: int,
        scale: float,
        merges: Sequence[Sequence[Coefficients]],
        n_ids: int,
        active: Sequence[int] | None = None,
    ) -> Self:
        """A tokenizer with a given vocabulary.

        Args:
            merges: the coefficients of the two parts of each merge, in the order of BPE. Merges of coefficients that do
                not occur with this horizon, or of parts that are no pieces, are skipped.
            n_ids: number of ids; the last merges are omitted if they are more.
        Raises:
            ConfigError: `n_ids` is too small for the single coefficients and the end.
        """
        highest = _highest(horizon, scale)
        _check_ids(n_ids, horizon, scale)
        known: dict[Coefficients, int] = {(code - highest,): code for code in range(2 * highest + 1)}
        chosen: list[tuple[int, int]] = []
        for first, second in merges:
            if len(known) < n_ids - 1 and first in known and second in known and first + second not in known:
                chosen.append((known[first], known[second]))
                known[first + second] = len(known)
        return cls(horizon, action_dim, scale, chosen, active)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"scale": self.scale, "merges": [list(pair) for pair in self.merges]}

    def encode(self, chunks: np.ndarray) -> np.ndarray:
        texts = self._texts(chunks)
        ids = np.full((len(texts), self.max_tokens), self.end, np.int64)
        for row, encoded in zip(ids, self._bpe.encode_batch(texts), strict=True):
            row[: len(encoded.ids)] = encoded.ids
        return ids.reshape(*np.shape(chunks)[:-2], self.max_tokens)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        ids = self.check_ids(ids)
        rows = ids.reshape(-1, self.max_tokens)
        codes = np.array([code for row in rows for id in row if id != self.end for code in self._pieces[id]])
        coefficients = (codes.reshape(-1, self.horizon, len(self.active)) + self._lowest) / self.scale
        entries = np.clip(self._dct.T @ coefficients, -1, 1)
        return self.chunks(entries).reshape(*ids.shape[:-1], self.horizon, self.action_dim)

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        spent = np.cumsum(self._lengths[ids], axis=1)
        remaining = self.max_tokens - np.concatenate([np.zeros((len(ids), 1), int), spent], axis=1)
        allowed = self._lengths <= remaining[..., None]
        allowed[..., self.end] = remaining == 0
        return allowed

    def _texts(self, chunks: np.ndarray) -> list[str]:
        """The rounded coefficients of chunks [..., H, D], one character each."""
        coefficients = np.rint(self.scale * (self._dct @ self.entries(chunks))).astype(int) - self._lowest
        return ["".join(chr(_FIRST + code) for code in row) for row in coefficients.reshape(-1, self.max_tokens)]


def dct_matrix(n: int) -> np.ndarray:
    """The matrix of the orthonormal DCT-II, float64 [n, n]. Row k gives the coefficient of frequency k."""
    steps = np.arange(n)
    matrix = np.sqrt(2 / n) * np.cos(np.pi * (steps + 0.5) * steps[:, None] / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def _highest(horizon: int, scale: float) -> int:
    """Upper bound of the rounded coefficients. The largest coefficient is sqrt(H), of a constant chunk of ones."""
    return math.ceil(scale * math.sqrt(horizon))


def _check_ids(n_ids: int, horizon: int, scale: float) -> None:
    """Raise ConfigError if `n_ids` is too small for all single coefficients and the end."""
    fewest = 2 * _highest(horizon, scale) + 2
    if n_ids < fewest:
        raise ConfigError(
            f"tokenizer 'fast' needs at least {fewest} ids (`bins`) for chunks of {horizon} actions, got {n_ids}."
        )
