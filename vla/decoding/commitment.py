"""Actions that are executed while the next chunk is decoded, as its first tokens.

Owns: how many of a draft's tokens are given, and when they are no longer believed. It does not know how chunks are
decoded.

A policy that learned from demonstrations goes on as before nearly always, so a plan that the world has made wrong would
continue itself for ever (docs/log.md). Therefore a given token counts only as long as the network finds it plausible in
view of the pictures; from the first one that it does not, the chunk is decoded freely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Commitment(NamedTuple):
    """Of each row of a batch: the first `counts` int64 [B] tokens of its draft are given, and believed while the
    network's probability of them is at least `trust` float32 [B] of that of its best token. 0: always."""

    counts: torch.Tensor
    trust: torch.Tensor

    def believed(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """bool [B, n]: whether `tokens` int64 [B, n] are plausible where the network says `logits` [B, n, rows]."""
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return own >= logits.max(-1).values + self.trust.to(logits.device).log()[:, None]
