"""The engine: greedy decoding of action tokens near the speed of the hardware, without changing a token.

Owns: the static key-value cache, the forward pass over plain matrices, and two ways to decode with it that give the
same tokens as `generate`: stepwise, one token per forward, and in parallel, where a draft of the whole chunk is
verified in one forward and everything up to the first wrong token is kept. It knows neither robots nor what tokens
mean.

Exact parallel decoding. Greedy decoding is the only fixed point of

    a_t = argmax_k p(k | x, a_<t),    t = 1..T,

and one causal forward over a candidate a_1..a_T evaluates all T right-hand sides. If the first n of them agree with the
candidate, the first n + 1 are greedy's own tokens; the rest of the right-hand sides are the next candidate (Jacobi
iteration; Song et al., 2021; Santilli et al., 2023). Consecutive chunks overlap, so the first candidate is the previous
chunk without its executed part, and the first verification rides along with the prefill.

A tokenizer may rule out ids at a place, depending on the ids before it. The argmax at t is then over the ids that are
allowed after a_<t of the candidate, so it still depends on a_<t only: the fixed point is greedy's own, and the first
wrong token is corrected to an allowed one.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vla.decoding import weights
from vla.decoding.constraint import all_ended, completed, constrain
from vla.decoding.graphs import Captured
from vla.decoding.prefix import Prefix
from vla.decoding.result import Decoded
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction
from vla.transforms.tokenizers.base import ActionTokenizer

_ROUND = 32  # cache lengths are multiples of this
WINDOW = 16  # tokens that a verification looks ahead, at most
ROWS = 64  # limit over all observations of a batch: beyond it, the time of a forward grows with its rows


class Engine:
    """Decodes chunks of `network`, which stays on its device and must not change while the engine is used. The engine
    reads its parameters and changes nothing about them.

    Args:
        window: tokens that a verification looks ahead, at most.
    Raises:
        ConfigError: the decoder's architecture computes something that the engine does not.
    """

    def __init__(self, network: VLAForActionPrediction, window: int = WINDOW) -> None:
        self.network, self.device = network, network.device
        self.tokenizer: ActionTokenizer = network.action_tokenizer
        self.begin: int = network.config.action_token_begin
        self.window = window
        self._placeholders = torch.tensor([network.config.image_token_id, network.config.state_token_id])
        self._weights = weights.read(network)
        self._cos = self._sin = self._causal = self._cache = torch.empty(0)
        self._cached: torch.Tensor | None = None  # prompts whose keys and values stand in the cache
        self._graphs: dict[int, Captured] = {}  # by number of tokens
        # On a GPU a chunk is thousands of small kernels, and what each costs is its launch: fewer are faster.
        if self.device.type == "cuda":
            # Compiled once per shape, dtype and window; torch stops compiling after 8 by default.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._turn, self._gate = torch.compile(_turn), torch.compile(_gate)
        else:
            self._turn, self._gate = _turn, _gate

    @property
    def reach(self) -> float:
        """Positions of prefix and chunk that the engine decodes as the network does; infinite unless attention slides
        over fewer."""
        return self._weights.reach

    def fits(self, batch: dict[str, torch.Tensor]) -> bool:
        """Whether a chunk for these prefix tensors stays within `reach`. The chunk's last token is never read."""
        return batch["input_ids"].shape[1] + self.tokenizer.max_tokens - 1 <= self.reach

    @torch.inference_mode()
    def stepwise(
        self,
        batch: dict[str, torch.Tensor],
        n_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Decoded:
        """Greedy decoding, one token per forward, until all sequences have ended. On CUDA the whole chunk, camera
        images to tokens, is one graph if the tokenizer allows every id everywhere.

        Args:
            batch: prefix tensors from `VLAProcessor`, on the CPU.
            n_tokens: number of tokens to decode; None: a whole chunk.
            streamer: is given every token as soon as it is decoded.
            stopping: ends the chunk early when it says so for all observations.
        """
        n_tokens = n_tokens or self.tokenizer.max_tokens
        inputs, start = self._start(batch)
        constrained = self.tokenizer.constrained
        if self.device.type == "cuda" and streamer is None and stopping is None and not constrained:
            if n_tokens not in self._graphs:
                self._graphs[n_tokens] = Captured(lambda **inputs: self._chunk(inputs, 0, n_tokens))
            ids, logits = self._graphs[n_tokens](inputs)
        else:
            ids, logits = self._chunk(inputs, start, n_tokens, streamer, stopping)
            self._cached = batch["input_ids"]
        if streamer is not None:
            streamer.end()
        decoded = Decoded(ids[:, batch["input_ids"].shape[1] :], logits, logits.shape[1])
        return completed(self.tokenizer, self.begin, decoded, n_tokens)

    def _chunk(
        self,
        inputs: dict[str, torch.Tensor],
        start: int,
        n_tokens: int,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix and chunk [B, P + T], logits [B, T, rows]; waits for the device only for a streamer, stopping or a
        constrained tokenizer."""
        hidden, offsets = self._embed(inputs, start), inputs.get("offsets")
        length, ids, logits = start + hidden.shape[1], inputs["input_ids"], []
        for t in range(n_tokens):
            found = self._weights.head(self._forward(hidden, start, offsets)[:, -1:])
            if self.tokenizer.constrained:
                found = constrain(self.tokenizer, found, ids[:, length:] - self.begin)
            logits.append(found)
            row = found.argmax(-1)
            ids = torch.cat([ids, row + self.begin], dim=1)
            if streamer is not None:
                streamer.put(ids[:, -1].cpu())
            if all_ended(self.tokenizer, row) or (stopping is not None and bool(stopping(ids, None).all())):
                break
            hidden, start = F.embedding(row, self._weights.table), length + t
        return ids, torch.cat(logits, dim=1)

    @torch.inference_mode()
    def parallel(
        self,
        batch: dict[str, torch.Tensor],
        draft: torch.Tensor,
        streamer: BaseStreamer | None = None,
        prefix: Prefix | None = None,
    ) -> Decoded:
        """Greedy decoding that verifies a draft of the chunk.

        Args:
            batch: prefix tensors from `VLAProcessor`, on the CPU.
            draft: int64 [B, T], ids of the model's vocabulary, for as many tokens as shall be decoded. Any will do, but
                the better they are, the fewer forwards it takes.
            streamer: is given tokens as soon as they are known to be greedy's own.
            prefix: prefix conditioning: the first tokens of each draft that are given; the rest continues them.
        """
        inputs, start = self._start(batch)
        hidden, offsets = self._embed(inputs, start), inputs.get("offsets")
        length, total, table = start + hidden.shape[1], draft.shape[1], self._weights.table
        candidate = draft.to(self.device) - self.begin  # a copy
        logits = hidden.new_empty(len(draft), total, len(table))
        counts = torch.zeros(len(draft), dtype=torch.int64) if prefix is None else prefix.counts
        given = (torch.arange(total) < counts[:, None]).to(self.device)
        ahead = max(1, min(self.window, ROWS // len(draft)))
        # Known are tokens that are greedy's own in every row of the batch.
        known, window, forwards = 0, min(total, ahead + int(counts.min())), 0
        hidden = torch.cat([hidden, F.embedding(candidate[:, : window - 1], table)], dim=1)
        while True:
            found = self._weights.head(self._forward(hidden, start, offsets)[:, -window:])
            self._cached, forwards = batch["input_ids"], forwards + 1
            end = known + window
            if self.tokenizer.constrained:
                found = constrain(self.tokenizer, found, candidate[:, : end - 1])
            guess, kept = candidate[:, known:end], given[:, known:end]
            if prefix is not None:
                kept = kept & prefix.accepted(found, guess)
            chosen = torch.where(kept, guess, found.argmax(-1))
            differs = chosen != guess
            wrong = differs.any(dim=0).tolist()
            candidate[:, known:end], logits[:, known:end] = chosen, found
            # Everything before the first wrong token was right, and the correction of that one is right, too.
            gained = wrong.index(True) + 1 if True in wrong else window
            if prefix is not None:  # a rejected token ends the prefix of its row
                ended = differs.cumsum(dim=1) > 0
                given[:, known:end] &= ~ended
                given[:, end:] &= ~ended[:, -1:]
            if streamer is not None:
                for column in (candidate[:, known : known + gained] + self.begin).cpu().T:
                    streamer.put(column)
            known += gained
            if known >= total or all_ended(self.tokenizer, candidate[:, :known]):
                break
            window = min(ahead, total - known)
            start = length + known - 1
            hidden = F.embedding(candidate[:, known - 1 : known - 1 + window], table)
        if streamer is not None:
            streamer.end()
        decoded = Decoded(candidate[:, :known] + self.begin, logits[:, :known], forwards)
        return completed(self.tokenizer, self.begin, decoded, total)

    def _start(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        """The batch on the engine's device, with `offsets` [B], how many padding tokens stand in front of each row, if
        there are any; and how many tokens of the prefix are in the cache already.

        Makes room in the cache for the prefix and its chunk. Prompts that stand before the images are computed once for
        as long as they stay the same."""
        ids, w, start = batch["input_ids"], self._weights, 0
        rows, length = ids.shape
        if not self.fits(batch):
            raise ConfigError(
                f"attention slides over {self.reach} positions; a prefix of {length} tokens and a chunk of "
                f"{self.tokenizer.max_tokens} need more."
            )
        if length + self.tokenizer.max_tokens > len(self._cos):
            room = -(-(length + self.tokenizer.max_tokens) // _ROUND) * _ROUND
            self._cos, self._sin = (part.to(w.table.dtype) for part in weights.rotary(self.network, room))
            self._causal = w.table.new_full((room, room), -torch.inf).triu(1)
        if self._cache.ndim < 2 or self._cache.shape[1] < rows or self._cache.shape[3] < len(self._cos):
            shape = (len(w.layers), rows, 2 * w.kv_heads, len(self._cos), w.head_dim)
            self._cache, self._cached = w.table.new_empty(shape), None
            self._graphs.clear()  # they write to the old one
        if self._cached is not None and torch.equal(self._cached, ids):
            start = int(torch.isin(ids, self._placeholders).any(dim=0).int().argmax())
        self._cached = None  # until the forward that follows has succeeded
        inputs = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        padding = length - batch["attention_mask"].sum(-1)
        if bool(padding.any()):
            inputs["offsets"] = padding
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}, start

    def _embed(self, inputs: dict[str, torch.Tensor], start: int) -> torch.Tensor:
        """The prefix from token `start` on, [B, P - start, width]."""
        hidden = self.network.embed(inputs["input_ids"], inputs["pixel_values"], inputs.get("state"))
        return hidden[:, start:].to(self._weights.table.dtype)

    def _forward(self, hidden: torch.Tensor, start: int, offsets: torch.Tensor | None) -> torch.Tensor:
        """Run tokens [B, n, width] at cache places start..start+n-1 through the decoder; final hidden states."""
        w, (rows, n, _) = self._weights, hidden.shape
        end, heads, side_by_side = start + n, w.heads, (w.heads + 2 * w.kv_heads, w.head_dim)
        if offsets is None:
            cos, sin = self._cos[start:end], self._sin[start:end]
        else:
            places = (torch.arange(start, end, device=self.device) - offsets[:, None]).clamp(min=0)
            cos, sin = self._cos[places], self._sin[places]
        mask = None if n == 1 and offsets is None else self._mask(start, end, offsets)
        cache = self._cache[:, :rows, :, :end]
        written, keys, values = (
            part.unbind(0) for part in (cache[:, :, :, start:], cache[:, :, : w.kv_heads], cache[:, :, w.kv_heads :])
        )
        for index, layer in enumerate(w.layers):
            qkv = layer.qkv(layer.attention_norm(hidden)).view(rows, n, *side_by_side)
            qkv = self._turn(qkv, cos, sin)
            written[index].copy_(qkv[:, heads:])
            attended = F.scaled_dot_product_attention(
                qkv[:, :heads], keys[index], values[index], mask, enable_gqa=w.kv_heads != heads
            )
            hidden = hidden + layer.out(attended.transpose(1, 2).reshape(rows, n, -1))
            hidden = hidden + layer.down(self._gate(layer.gate_up(layer.mlp_norm(hidden))))
        return w.norm(hidden)

    def _mask(self, start: int, end: int, offsets: torch.Tensor | None) -> torch.Tensor:
        """0 where a token sees a place, else minus infinity, [n, end] or [B, 1, n, end]: it sees those up to itself
        that are not padding."""
        seen = self._causal[start:end, :end]
        if offsets is None:
            return seen
        places = torch.arange(end, device=self.device)
        # A padding token sees itself: a row without anything to see would be NaN.
        hidden = (places < offsets[:, None, None]) & (places != places[start:, None])
        return seen.masked_fill(hidden, -torch.inf).unsqueeze(1)


def _turn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: [B, n, heads, d] -> [B, heads, n, d]."""
    return torch.addcmul(qkv * cos, qkv.roll(qkv.shape[-1] // 2, dims=-1), sin).transpose(1, 2)


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product: [..., 2 m] -> [..., m]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
