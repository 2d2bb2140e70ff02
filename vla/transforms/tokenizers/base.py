"""The action tokenizer interface, the registry of tokenizers, and their construction from saved values.

Owns: the interface. A tokenizer maps action chunks [H, D] in [-1, 1] to ids in 0..vocab_size-1 and back. It also
defines which ids are allowed at each position, so that decoding cannot produce a malformed chunk. Sequences have a
fixed length, or a variable length and end with the id `end`. A tokenizer does not know normalisation, or the position
of its ids in a language model's vocabulary (`VLAConfig.action_token_begin`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from vla.errors import ConfigError
from vla.support.registry import Registry


class ActionTokenizer(ABC):
    """Chunks [..., H, D] in [-1, 1] <-> ids [..., T], T = max_tokens.

    Attributes:
        horizon: H, actions per chunk.
        action_dim: D, dimensions of an action.
        active: encoded dimensions, in ascending order. The others are constant and decode to 0, which un-normalises to
            their constant value.
        vocab_size: number of ids, 0..vocab_size-1.
        max_tokens: T, ids per chunk. Shorter sequences are padded with `end`.
        end: the id that ends a sequence of variable length; None: every sequence has T tokens.
        tokens_per_action: ids per action if each action has its own tokens; None if tokens span several actions or the
            length is variable.
        anytime: whether the first n >= 1 tokens of a sequence decode to a whole, coarser chunk.
    """

    horizon: int
    action_dim: int
    active: list[int]
    vocab_size: int
    max_tokens: int
    end: int | None = None
    tokens_per_action: int | None = None
    anytime: bool = False

    def __init__(self, horizon: int, action_dim: int, active: Sequence[int] | None = None) -> None:
        if horizon < 1 or action_dim < 1:
            raise ValueError(f"horizon and action_dim must be at least 1, got {horizon} and {action_dim}.")
        self.horizon, self.action_dim = horizon, action_dim
        self.active = list(range(action_dim)) if active is None else [int(dim) for dim in active]
        if (
            not self.active
            or sorted(set(self.active)) != self.active
            or not 0 <= self.active[0] <= self.active[-1] < action_dim
        ):
            raise ValueError(
                f"active must list dimensions in 0..{action_dim - 1} in ascending order, got {self.active}."
            )

    @classmethod
    @abstractmethod
    def fit(
        cls, actions: np.ndarray, horizon: int, n_bins: int | None = None, active: Sequence[int] | None = None
    ) -> Self:
        """Fit a tokenizer to a dataset.

        Args:
            actions: float [N, D], all normalised actions of the dataset.
            n_bins: resolution; None: the tokenizer's default.
            active: dimensions that are not constant.
        Raises:
            ConfigError: the tokenizer does not support this number of bins.
        """

    @abstractmethod
    def encode(self, chunks: np.ndarray) -> np.ndarray:
        """float [..., H, D] -> int64 [..., T]. Values outside [-1, 1] are clipped."""

    @abstractmethod
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int [..., T] -> float32 [..., H, D] in [-1, 1]. ValueError if an id is not allowed.

        If each action has its own tokens, the first n actions of a chunk can be decoded alone:
        int [..., n * tokens_per_action] -> float32 [..., n, D]. If the tokenizer is `anytime`, the first n tokens
        decode to a whole chunk: int [..., n] -> float32 [..., H, D].
        """

    def allowed(self, ids: np.ndarray) -> np.ndarray | None:
        """The ids allowed at positions 0..t, each given the ids before it; None: all ids at all positions.

        After a valid sequence, at least one id is allowed; after `end`, only `end` is allowed. Every valid sequence of
        T ids decodes to a chunk. After an invalid sequence (as in a draft), the result is arbitrary.

        Args:
            ids: int64 [B, t], t < T.
        Returns:
            bool [B, t + 1, vocab_size].
        """
        return None

    def token_mask(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The tokens that contribute to the loss, bool [..., T].

        Tokens after `end` never contribute. If tokens span several actions, all tokens of a chunk contribute if at
        least one of its actions is to be learned.

        Args:
            ids: the encoded chunks [..., T].
            valid: the actions to learn, bool [..., H].
        """
        if self.tokens_per_action is not None:
            return np.repeat(np.asarray(valid, bool), self.tokens_per_action, axis=-1)
        return ~self.ended(ids)[..., :-1] & np.any(valid, axis=-1, keepdims=True)

    def expect(self, probabilities: np.ndarray) -> np.ndarray:
        """Token probabilities [..., T, vocab_size] -> expected chunk, float32 [..., H, D].

        The first n actions can be decoded alone, as in `decode`. ConfigError if the tokenizer does not support this.
        """
        raise ConfigError(f"action tokenizer {self.name!r} does not support readout 'mean'; use readout 'mode'.")

    def soft_targets(self, sigma: float) -> np.ndarray:
        """Per id, the distribution over all ids that it stands for as a soft label, float32 [vocab_size, vocab_size]:
        a Gaussian with a standard deviation of `sigma` ids. ConfigError if neighbouring ids are not similar actions."""
        raise ConfigError(
            f"label_sigma needs a tokenizer whose neighbouring ids are similar actions, such as 'uniform', not "
            f"{self.name!r}. Set label_sigma to 0."
        )

    def to_dict(self) -> dict[str, Any]:
        """The registered name and the constructor's arguments, as JSON values. Subclasses add their own arguments."""
        return {"name": self.name, "horizon": self.horizon, "action_dim": self.action_dim, "active": self.active}

    @property
    def name(self) -> str:
        """The registered name of the class. ConfigError if it is not registered."""
        for name in TOKENIZERS:
            if TOKENIZERS.get(name) is type(self):
                return name
        raise ConfigError(f"{type(self).__name__} is not registered: decorate it with `@TOKENIZERS.register(name)`.")

    @functools.cached_property
    def constrained(self) -> bool:
        """Whether some ids are not allowed at some positions."""
        return self.allowed(np.zeros((1, 0), np.int64)) is not None

    def ended(self, ids: np.ndarray) -> np.ndarray:
        """Whether the sequence has ended before position 0, 1, ..., t: int [..., t] -> bool [..., t + 1]."""
        ends = np.asarray(ids) == (-1 if self.end is None else self.end)
        none = np.zeros((*ends.shape[:-1], 1), bool)
        return np.logical_or.accumulate(np.concatenate([none, ends], axis=-1), axis=-1)

    def entries(self, chunks: np.ndarray) -> np.ndarray:
        """The values of the active dimensions: float [..., H, D] -> float64 [..., H, n active], clipped to [-1, 1].

        ValueError if the shape is wrong or a value is not finite.
        """
        chunks = np.asarray(chunks, np.float64)
        if chunks.shape[-2:] != (self.horizon, self.action_dim):
            raise ValueError(f"expected chunks [..., {self.horizon}, {self.action_dim}], got {chunks.shape}.")
        if not np.isfinite(chunks).all():
            raise ValueError("a chunk contains values that are not finite.")
        return np.clip(chunks[..., self.active], -1.0, 1.0)

    def chunks(self, entries: np.ndarray) -> np.ndarray:
        """Values of the active dimensions [..., n, n active] -> float32 [..., n, D], with 0 in all other dimensions."""
        chunks = np.zeros((*entries.shape[:-1], self.action_dim), np.float32)
        chunks[..., self.active] = entries
        return chunks

    def check_ids(self, ids: np.ndarray) -> np.ndarray:
        """The ids as int64. ValueError if `decode` cannot decode them."""
        ids = np.asarray(ids, np.int64)
        length, size = ids.shape[-1], self.tokens_per_action
        part = 0 < length < self.max_tokens and (self.anytime or (size is not None and length % size == 0))
        if length != self.max_tokens and not part:
            raise ValueError(f"a chunk has {self.max_tokens} tokens, got {length}.")
        bad = (ids < 0) | (ids >= self.vocab_size)
        if bad.any():
            raise ValueError(f"id {int(ids[bad][0])} is not an action token; valid: 0..{self.vocab_size - 1}.")
        if self.constrained and ids.size:
            flat = ids.reshape(-1, length)
            permitted = np.take_along_axis(self.allowed(flat[:, :-1]), flat[..., None], axis=-1)[..., 0]
            if not permitted.all():
                row, place = np.argwhere(~permitted)[0]
                raise ValueError(f"id {flat[row, place]} is not allowed at position {place} of {flat[row].tolist()}.")
        return ids


TOKENIZERS: Registry[type[ActionTokenizer]] = Registry("action tokenizer")


def build(values: Mapping[str, Any]) -> ActionTokenizer:
    """Build a tokenizer from the values of `ActionTokenizer.to_dict`. ConfigError if its name is not registered."""
    arguments = dict(values)
    return TOKENIZERS.get(arguments.pop("name", ""))(**arguments)
