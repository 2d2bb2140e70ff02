"""A LLaMA-architecture decoder as plain matrices, laid out for decoding.

Owns: reading them from transformers' modules (fused where several are applied to the same input, adapters folded in),
how this device multiplies by them fastest, the rotary tables, and the refusal of architectures that compute something
else. It does not know how tokens are decoded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction

# Model types whose layers are exactly: RMSNorm, rotary attention, RMSNorm, SwiGLU.
ARCHITECTURES = ("llama", "mistral", "qwen2")


class Linear:
    """x -> x W^T + b, for W [out, in] laid out for this device.

    MKL, which a CPU's `F.linear` ends in, multiplies two to sixty rows at a third of the rate that oneDNN reaches on
    weights packed beforehand (and is no faster with two threads than with one); for a single row a transposed matrix is
    the fastest. Both were measured at the embedded backbone's sizes (docs/benchmarks.md). `_linear_pointwise` is the
    operation that torch.compile emits on CPUs; it has no other name in torch.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._packed = None
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, in] -> [B, n, out]."""
        if self._packed is None or (x.shape[0] == x.shape[1] == 1 and x.dtype == torch.float32):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class RMSNorm:
    """x -> w x / sqrt(mean(x^2) + eps), over the last axis.

    On a CPU written as sqrt(n) w x / hypot(|x|, sqrt(n eps)), which is the same in three operations where `F.rms_norm`
    runs seven: every forward of the embedded backbone is 12 % shorter for it.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._scaled = weight * len(weight) ** 0.5
        self._root = torch.tensor((len(weight) * eps) ** 0.5)
        self._split = weight.device.type == "cpu" and weight.dtype == torch.float32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> [..., n]."""
        if not self._split:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._root) * self._scaled


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block. Shapes: qkv [(heads + 2 kv_heads) * head_dim, width], out [width, heads * head_dim],
    gate_up [2 * intermediate, width], down [width, intermediate]."""

    attention_norm: RMSNorm
    qkv: Linear
    out: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Everything that decoding action tokens reads.

    Attributes:
        table: embeddings of the action rows [rows, width].
        head: output rows of the action tokens [rows, width]; the rest of the vocabulary can never be chosen.
    """

    layers: tuple[Layer, ...]
    norm: RMSNorm
    table: torch.Tensor
    head: Linear
    heads: int
    kv_heads: int
    head_dim: int


def read(network: VLAForActionPrediction) -> Decoder:
    """The decoder of `network`. ConfigError when its architecture is not one of `ARCHITECTURES`."""
    model, config = network.language_model.model, network.config.text_config
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(f"a decoder of type {config.model_type!r}; the engine knows {', '.join(ARCHITECTURES)}.")
    begin = network.config.action_token_begin
    rows = slice(begin, begin + network.config.make_action_tokenizer().vocab_size)
    table = _matrix(model.embed_tokens)[rows].contiguous()
    return Decoder(
        layers=tuple(_layer(layer, config.rms_norm_eps) for layer in model.layers),
        norm=RMSNorm(model.norm.weight.detach(), config.rms_norm_eps),
        table=table,
        head=Linear(_matrix(network.language_model.lm_head)[rows].contiguous()),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def rotary(network: VLAForActionPrediction, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables cos and sin [positions, heads + 2 kv_heads, head_dim] for queries, keys and values side by side;
    values are turned by nothing. sin is negative in its first half, so that turning is

        x * cos + roll(x, head_dim / 2) * sin.

    Raises:
        ConfigError: attention that slides over fewer positions.
    """
    model, config = network.language_model.model, network.config.text_config
    if (getattr(config, "sliding_window", None) or positions) < positions and _slides(config):
        raise ConfigError(f"a sliding window of {config.sliding_window} positions; the prefix needs {positions}.")
    table = model.embed_tokens.weight
    cos, sin = model.rotary_emb(table[None], torch.arange(positions, device=table.device)[None])
    first, second = sin[0].chunk(2, dim=-1)
    cos, sin = cos[0], torch.cat([-first, second], dim=-1)
    turned, kept = config.num_attention_heads + config.num_key_value_heads, (0, 0, 0, config.num_key_value_heads)
    expand = (positions, turned, cos.shape[-1])
    return F.pad(cos[:, None].expand(expand), kept, value=1.0), F.pad(sin[:, None].expand(expand), kept)


def _layer(layer: Any, eps: float) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [bias for projection in queries if (bias := _bias(projection)) is not None]
    return Layer(
        attention_norm=RMSNorm(layer.input_layernorm.weight.detach(), eps),
        qkv=Linear(_fuse(*queries), torch.cat(biases) if biases else None),
        out=Linear(_fuse(attention.o_proj), _bias(attention.o_proj)),
        mlp_norm=RMSNorm(layer.post_attention_layernorm.weight.detach(), eps),
        gate_up=Linear(_fuse(mlp.gate_proj, mlp.up_proj)),
        down=Linear(_fuse(mlp.down_proj)),
    )


def _fuse(*modules: Any) -> torch.Tensor:
    """The weights of several linear maps of one input, below each other; on a CPU the transpose of a contiguous matrix.
    Frozen modules keep views of the result, so that a large decoder is not in memory twice."""
    fused = torch.cat([_matrix(module) for module in modules])
    if fused.device.type == "cpu":
        fused = fused.T.contiguous().T
    if all(isinstance(module, nn.Linear) and not module.weight.requires_grad for module in modules):
        for module, part in zip(modules, fused.split([module.out_features for module in modules]), strict=True):
            module.weight.data = part
    return fused


def _matrix(module: Any) -> torch.Tensor:
    """The weight of a linear map, with what an unmerged adapter adds to it."""
    if hasattr(module, "token_adapter"):  # peft trains some rows of it
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters).detach()
    if not hasattr(module, "get_delta_weight"):
        return module.weight.detach()
    weight = module.get_base_layer().weight.detach().clone()
    for name in module.active_adapters:
        weight += module.get_delta_weight(name).detach()
    return weight


def _bias(module: Any) -> torch.Tensor | None:
    return None if module.bias is None else module.bias.detach()


def _slides(config: Any) -> bool:
    return getattr(config, "use_sliding_window", True)
