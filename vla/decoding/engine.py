"""The engine: fast greedy decoding of action tokens.

Owns: the static key-value cache, the forward pass over plain matrices, and two decoding methods that return the tokens
of `generate` of Transformers, up to rounding (the tests compare them in float32). Stepwise decoding takes one forward
pass per token. In parallel decoding, each forward pass verifies the next tokens of a draft of the chunk, keeps those
before the first wrong one, and corrects that one. The engine does not know robots or the meaning of tokens.

Parallel decoding needs no approximation. Greedy decoding is the only fixed point of

    a_t = argmax_k p(k | x, a_<t),    t = 1..T,

and one causal forward pass over a candidate a_1..a_T evaluates all T right-hand sides. If the first n of them agree
with the candidate, the first n + 1 are the tokens of greedy decoding; the remaining right-hand sides are the next
candidate (Jacobi iteration; Song et al., 2021; Santilli et al., 2023). To bound the cost, a pass evaluates at most
`window` of them. Consecutive chunks overlap, so the caller passes the rest of the previous chunk, padded to T tokens,
as the first candidate (`draft`). The first verification is part of the prefill.

A tokenizer may exclude ids depending on the previous ids. The argmax at t is then over the ids allowed after a_<t. It
still depends on a_<t only, so the fixed point is the result of constrained greedy decoding.
"""

from __future__ import annotations

from collections.abc import Callable

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
WINDOW = 16  # maximum number of draft tokens per forward pass and observation, besides an action prefix
# Maximum number of draft tokens per forward pass for a whole batch (but at least one per observation). Up to this
# number, additional tokens hardly take time.
ROWS = 64


class Engine:
    """Decodes chunks with `network`. The network is not modified; it must not change or move to another device while
    the engine is in use.

    Args:
        window: maximum number of tokens per verification.
    Raises:
        ConfigError: the engine does not support the decoder's architecture.
    """

    def __init__(self, network: VLAForActionPrediction, window: int = WINDOW) -> None:
        self.network, self.device = network, network.device
        self.tokenizer: ActionTokenizer = network.action_tokenizer
        self.begin: int = network.config.action_token_begin
        self.window = window
        self._placeholders = torch.tensor([network.config.image_token_id, network.config.state_token_id])
        self._weights = weights.read(network)
        self._room = 0  # number of positions in the tables and the cache
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._causal = self._cache = torch.empty(0)
        self._cached: torch.Tensor | None = None  # prompts whose keys and values are in the cache
        self._graphs: dict[int, Captured] = {}  # by number of tokens
        if self.device.type == "cuda":  # fuse small kernels: launching them would dominate the time of a chunk
            # torch compiles these functions for every new shape and dtype, but by default gives up after 8.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._rotate, self._gate = torch.compile(_rotate), torch.compile(_gate)
        else:
            self._rotate, self._gate = _rotate, _gate

    @property
    def reach(self) -> float:
        """Maximum number of input tokens: the size of the decoder's sliding attention window; infinity without
        one."""
        return self._weights.reach

    def fits(self, batch: dict[str, torch.Tensor]) -> bool:
        """Whether the input tokens fit into `reach`: prompt prefix and chunk, without the chunk's last token."""
        return batch["input_ids"].shape[1] + self.tokenizer.max_tokens - 1 <= self.reach

    @torch.inference_mode()
    def stepwise(
        self,
        batch: dict[str, torch.Tensor],
        n_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Decoded:
        """Greedy decoding with one token per forward pass, until all sequences have ended. On CUDA, one CUDA graph
        computes the whole chunk, from images to tokens, unless there is a streamer, a stopping criterion or a tokenizer
        that excludes ids.

        Args:
            batch: prompt prefix tensors from `VLAProcessor`, on the CPU. For a network with a latent also `latent`, the
                codes by position (`vla.model.free_transformer.align`).
            n_tokens: number of tokens to decode; None: a whole chunk.
            streamer: receives every token as soon as it is decoded.
            stopping: ends the chunk early when it is met for all observations.
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
        """Returns prompt prefix and chunk [B, P + T], and logits [B, T, vocab]. Does not synchronise with the device
        unless there is a streamer, stopping criteria or a constrained tokenizer."""
        hidden, offsets, shift = self._embed(inputs, start), inputs.get("offsets"), self._shift(inputs)
        length, ids, logits = start + hidden.shape[1], inputs["input_ids"], []
        for t in range(n_tokens):
            found = self._weights.head(self._forward(hidden, start, offsets, shift)[:, -1:])
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
        stopping: StoppingCriteriaList | None = None,
    ) -> Decoded:
        """Greedy decoding that verifies a draft of the chunk.

        Args:
            batch: as in `stepwise`.
            draft: int64 [B, T], ids of the model's vocabulary, one per token to decode. The tokens of an
                action prefix can change the result; the others affect only the number of forward passes.
            streamer: receives tokens as soon as they are final.
            prefix: for prefix conditioning: how many of the first tokens of each draft are the action prefix.
            stopping: as in `stepwise`.
        """
        inputs, start = self._start(batch)
        hidden, offsets, shift = self._embed(inputs, start), inputs.get("offsets"), self._shift(inputs)
        length, total, table = start + hidden.shape[1], draft.shape[1], self._weights.table
        candidate = draft.to(self.device) - self.begin  # a copy
        logits = hidden.new_empty(len(draft), total, len(table))
        counts = torch.zeros(len(draft), dtype=torch.int64) if prefix is None else prefix.counts
        given = (torch.arange(total) < counts[:, None]).to(self.device)
        ahead = max(1, min(self.window, ROWS // len(draft)))
        # The first `known` tokens are final in every row of the batch.
        known, window, forwards = 0, min(total, ahead + int(counts.min())), 0
        hidden = torch.cat([hidden, F.embedding(candidate[:, : window - 1], table)], dim=1)
        while True:
            found = self._weights.head(self._forward(hidden, start, offsets, shift)[:, -window:])
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
            # All tokens before the first wrong one are final, and so is its correction.
            gained = wrong.index(True) + 1 if True in wrong else window
            stop = False
            if stopping is not None:
                for count in range(1, gained + 1):
                    ids = torch.cat([batch["input_ids"], candidate[:, : known + count].cpu() + self.begin], dim=1)
                    if stop := bool(stopping(ids, None).all()):
                        gained = count
                        break
            if prefix is not None:  # a rejected token ends the action prefix of its row
                ended = differs.cumsum(dim=1) > 0
                given[:, known:end] &= ~ended
                given[:, end:] &= ~ended[:, -1:]
            if streamer is not None:
                for column in (candidate[:, known : known + gained] + self.begin).cpu().T:
                    streamer.put(column)
            known += gained
            if stop or known >= total or all_ended(self.tokenizer, candidate[:, :known]):
                break
            window = min(ahead, total - known)
            start = length + known - 1
            hidden = F.embedding(candidate[:, known - 1 : known - 1 + window], table)
        if streamer is not None:
            streamer.end()
        decoded = Decoded(candidate[:, :known] + self.begin, logits[:, :known], forwards)
        return completed(self.tokenizer, self.begin, decoded, total)

    def _start(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        """Prepare the cache for the prompt prefix and its chunk.

        Returns the batch on the engine's device, and the number of its first tokens whose keys and values are already
        in the cache: the text before the images, if it is the same as in the last call. If rows are padded, the batch
        has `offsets` [B], the number of padding tokens before each row."""
        ids, w, start = batch["input_ids"], self._weights, 0
        rows, length = ids.shape
        if ("latent" in batch) != (w.injection is not None):
            has = "has no latent, but the batch has" if w.injection is None else "has a latent, but the batch has no"
            raise ConfigError(f"this network {has} latent codes.")
        if not self.fits(batch):
            raise ConfigError(
                f"the attention window has {self.reach} positions, but a prompt prefix of {length} tokens and a chunk "
                f"of {self.tokenizer.max_tokens} tokens need more."
            )
        if length + self.tokenizer.max_tokens > self._room:
            self._room = room = -(-(length + self.tokenizer.max_tokens) // _ROUND) * _ROUND
            tables = weights.rotary(self.network, room)
            self._tables = {kind: (cos.to(w.table.dtype), sin.to(w.table.dtype)) for kind, (cos, sin) in tables.items()}
            self._causal = w.table.new_full((room, room), -torch.inf).triu(1)
        if self._cache.ndim < 2 or self._cache.shape[1] < rows or self._cache.shape[3] < self._room:
            shape = (len(w.layers), rows, 2 * w.kv_heads, self._room, w.head_dim)
            self._cache, self._cached = w.table.new_empty(shape), None
            self._graphs.clear()  # they use the previous cache
        if self._cached is not None and torch.equal(self._cached, ids):
            start = int(torch.isin(ids, self._placeholders).any(dim=0).int().argmax())
        self._cached = None  # until the next forward pass has succeeded
        inputs = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        padding = length - batch["attention_mask"].sum(-1)
        if bool(padding.any()):
            inputs["offsets"] = padding
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}, start

    def _embed(self, inputs: dict[str, torch.Tensor], start: int) -> torch.Tensor:
        """Embeddings of the prompt prefix from token `start` on, [B, P - start, width]."""
        hidden = self.network.embed(inputs["input_ids"], inputs["pixel_values"], inputs.get("state"))
        return hidden[:, start:].to(self._weights.table.dtype)

    def _shift(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The latent's additive embeddings, [B, P - 1 + T, width]; None without a latent."""
        injection = self._weights.injection
        return None if injection is None else injection.shift(inputs["latent"])

    def _forward(
        self, hidden: torch.Tensor, start: int, offsets: torch.Tensor | None, shift: torch.Tensor | None
    ) -> torch.Tensor:
        """Run embedded tokens [B, n, width] through the decoder, at cache positions start..start+n-1. Returns the final
        hidden states."""
        w, (rows, n, _) = self._weights, hidden.shape
        end, heads, qkv_shape = start + n, w.heads, (w.heads + 2 * w.kv_heads, w.head_dim)
        positions: slice | torch.Tensor = slice(start, end)
        if offsets is not None:
            positions = (torch.arange(start, end, device=self.device) - offsets[:, None]).clamp(min=0)
        tables = {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self._tables.items()}
        mask = None if n == 1 and offsets is None else self._mask(start, end, offsets)
        cache = self._cache[:, :rows, :, :end]
        written, keys, values = (
            part.unbind(0) for part in (cache[:, :, :, start:], cache[:, :, : w.kv_heads], cache[:, :, w.kv_heads :])
        )
        for index, layer in enumerate(w.layers):
            if shift is not None and w.injection is not None and index == w.injection.layer:
                mixed = _normed(layer.attention_norm, hidden + shift[:, start:end])
                query = w.injection.query(_normed(layer.attention_norm, hidden))
                qkv = torch.cat([query, w.injection.key_value(mixed)], dim=-1)
            else:
                qkv = layer.qkv(_normed(layer.attention_norm, hidden))
            qkv = _normed(layer.query_key_norm, qkv)
            qkv = self._rotate(qkv.view(rows, n, *qkv_shape), *tables[layer.rope])
            written[index].copy_(qkv[:, heads:])
            attended = F.scaled_dot_product_attention(
                qkv[:, :heads], keys[index], values[index], mask, scale=w.scale, enable_gqa=w.kv_heads != heads
            )
            out = layer.out(attended.transpose(1, 2).reshape(rows, n, -1))
            hidden = hidden + _normed(layer.attention_post_norm, out)
            gated = self._gate(layer.gate_up(_normed(layer.mlp_norm, hidden)), w.gelu)
            hidden = hidden + _normed(layer.mlp_post_norm, layer.down(gated))
        return w.norm(hidden)

    def _mask(self, start: int, end: int, offsets: torch.Tensor | None) -> torch.Tensor:
        """The additive causal mask, [n, end] or [B, 1, n, end]: minus infinity for later positions and padding."""
        causal = self._causal[start:end, :end]
        if offsets is None:
            return causal
        positions = torch.arange(end, device=self.device)
        # A padding token attends to itself, because a fully masked row would give NaN.
        hidden = (positions < offsets[:, None, None]) & (positions != positions[start:, None])
        return causal.masked_fill(hidden, -torch.inf).unsqueeze(1)


def _rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding: [B, n, heads, d] -> [B, heads, n, d]."""
    return torch.addcmul(qkv * cos, qkv.roll(qkv.shape[-1] // 2, dims=-1), sin).transpose(1, 2)


def _gate(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """activation(gate) * up: [..., 2 m] -> [..., m]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def _normed(norm: Callable[[torch.Tensor], torch.Tensor] | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
