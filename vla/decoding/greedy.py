"""Greedy decoding of exactly one chunk per prefix, restricted to the action rows.

Owns: two decoders that give the same tokens: `reference` through transformers' `generate`, and `greedy`, a direct loop
over the KV cache. In both a malformed chunk is unrepresentable: the argmax runs over the action rows alone, for exactly
the number of tokens that the tokenizer needs. It does not know what the tokens mean.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vla.model.modeling import VLAForActionPrediction


class OnlyActionRows(LogitsProcessor):
    """Sets every logit outside ids begin..end-1 to minus infinity."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, self.begin : self.end] = scores[:, self.begin : self.end]
        return allowed


def _action_rows(model: VLAForActionPrediction) -> tuple[int, int, int]:
    tokenizer = model.config.make_action_tokenizer()
    begin = model.config.action_token_begin
    return begin, begin + tokenizer.vocab_size, tokenizer.n_tokens


@torch.inference_mode()
def reference(model: VLAForActionPrediction, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Ids int64 [B, T] of the model's vocabulary, through stock `generate`; `options` are passed to it."""
    begin, end, n_tokens = _action_rows(model)
    output = model.generate(
        **batch,
        do_sample=False,
        min_new_tokens=n_tokens,
        max_new_tokens=n_tokens,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([OnlyActionRows(begin, end)]),
        **options,
    )
    return output[:, -n_tokens:]


@torch.inference_mode()
def greedy(model: VLAForActionPrediction, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ids int64 [B, T] of the model's vocabulary: one prefill, then T - 1 decode steps.

    Args:
        batch: prefix tensors from `VLAProcessor`, on the model's device.
    """
    begin, end, n_tokens = _action_rows(model)
    decoder, head = model.language_model.model, model.language_model.lm_head.weight[begin:end]
    table: torch.Tensor = model.language_model.get_input_embeddings().weight[begin:end]
    mask = batch["attention_mask"]
    padded = not bool(mask.all())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.embed(batch["input_ids"], batch["pixel_values"], batch.get("state"))
    cache = DynamicCache(config=model.config.text_config)
    position = positions[:, -1:]
    rows = []
    for step in range(n_tokens):
        output = decoder(
            inputs_embeds=hidden,
            attention_mask=mask if padded else None,
            position_ids=positions if step == 0 else position,
            past_key_values=cache,
            use_cache=True,
        )
        row = (output.last_hidden_state[:, -1] @ head.T).argmax(-1)
        rows.append(row)
        hidden, position = table[row].unsqueeze(1), position + 1
        if padded:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(rows, dim=1) + begin
