"""Streaming the actions of a chunk while it is decoded.

Owns: the transformers streamer that collects tokens into complete actions. It does not know the meaning of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer


class ActionStreamer(BaseStreamer):
    """Calls `on_action(index, ids)` as soon as an action is decoded, with its ids [tokens_per_action]."""

    def __init__(self, tokens_per_action: int, on_action: Callable[[int, list[int]], None]) -> None:
        self._size, self._on_action = tokens_per_action, on_action
        self._ids: list[int] = []
        self._index = 0

    def put(self, value: torch.Tensor) -> None:
        if value.ndim > 1:  # `generate` first passes the prompt
            return
        self._ids += value.tolist()
        if len(self._ids) == self._size:
            self._on_action(self._index, self._ids)
            self._ids, self._index = [], self._index + 1

    def end(self) -> None:
        """Nothing to do: a chunk consists of complete actions."""
