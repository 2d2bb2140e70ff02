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
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from vla.decoding import weights
from vla.model.modeling import VLAForActionPrediction

_ROUND = 32  # cache lengths are multiples of this
# The fastest of 8, 16 and 32 for one observation on 2 cores, in one run each (docs/benchmarks.md): a first choice.
WINDOW = 16


@dataclasses.dataclass
class Decoded:
    """One batch of chunks.

    Attributes:
        ids: int64 [B, T], ids of the model's vocabulary.
        forwards: passes through the decoder, the prefill included.
    """

    ids: torch.Tensor
    forwards: int


class Engine:
    """Decodes chunks of `network`, which stays on its device and must not change while the engine is used.

    Args:
        window: tokens that a verification looks ahead, at most.
    Raises:
        ConfigError: the decoder's architecture computes something that the engine does not.
    """

    def __init__(self, network: VLAForActionPrediction, window: int = WINDOW) -> None:
        self.network = network
        tokenizer = network.config.make_action_tokenizer()
        self.n_tokens, self.begin = tokenizer.n_tokens, network.config.action_token_begin
        self.window = min(window, self.n_tokens)
        self._keys = self._values = torch.empty(0)
        self._weights = weights.read(network, positions=2 * _ROUND + self.n_tokens)

    @torch.inference_mode()
    def stepwise(self, batch: dict[str, torch.Tensor]) -> Decoded:
        """Greedy decoding, one token per forward.

        Args:
            batch: prefix tensors from `VLAProcessor`, on the network's device.
        """
        hidden, offsets = self._start(batch)
        length = hidden.shape[1]
        rows = [self._choose(self._forward(hidden, 0, offsets)[:, -1:])]
        for t in range(self.n_tokens - 1):
            hidden = self._forward(F.embedding(rows[-1], self._weights.table), length + t, offsets)
            rows.append(self._choose(hidden))
        return Decoded(torch.cat(rows, dim=1) + self.begin, self.n_tokens)

    @torch.inference_mode()
    def parallel(self, batch: dict[str, torch.Tensor], draft: torch.Tensor) -> Decoded:
        """Greedy decoding that verifies `draft`, ids int64 [B, T] of the model's vocabulary: any ids will do, but the
        better they are, the fewer forwards it takes."""
        prefix, offsets = self._start(batch)
        length, total = prefix.shape[1], self.n_tokens
        candidate = (draft - self.begin).clone()
        hidden = torch.cat([prefix, F.embedding(candidate[:, : self.window - 1], self._weights.table)], dim=1)
        chosen = self._choose(self._forward(hidden, 0, offsets)[:, length - 1 :])
        known, forwards = 0, 1  # tokens that are greedy's own in every row of the batch
        while True:
            end = known + chosen.shape[1]
            wrong = (chosen != candidate[:, known:end]).any(dim=0).int()
            candidate[:, known:end] = chosen
            # Everything before the first wrong token was right, and the correction of that one is right, too.
            known = known + int(wrong.argmax()) + 1 if bool(wrong.any()) else end
            if known >= total:
                return Decoded(candidate + self.begin, forwards)
            inputs = candidate[:, known - 1 : min(known - 1 + self.window, total - 1)]
            hidden = self._forward(F.embedding(inputs, self._weights.table), length + known - 1, offsets)
            chosen, forwards = self._choose(hidden), forwards + 1

    def _start(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embedded prefix [B, P, width], and how many padding tokens stand in front of each, [B]; None for no padding.

        Makes room in the cache for the prefix and its chunk."""
        hidden = self.network.embed(batch["input_ids"], batch["pixel_values"], batch.get("state"))
        hidden = hidden.to(self._weights.table.dtype)
        rows, needed = hidden.shape[0], hidden.shape[1] + self.n_tokens
        if needed > len(self._weights.cos):
            self._weights = weights.read(self.network, positions=-(-needed // _ROUND) * _ROUND)
        w, room = self._weights, len(self._weights.cos)
        if self._keys.ndim < 2 or self._keys.shape[1] < rows or self._keys.shape[3] < room:
            shape = (len(w.layers), rows, w.kv_heads, room, w.head_dim)
            self._keys, self._values = hidden.new_empty(shape), hidden.new_empty(shape)
        offsets = batch["attention_mask"].shape[1] - batch["attention_mask"].sum(-1)
        return hidden, offsets if bool(offsets.any()) else None

    def _forward(self, hidden: torch.Tensor, start: int, offsets: torch.Tensor | None) -> torch.Tensor:
        """Run tokens [B, n, width] at cache places start..start+n-1 through the decoder; final hidden states."""
        w, (rows, n, width) = self._weights, hidden.shape
        end, turned = start + n, w.heads + w.kv_heads
        if offsets is None:
            cos, sin = w.cos[start:end, None], w.sin[start:end, None]
        else:
            places = (torch.arange(start, end, device=hidden.device) - offsets[:, None]).clamp(min=0)
            cos, sin = w.cos[places].unsqueeze(2), w.sin[places].unsqueeze(2)
        mask = self._mask(start, end, offsets, hidden.device) if n > 1 or offsets is not None else None
        for index, layer in enumerate(w.layers):
            normed = F.rms_norm(hidden, (width,), layer.attention_norm, w.eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(rows, n, turned + w.kv_heads, w.head_dim)
            qk = qkv[:, :, :turned]
            qk = torch.addcmul(qk * cos, qk.roll(w.head_dim // 2, dims=-1), sin)
            keys, values = self._keys[index, :rows, :, :end], self._values[index, :rows, :, :end]
            keys[:, :, start:] = qk[:, :, w.heads :].transpose(1, 2)
            values[:, :, start:] = qkv[:, :, turned:].transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                qk[:, :, : w.heads].transpose(1, 2), keys, values, mask, enable_gqa=w.kv_heads != w.heads
            )
            hidden = hidden + F.linear(attended.transpose(1, 2).reshape(rows, n, -1), layer.out, layer.out_bias)
            normed = F.rms_norm(hidden, (width,), layer.mlp_norm, w.eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        return F.rms_norm(hidden, (width,), w.norm, w.eps)

    @staticmethod
    def _mask(start: int, end: int, offsets: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Which places a token sees, bool [B or 1, 1, n, end]: those up to itself that are not padding."""
        places = torch.arange(end, device=device)
        seen = places[None, :] <= places[start:, None]
        if offsets is None:
            return seen[None, None]
        # A padding token sees itself: a row without anything to see would be NaN.
        real = (places[None, None, :] >= offsets[:, None, None]) | (places[None, :] == places[start:, None])
        return (seen & real).unsqueeze(1)

    def _choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """The likeliest action row for every hidden state [B, n, width]: int64 [B, n]."""
        return F.linear(hidden, self._weights.head).argmax(-1)
