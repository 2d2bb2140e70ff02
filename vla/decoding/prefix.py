"""Prefix conditioning: actions that execute while the next chunk is decoded are its first tokens.

Owns: how many tokens of a draft are given, and the threshold up to which they are accepted. It does not know how chunks
are decoded.

Imitation policies mostly extrapolate a given prefix, so a stale plan would perpetuate itself (docs/log.md). A given
token is therefore accepted only while the network finds it plausible for the current images; from the first rejected
token on, the chunk is decoded freely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Prefix(NamedTuple):
    """Of each row of a batch, the first `counts` int64 [B] tokens of its draft are given. They are accepted while the
    network's probability of them is at least `threshold` float32 [B] times that of its best token; 0: always."""

    counts: torch.Tensor
    threshold: torch.Tensor

    def accepted(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """bool [B, n]: whether `tokens` int64 [B, n] pass the threshold under `logits` [B, n, rows]. Ids that are not
        allowed (minus infinity) never do."""
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        enough = logits.max(-1).values + self.threshold.to(logits.device).log()[:, None]
        return (own > -torch.inf) & (own >= enough)
