"""The interface of an action tokenizer, and the one place where a name becomes a tokenizer.

Owns: what a tokenizer is. Action chunks [H, D] in [-1, 1] become a fixed number of ids in 0..vocab_size-1 and back; ids
only, never strings. It does not know normalisation (values come in normalised), nor where in a language model's
vocabulary the ids live (the model's config adds `action_token_begin`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.errors import ConfigError, unknown


class ActionTokenizer(ABC):
    """Chunks [..., H, D] in [-1, 1] <-> ids [..., n_tokens].

    Attributes:
        horizon: H, actions per chunk.
        action_dim: D.
        vocab_size: ids are 0..vocab_size-1.
        n_tokens: ids per chunk; always the same, so that every decoded sequence is a valid chunk.
        tokens_per_action: ids per action, where each action has its own; None where a token speaks about several.
    """

    name: str
    horizon: int
    action_dim: int
    vocab_size: int
    n_tokens: int
    tokens_per_action: int | None = None

    @abstractmethod
    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """float [..., H, D] -> int64 [..., n_tokens]; values outside [-1, 1] are clipped."""

    @abstractmethod
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int [..., n_tokens] -> float32 [..., H, D]. Ids outside 0..vocab_size-1 are a ValueError.

        Where actions have tokens of their own, the first actions of a chunk can be decoded alone: int [..., n *
        tokens_per_action] -> float32 [..., n, D]."""

    def expect(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities [..., n_tokens, vocab_size] of each token -> mean chunk, float32 [..., H, D]; the first actions
        alone as in `decode`. ConfigError where tokens have no values of their own."""
        raise ConfigError(f"action tokenizer {self.name!r} has no mean value of a token; use readout 'mode'.")

    @abstractmethod
    def token_mask(self, valid: np.ndarray) -> np.ndarray:
        """bool [..., H] (actions that exist) -> bool [..., n_tokens] (tokens to learn)."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything `build` needs to make an equal tokenizer, as JSON values."""

    def check_ids(self, ids: np.ndarray) -> np.ndarray:
        """The ids as int64, or a ValueError naming one that this tokenizer cannot have produced."""
        ids = np.asarray(ids, np.int64)
        length, size = ids.shape[-1], self.tokens_per_action
        if length != self.n_tokens and (size is None or length % size or length > self.n_tokens):
            raise ValueError(f"a chunk has {self.n_tokens} tokens, got {ids.shape[-1]}.")
        bad = (ids < 0) | (ids >= self.vocab_size)
        if bad.any():
            raise ValueError(f"id {int(ids[bad][0])} is not an action token; valid: 0..{self.vocab_size - 1}.")
        return ids


def build(values: Mapping[str, Any]) -> ActionTokenizer:
    """Inverse of `ActionTokenizer.to_dict`."""
    from vla.transforms.tokenizers.bins import OpenVLABins, QuantileBins, UniformBins

    kinds: Sequence[type[ActionTokenizer]] = (UniformBins, QuantileBins, OpenVLABins)
    arguments = dict(values)
    name = arguments.pop("name", None)
    for kind in kinds:
        if kind.name == name:
            return kind(**arguments)
    raise ConfigError(unknown("action tokenizer", name, [kind.name for kind in kinds]))
