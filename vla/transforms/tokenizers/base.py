"""The action tokenizer interface, and the construction of tokenizers from their saved values.

Owns: the interface. A tokenizer maps action chunks [H, D] in [-1, 1] to a fixed number of ids in 0..vocab_size-1 and
back. It works on ids, never on strings. It does not know normalisation (inputs are already normalised), nor where the
ids start in a language model's vocabulary (the model's config adds `action_token_begin`).
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
        name: the tokenizer's name in configurations and checkpoints.
        horizon: H, actions per chunk.
        action_dim: D, entries per action.
        vocab_size: number of ids; they are 0..vocab_size-1.
        n_tokens: ids per chunk. It is constant, so every decoded sequence is a valid chunk.
        tokens_per_action: ids per action if each action has its own tokens; None if tokens are shared between actions.
    """

    name: str
    horizon: int
    action_dim: int
    vocab_size: int
    n_tokens: int
    tokens_per_action: int | None = None

    @abstractmethod
    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """float [..., H, D] -> int64 [..., n_tokens]. Values outside [-1, 1] are clipped."""

    @abstractmethod
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int [..., n_tokens] -> float32 [..., H, D]. ValueError for ids outside 0..vocab_size-1.

        If each action has its own tokens, the first n actions of a chunk can be decoded alone:
        int [..., n * tokens_per_action] -> float32 [..., n, D].
        """

    def expect(self, probabilities: np.ndarray) -> np.ndarray:
        """Token probabilities [..., n_tokens, vocab_size] -> expected chunk, float32 [..., H, D].

        The first n actions can be decoded alone, as in `decode`. ConfigError if single tokens have no value.
        """
        raise ConfigError(f"action tokenizer {self.name!r} has no value per token, so no mean; use readout 'mode'.")

    @abstractmethod
    def token_mask(self, valid: np.ndarray) -> np.ndarray:
        """Action mask bool [..., H] -> token mask bool [..., n_tokens]; both are True for what is learned."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The arguments of `build` for an equal tokenizer, as JSON values."""

    def check_ids(self, ids: np.ndarray) -> np.ndarray:
        """The ids as int64. ValueError if this tokenizer cannot have produced them."""
        ids = np.asarray(ids, np.int64)
        length, size = ids.shape[-1], self.tokens_per_action
        if length != self.n_tokens and (size is None or length % size or length > self.n_tokens):
            raise ValueError(f"a chunk has {self.n_tokens} tokens, got {ids.shape[-1]}.")
        bad = (ids < 0) | (ids >= self.vocab_size)
        if bad.any():
            raise ValueError(f"id {int(ids[bad][0])} is not an action token; valid: 0..{self.vocab_size - 1}.")
        return ids


def build(values: Mapping[str, Any]) -> ActionTokenizer:
    """Build a tokenizer from the values of `ActionTokenizer.to_dict`. ConfigError if its name is unknown."""
    from vla.transforms.tokenizers.bins import OpenVLABins, QuantileBins, UniformBins

    kinds: Sequence[type[ActionTokenizer]] = (UniformBins, QuantileBins, OpenVLABins)
    arguments = dict(values)
    name = arguments.pop("name", None)
    for kind in kinds:
        if kind.name == name:
            return kind(**arguments)
    raise ConfigError(unknown("action tokenizer", name, [kind.name for kind in kinds]))
