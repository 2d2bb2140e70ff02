"""Prefix conditioning: a chunk begins with the actions that execute while it is decoded (the action prefix).

Owns: the length of the action prefix in tokens, and its acceptance threshold. It does not know how chunks are decoded.

Imitation policies tend to continue an action prefix even if the images contradict it (docs/log.md). Therefore, a token
of the prefix is accepted only if the network finds it plausible for the current images. From the first rejected token
on, the chunk is decoded without the prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Prefix(NamedTuple):
    """The action prefixes of a batch of drafts.

    Attributes:
        counts: int64 [B], length of each draft's action prefix in tokens.
        threshold: float32 [B], acceptance threshold: a token is accepted if its probability is at least this fraction
            of the most likely token's; 0 accepts all tokens.
    """

    counts: torch.Tensor
    threshold: torch.Tensor

    def accepted(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each of `tokens`, int64 [B, n], is accepted given `logits` [B, n, rows]; bool [B, n]. A logit of
        minus infinity marks an id that is not allowed and never accepted."""
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        enough = logits.max(-1).values + self.threshold.to(logits.device).log()[:, None]
        return (own > -torch.inf) & (own >= enough)
