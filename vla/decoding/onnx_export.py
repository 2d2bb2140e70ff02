"""ONNX export: the network as two graphs, for decoding with onnxruntime.

Owns: the two graphs, for one observation. It uses the matrices of `weights`, so that every decoder that the engine
supports can be exported. The cache belongs to the caller, `float [layers, 1, 2 kv_heads, room, head_dim]` (keys, then
values), with a `room` that the caller chooses, at least P + T for a prompt prefix of P and a chunk of T tokens:

    prefill.onnx    input_ids int64 [1, P], pixel_values uint8 [1, C, 3, S, S], state float [1, max_state_dim]
                    -> logits [1, rows], entries [layers, 1, 2 kv_heads, P, head_dim] of the cache
    step.onnx       token int64 [1, 1], position int64 [1], cache
                    -> logits [1, rows], entries [layers, 1, 2 kv_heads, 1, head_dim] of the cache at `position`

The inputs of `prefill.onnx` are those of `VLAProcessor`; `state` is absent if the policy does not use it. A `token` is
the row of the largest logit, which is an id of the action tokenizer. The first row of logits predicts the chunk's first
token.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vla.decoding import weights
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor

PREFILL, STEP = "prefill.onnx", "step.onnx"
POSITIONS = 1024  # of prompt prefix and chunk


def check(network: VLAForActionPrediction) -> None:
    """Raise ConfigError if the graphs cannot hold the network or its action tokenizer, or if onnx is not installed."""
    tokenizer = network.action_tokenizer
    if tokenizer.constrained or tokenizer.end is not None:
        raise ConfigError(
            f"the action tokenizer {tokenizer.name!r} allows different tokens at different positions, which the graphs "
            "of the format 'onnx' do not hold. Train with another tokenizer, such as 'uniform'."
        )
    if network.latent is not None:
        raise ConfigError(f"latent {network.config.latent!r}: the format 'onnx' does not hold latents.")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the format 'onnx' needs {error.name}. Install it: scripts/setup onnx") from None


def write(network: VLAForActionPrediction, processor: VLAProcessor, folder: Path) -> None:
    """Write the graphs in float32, config.json and text tokenizer into a folder. ConfigError as in `check`."""
    check(network)
    network = network.float()
    config = network.config
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    images = torch.zeros(1, len(processor.robot.cameras), 3, config.image_size, config.image_size, dtype=torch.uint8)
    ids = torch.tensor([processor.prefix_ids("go")])
    inputs = (ids, images, *([torch.zeros(1, config.max_state_dim)] if config.use_state else []))
    names = ["input_ids", "pixel_values", "state"][: len(inputs)]
    length = torch.export.Dim("length", min=2, max=POSITIONS)
    decoder = _Decoder(network)
    _export(_Prefill(network, decoder), inputs, names, ({1: length}, *[None] * (len(inputs) - 1)), folder / PREFILL)
    cache = torch.zeros(len(decoder.layers), 1, 2 * decoder.kv_heads, 96, decoder.head_dim)
    step = (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([40]), cache)
    room = torch.export.Dim("room", min=2, max=POSITIONS)
    _export(_Step(decoder), step, ["token", "position", "cache"], (None, None, {3: room}), folder / STEP)


def _export(module: nn.Module, inputs: tuple, names: list[str], shapes: Any, path: Path) -> None:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        torch.onnx.export(
            module.eval(),
            inputs,
            path,
            input_names=names,
            output_names=["logits", "entries"],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=True,
            optimize=False,  # onnxruntime does so when it loads a graph
            verbose=False,
        )


class _Decoder(nn.Module):
    """The forward pass of `Engine` in operations that ONNX has."""

    def __init__(self, network: VLAForActionPrediction) -> None:
        super().__init__()
        w = weights.read(network)
        self.layers, self.norm, self.head, self.table = w.layers, w.norm, w.head, w.table
        self.heads, self.kv_heads, self.head_dim = w.heads, w.kv_heads, w.head_dim
        self.scale, self.gelu = w.scale, w.gelu
        # Tables of one head; those of all heads are equal.
        self.tables = {kind: (c[:, 0], s[:, 0]) for kind, (c, s) in weights.rotary(network, POSITIONS).items()}

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [1, n, width] -> logits [1, rows] of the last one, and entries [layers, 1, 2 kv_heads, n, head_dim].

        Args:
            positions: int64 [n].
            cache: keys and values before `positions`, if there are any; n is then 1.
        """
        n, entries = hidden.shape[1], []
        room = torch.arange(n if cache is None else cache.shape[3])
        mask = torch.where(room[None] <= positions[:, None], 0.0, -torch.inf)
        for index, layer in enumerate(self.layers):
            qkv = _linear(layer.qkv, _normed(layer.attention_norm, hidden))
            qkv = self._query_key_normed(layer.query_key_norm, qkv)
            qkv = qkv.view(1, n, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
            query_key, value = qkv[:, : self.heads + self.kv_heads], qkv[:, self.heads + self.kv_heads :]
            cos, sin = (table[positions] for table in self.tables[layer.rope])
            turned = torch.cat([query_key[..., self.head_dim // 2 :], query_key[..., : self.head_dim // 2]], dim=-1)
            query_key = query_key * cos + turned * sin
            query, new = query_key[:, : self.heads], torch.cat([query_key[:, self.heads :], value], dim=1)
            entries.append(new)
            seen = new if cache is None else torch.where((room == positions)[:, None], new, cache[index])
            group = self.heads // self.kv_heads
            keys = seen[:, : self.kv_heads].repeat_interleave(group, dim=1)
            values = seen[:, self.kv_heads :].repeat_interleave(group, dim=1)
            attention = torch.softmax(query @ keys.transpose(2, 3) * self.scale + mask, dim=-1) @ values
            out = _linear(layer.out, attention.transpose(1, 2).reshape(1, n, self.heads * self.head_dim))
            hidden = hidden + _normed(layer.attention_post_norm, out)
            gate_up = _linear(layer.gate_up, _normed(layer.mlp_norm, hidden))
            # Slices: ONNX would make a sequence of `chunk`.
            gate, up = gate_up[..., : gate_up.shape[-1] // 2], gate_up[..., gate_up.shape[-1] // 2 :]
            gated = (F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * up
            hidden = hidden + _normed(layer.mlp_post_norm, _linear(layer.down, gated))
        return _linear(self.head, _normed(self.norm, hidden[:, -1])), torch.stack(entries)

    def _query_key_normed(self, norm: Any, qkv: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return qkv
        query, key, value = qkv.split(norm.widths, dim=-1)
        parts = []
        for each, part in ((norm.query, query), (norm.key, key)):
            shaped = part if norm.head_dim is None else part.unflatten(-1, (-1, norm.head_dim))
            parts.append(_normed(each, shaped).reshape(part.shape))
        return torch.cat([*parts, value], dim=-1)


class _Prefill(nn.Module):
    def __init__(self, network: VLAForActionPrediction, decoder: _Decoder) -> None:
        super().__init__()
        self.network, self.decoder = network, decoder

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        network, config = self.network, self.network.config
        embeds = network.get_input_embeddings()(input_ids)
        condition = network.words_condition(input_ids, embeds)
        features = {config.image_token_id: network.encode_images(pixel_values, condition)[0]}
        if state is not None:
            features[config.state_token_id] = network.state_projector(state)
        for token, rows in features.items():
            here = input_ids[0] == token
            place = (here.to(torch.int64).cumsum(0) - 1).clamp(0, rows.shape[0] - 1)
            embeds = torch.where(here[:, None], rows[place], embeds)
        return self.decoder(embeds, torch.arange(input_ids.shape[1]), None)


class _Step(nn.Module):
    def __init__(self, decoder: _Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.decoder(F.embedding(token, self.decoder.table), position, cache)


def _linear(matrix: weights.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, matrix.weight, matrix.bias)


def _normed(norm: weights.RMSNorm | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
