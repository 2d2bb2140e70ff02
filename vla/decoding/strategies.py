"""Every decoding strategy, through transformers' `generate`: the reference that the engine equals, and what to try
instead of greedy decoding.

Owns: how a `DecodingConfig` becomes an exact call of `generate`, the logits processors that transformers lacks, and the
restriction to action rows: a malformed chunk is unrepresentable under any strategy, because nothing else can be chosen,
for exactly the number of tokens that the tokenizer needs. It does not know what the tokens mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vla.config import GREEDY, DecodingConfig
from vla.decoding.commitment import Commitment
from vla.decoding.result import Decoded
from vla.model.modeling import VLAForActionPrediction


class OnlyActionRows(LogitsProcessor):
    """Sets every logit outside ids begin..end-1 to minus infinity."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, self.begin : self.end] = scores[:, self.begin : self.end]
        return allowed


class FrequencyAndPresencePenalty(LogitsProcessor):
    """logit_k - frequency * n_k - presence * [n_k > 0], where n_k counts action token k in the chunk so far."""

    def __init__(self, begin: int, end: int, frequency: float, presence: float) -> None:
        self.begin, self.end, self.frequency, self.presence = begin, end, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        counts[:, : self.begin] = counts[:, self.end :] = 0  # words of the prompt
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Committed(LogitsProcessor):
    """Allows only the given token of a draft, int64 [B, T], as long as a row has followed it and believes it."""

    def __init__(self, prompt: int, draft: torch.Tensor, committed: Commitment) -> None:
        self.prompt, self.draft, self.committed = prompt, draft, committed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place, beams = input_ids.shape[1] - self.prompt, len(scores) // len(self.draft)
        draft, *committed = (
            part.repeat_interleave(beams, dim=0).to(scores.device) for part in (self.draft, *self.committed)
        )
        now = Commitment(*committed)
        followed = (input_ids[:, self.prompt :] == draft[:, :place]).all(dim=1)
        token = draft[:, place, None]
        given = (now.counts > place) & followed & now.believed(scores[:, None], token)[:, 0]
        only = torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)
        return torch.where(given[:, None], only, scores)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws on `device` follow from `seed`, and go on afterwards as if there had been none; no other device's generator
    is touched (`torch.manual_seed` seeds all of them)."""
    generator = _generator(device)
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _generator(device: torch.device) -> torch.Generator:
    """The device's default generator, from which `torch.multinomial` draws."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


@torch.inference_mode()
def generate(
    network: VLAForActionPrediction,
    batch: dict[str, torch.Tensor],
    config: DecodingConfig = GREEDY,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    stopping: StoppingCriteriaList | None = None,
    committed: tuple[torch.Tensor, Commitment] | None = None,
    **options: Any,
) -> Decoded:
    """Decode one chunk per prefix with stock `generate`.

    Args:
        batch: prefix tensors from `VLAProcessor`.
        seed: of the draws, where the strategy samples; the caller's random state is left alone.
        streamer: is given every token as soon as it is decoded (one observation, no beams).
        stopping: ends the chunk early when it says so for all observations.
        committed: a draft, int64 [B, T], and how much of it is not to be chosen but given: the rest continues it.
        options: passed to `generate`, such as cache_implementation.
    Returns:
        The chosen ids, and the network's own logits: before temperature, penalties and cuts.
    """
    tokenizer, begin = network.config.make_action_tokenizer(), network.config.action_token_begin
    end, n_tokens = begin + tokenizer.vocab_size, count_tokens(network, config)
    processors = LogitsProcessorList([OnlyActionRows(begin, end)])
    if config.frequency_penalty or config.presence_penalty:
        processors.append(FrequencyAndPresencePenalty(begin, end, config.frequency_penalty, config.presence_penalty))
    if committed is not None:
        processors.append(Committed(batch["input_ids"].shape[1], *committed))
    sampling = {}
    if config.temperature > 0:
        sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    batch = {name: tensor.to(network.device) for name, tensor in batch.items()}
    with seeded(seed, network.device):
        output = network.generate(
            **batch,
            **sampling,
            do_sample=config.temperature > 0,
            num_beams=config.num_beams,
            repetition_penalty=config.repetition_penalty,
            min_new_tokens=None if stopping else n_tokens,
            max_new_tokens=n_tokens,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=processors,
            streamer=streamer,
            stopping_criteria=stopping,
            return_dict_in_generate=True,
            renormalize_logits=config.num_beams > 1,  # beams are compared by their probability as action tokens
            output_logits=config.num_beams == 1,
            **options,
        )
    ids = output.sequences[:, batch["input_ids"].shape[1] :]
    if config.num_beams > 1:  # the logits of beams that were left are of no use
        return teacher_forced(network, batch, ids)
    return Decoded(ids, torch.stack(output.logits, dim=1)[..., begin:end], ids.shape[1])


@torch.inference_mode()
def teacher_forced(network: VLAForActionPrediction, batch: dict[str, torch.Tensor], ids: torch.Tensor) -> Decoded:
    """What the network says about given tokens, int64 [B, T]: one forward over prefix and chunk."""
    begin = network.config.action_token_begin
    end = begin + network.config.make_action_tokenizer().vocab_size
    logits = teacher_forced_logits(network, batch, ids)
    return Decoded(ids.to(logits.device), logits[..., begin:end], 1)


@torch.inference_mode()
def teacher_forced_logits(
    network: VLAForActionPrediction, batch: dict[str, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Logits [B, T, vocabulary] of each token of `ids`, int64 [B, T], given those before it."""
    batch = {name: tensor.to(network.device) for name, tensor in batch.items()}
    ids = ids.to(network.device)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
    return network(**batch, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]


def count_tokens(network: VLAForActionPrediction, config: DecodingConfig) -> int:
    """Tokens that `config` decodes: a whole chunk, or its first `max_actions` actions."""
    tokenizer = network.config.make_action_tokenizer()
    if config.max_actions is None:
        return tokenizer.n_tokens
    return min(config.max_actions, tokenizer.horizon) * tokenizer.n_tokens // tokenizer.horizon
