"""Prefix conditioning: a chunk begins with the action prefix, the actions that execute while the chunk is decoded.

Owns: the length of the action prefix in tokens, and its acceptance threshold. It does not know how chunks are decoded.

Imitation policies mostly extrapolate an action prefix, so a stale plan would perpetuate itself (docs/log.md). A token
of the prefix is therefore accepted only if the network finds it plausible for the current images; from the first
rejected token on, the chunk is decoded freely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Prefix(NamedTuple):
    """The action prefixes of a batch of drafts.

    Attributes:
        counts: int64 [B], number of first tokens of each draft that form its action prefix.
        threshold: float32 [B], acceptance threshold: a token is accepted if its probability is at least this share of
            the best token's probability; 0 accepts all tokens.
    """

    counts: torch.Tensor
    threshold: torch.Tensor

    def accepted(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Whether `tokens`, int64 [B, n], pass the threshold under `logits` [B, n, rows], bool [B, n]. Ids that are not
        allowed (minus infinity) never pass."""
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        enough = logits.max(-1).values + self.threshold.to(logits.device).log()[:, None]
        return (own > -torch.inf) & (own >= enough)
