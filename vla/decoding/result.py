"""The result of a decoder, with its log-probabilities and entropy.

Owns: `Decoded`, and the computation of log-probabilities and entropy from logits over the action rows. It does not know
how the tokens were chosen or what they mean.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One batch of chunks.

    Attributes:
        ids: int64 [B, T], ids of the model's vocabulary; fewer than a whole chunk if decoding was stopped early.
        logits: [B, T, rows], the network's logits over the action rows for each token, given the previous tokens;
            minus infinity for ids that the action tokenizer does not allow there.
        forwards: number of forward passes of the decoder, the prefill included.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    forwards: int

    @functools.cached_property
    def distribution(self) -> torch.Tensor:
        """log p(k | x, a_<t) over the allowed action rows, float32 [B, T, rows]."""
        return self.logits.float().log_softmax(-1)

    def log_probs(self, begin: int) -> torch.Tensor:
        """log p(a_t | x, a_<t) of the chosen tokens, float32 [B, T]; 0 after the end of a sequence. `begin` is the id
        of the first action row."""
        return self.distribution.gather(-1, (self.ids - begin).unsqueeze(-1)).squeeze(-1)

    @property
    def entropy(self) -> torch.Tensor:
        """Entropy of each token's distribution in nats, float32 [B, T], between 0 (certain; after the end of a
        sequence) and log(rows) (uniform)."""
        finite = self.distribution.clamp(min=torch.finfo(torch.float32).min)  # 0 * -inf would be NaN
        return -(self.distribution.exp() * finite).sum(-1)
