"""Constrained decoding: logits masked by the ids that an action tokenizer allows.

Owns: masking logits so that every decoded sequence is a valid chunk, and padding sequences of variable length. Bin
tokenizers allow every id at every position, so their logits do not change. It does not know how tokens are chosen.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from vla.decoding.result import Decoded
from vla.transforms.tokenizers.base import ActionTokenizer


def constrain(tokenizer: ActionTokenizer, logits: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Set the logits of ids that are not allowed at their position to minus infinity.

    Args:
        logits: [B, n, rows], for the last n of the positions 0..t.
        before: int64 [B, t], the tokenizer's ids at positions 0..t-1.
    """
    if not tokenizer.constrained:
        return logits
    allowed = tokenizer.allowed(before.cpu().numpy())
    assert allowed is not None
    allowed = allowed[:, -logits.shape[1] :]
    # A draft may contain ids that are not allowed. After such an id, a position may have no allowed id. Its logits stay
    # unmasked, because a softmax over minus infinity only would be NaN.
    ruled_out = torch.from_numpy(~allowed & allowed.any(axis=-1, keepdims=True))
    return logits.masked_fill(ruled_out.to(logits.device), -torch.inf)


def all_ended(tokenizer: ActionTokenizer, ids: torch.Tensor) -> bool:
    """Whether all sequences of tokenizer ids, int64 [B, n], have ended. After `end`, only `end` is allowed."""
    return tokenizer.end is not None and bool((ids[:, -1] == tokenizer.end).all())


def completed(tokenizer: ActionTokenizer, begin: int, decoded: Decoded, n_tokens: int) -> Decoded:
    """If all sequences have ended, pad them to `n_tokens` with `end`, at a probability of 1. `begin` is the id of the
    first action row."""
    missing = n_tokens - decoded.ids.shape[1]
    if not missing or not all_ended(tokenizer, decoded.ids - begin):
        return decoded
    logits = F.pad(decoded.logits, (0, 0, 0, missing), value=-torch.inf)
    logits[:, -missing:, tokenizer.end] = 0
    ids = F.pad(decoded.ids, (0, missing), value=begin + (tokenizer.end or 0))
    return dataclasses.replace(decoded, ids=ids, logits=logits)


def most_likely(tokenizer: ActionTokenizer, logits: torch.Tensor) -> torch.Tensor:
    """The most likely allowed token at each position, int64 [B, T], from logits [B, T, rows]."""
    if not tokenizer.constrained:
        return logits.argmax(-1)
    ids = torch.zeros(len(logits), 0, dtype=torch.int64, device=logits.device)
    for place in range(logits.shape[1]):
        ids = torch.cat([ids, constrain(tokenizer, logits[:, place, None], ids).argmax(-1)], dim=1)
    return ids
