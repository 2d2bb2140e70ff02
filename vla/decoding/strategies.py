"""Decoding strategies: greedy decoding through the engine, and every strategy through transformers' `generate`.

Owns: the choice of a decoder for a `DecodingConfig`, the call of `generate` (also the reference for the engine), and
the logits processors that transformers lacks. No strategy can produce a malformed chunk, because every token is chosen
from those that the tokenizer allows at its position. It does not know what the tokens mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vla.config import GREEDY, DecodingConfig
from vla.decoding.constraint import all_ended, completed, constrain
from vla.decoding.engine import Engine
from vla.decoding.prefix import Prefix
from vla.decoding.result import Decoded
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction
from vla.transforms.tokenizers.base import ActionTokenizer


class OnlyAllowed(LogitsProcessor):
    """Sets the logits of all tokens that the action tokenizer does not allow next to minus infinity. The chunk begins
    after `prompt` tokens."""

    def __init__(self, tokenizer: ActionTokenizer, begin: int, prompt: int) -> None:
        self.tokenizer, self.rows, self.prompt = tokenizer, slice(begin, begin + tokenizer.vocab_size), prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, float("-inf"))
        before = input_ids[:, self.prompt :] - self.rows.start
        allowed[:, self.rows] = constrain(self.tokenizer, scores[:, None, self.rows], before)[:, 0]
        return allowed


class AllEnded(StoppingCriteria):
    """Ends decoding once all sequences of the batch have ended."""

    def __init__(self, tokenizer: ActionTokenizer, begin: int) -> None:
        self.tokenizer, self.begin = tokenizer, begin

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **keywords: Any) -> torch.Tensor:
        done = all_ended(self.tokenizer, input_ids - self.begin)
        return torch.full((len(input_ids),), done, device=input_ids.device)


class FrequencyAndPresencePenalty(LogitsProcessor):
    """logit_k - frequency * n_k - presence * [n_k > 0], where n_k counts action token k in the chunk so far."""

    def __init__(self, begin: int, end: int, frequency: float, presence: float) -> None:
        self.begin, self.end, self.frequency, self.presence = begin, end, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        counts[:, : self.begin] = counts[:, self.end :] = 0  # text tokens of the prompt
        return scores - self.frequency * counts - self.presence * (counts > 0)


class GivenPrefix(LogitsProcessor):
    """Prefix conditioning: forces the next token of the action prefix if it is accepted and no earlier one was
    rejected. The prefix is the beginning of `draft`, int64 [B, T]."""

    def __init__(self, prompt: int, draft: torch.Tensor, prefix: Prefix) -> None:
        self.prompt, self.draft, self.prefix = prompt, draft, prefix

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place, beams = input_ids.shape[1] - self.prompt, len(scores) // len(self.draft)
        draft, *prefix = (part.repeat_interleave(beams, dim=0).to(scores.device) for part in (self.draft, *self.prefix))
        prefixes = Prefix(*prefix)
        followed = (input_ids[:, self.prompt :] == draft[:, :place]).all(dim=1)
        token = draft[:, place, None]
        forced = (prefixes.counts > place) & followed & prefixes.accepted(scores[:, None], token)[:, 0]
        only = torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)
        return torch.where(forced[:, None], only, scores)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random generator of `device` only, and restore its state afterwards."""
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
    prefix: tuple[torch.Tensor, Prefix] | None = None,
    **options: Any,
) -> Decoded:
    """Decode one chunk per prompt prefix with transformers' `generate`.

    Args:
        batch: prompt prefix tensors from `VLAProcessor`.
        seed: seed for sampling; the caller's random state is not changed.
        streamer: receives every token as soon as it is decoded (one observation, no beams).
        stopping: ends the chunk early when it is met for all observations.
        prefix: for prefix conditioning, a draft, int64 [B, T], and the lengths and thresholds of its action prefixes.
        options: passed to `generate`, such as cache_implementation.
    Returns:
        The chosen ids, and the network's logits before temperature, penalties, top-k and top-p.
    """
    tokenizer, begin, prompt = network.action_tokenizer, network.config.action_token_begin, batch["input_ids"].shape[1]
    end, n_tokens = begin + tokenizer.vocab_size, count_tokens(network, config)
    processors = LogitsProcessorList([OnlyAllowed(tokenizer, begin, prompt)])
    if config.frequency_penalty or config.presence_penalty:
        processors.append(FrequencyAndPresencePenalty(begin, end, config.frequency_penalty, config.presence_penalty))
    if prefix is not None:
        processors.append(GivenPrefix(prompt, *prefix))
    criteria = StoppingCriteriaList(stopping or ())
    if tokenizer.end is not None and config.num_beams == 1:  # beams must have the same length to be comparable
        criteria.append(AllEnded(tokenizer, begin))
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
            min_new_tokens=None if criteria else n_tokens,
            max_new_tokens=n_tokens,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=processors,
            streamer=streamer,
            stopping_criteria=criteria,
            return_dict_in_generate=True,
            renormalize_logits=config.num_beams > 1,  # compare beams by their probability among action tokens
            output_logits=config.num_beams == 1,
            **options,
        )
    ids = output.sequences[:, prompt:]
    if config.num_beams > 1:  # the returned logits include those of discarded beams, so compute them anew
        return teacher_forced(network, batch, ids)
    logits = constrain(tokenizer, torch.stack(output.logits, dim=1)[..., begin:end], ids[:, :-1] - begin)
    return completed(tokenizer, begin, Decoded(ids, logits, ids.shape[1]), n_tokens)


@torch.inference_mode()
def teacher_forced(network: VLAForActionPrediction, batch: dict[str, torch.Tensor], ids: torch.Tensor) -> Decoded:
    """The logits of a given chunk `ids`, int64 [B, T], from one forward pass over prompt prefix and chunk."""
    tokenizer, begin = network.action_tokenizer, network.config.action_token_begin
    logits = teacher_forced_logits(network, batch, ids)[..., begin : begin + tokenizer.vocab_size]
    return Decoded(ids.to(logits.device), constrain(tokenizer, logits, ids[:, :-1] - begin), 1)


@torch.inference_mode()
def teacher_forced_logits(
    network: VLAForActionPrediction, batch: dict[str, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Logits [B, T, vocabulary] for each token of `ids`, int64 [B, T], given the previous tokens."""
    batch = {name: tensor.to(network.device) for name, tensor in batch.items()}
    ids = ids.to(network.device)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
    return network(**batch, logits_to_keep=ids.shape[1] + 1).logits[:, :-1]


def count_tokens(network: VLAForActionPrediction, config: DecodingConfig) -> int:
    """Number of tokens to decode: the whole chunk, or at most `max_actions` actions or `max_tokens` tokens."""
    tokenizer = network.action_tokenizer
    if config.max_actions is None or tokenizer.tokens_per_action is None:
        return min(tokenizer.max_tokens, config.max_tokens or tokenizer.max_tokens)
    return min(config.max_actions, tokenizer.horizon) * tokenizer.tokens_per_action


@dataclasses.dataclass(frozen=True)
class Request:
    """One chunk to decode for each row of a batch.

    Attributes:
        batch: prompt prefix tensors from `VLAProcessor`.
        draft: guess of each chunk, int64 [B, T], ids of the model's vocabulary.
        prefix: action prefix for prefix conditioning, formed by the draft's first tokens.
        streamer: receives every token as soon as it is final.
        stopping: ends the chunk early when it is met for all observations.
    """

    batch: dict[str, torch.Tensor]
    draft: torch.Tensor
    prefix: Prefix | None = None
    streamer: BaseStreamer | None = None
    stopping: StoppingCriteriaList | None = None


class Decoder(Protocol):
    """A decoding strategy for one network.

    Attributes:
        final_by_token: whether a decoded token never changes, so that actions can be streamed.
    """

    final_by_token: bool

    def __call__(self, request: Request) -> Decoded: ...


class Generate:
    """Any strategy, through `generate`. Batch n, counted from 1, is decoded with the seed `sampling_seed` + n."""

    def __init__(self, network: VLAForActionPrediction, config: DecodingConfig) -> None:
        self._network, self._config = network, config
        self.final_by_token = config.num_beams == 1
        self._batches = itertools.count(1)

    def __call__(self, request: Request) -> Decoded:
        seed = self._config.sampling_seed + next(self._batches)
        given = None if request.prefix is None else (request.draft, request.prefix)
        return generate(self._network, request.batch, self._config, seed, request.streamer, request.stopping, given)


class Greedy:
    """Greedy decoding through the engine: in parallel on the CPU and with an action prefix, otherwise stepwise.
    Requests that exceed the attention window are decoded by `generate`."""

    final_by_token = True

    def __init__(self, engine: Engine, config: DecodingConfig) -> None:
        self.engine = engine
        self._generate, self._n_tokens = Generate(engine.network, config), count_tokens(engine.network, config)

    def __call__(self, request: Request) -> Decoded:
        prefix, streamer, stopping = request.prefix, request.streamer, request.stopping
        if not self.engine.fits(request.batch):
            warnings.warn(
                f"decoding through transformers, which is slower: the attention window has {self.engine.reach} "
                "positions, but this prompt and chunk need more.",
                stacklevel=4,
            )
            return self._generate(request)
        if self.engine.device.type == "cpu" or prefix is not None:
            return self.engine.parallel(request.batch, request.draft[:, : self._n_tokens], streamer, prefix, stopping)
        return self.engine.stepwise(request.batch, self._n_tokens, streamer, stopping)


def choose_decoder(network: VLAForActionPrediction, config: DecodingConfig) -> Decoder:
    """The engine for greedy decoding, `generate` for all other strategies. If the engine does not support the decoder's
    architecture, `generate` is used with a warning."""
    if not config.greedy:
        return Generate(network, config)
    try:
        return Greedy(Engine(network), config)
    except ConfigError as error:
        warnings.warn(f"decoding through transformers, which is slower: {error}", stacklevel=3)
        return Generate(network, config)
