"""A LLaMA-architecture decoder as plain matrices, laid out for decoding.

Owns: reading them from transformers' modules (fused where several are applied to the same input, adapters folded in),
the rotary tables, and the refusal of architectures that compute something else. It does not know how tokens are
decoded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction

# Model types whose layers are exactly: RMSNorm, rotary attention, RMSNorm, SwiGLU.
ARCHITECTURES = ("llama", "mistral", "qwen2")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block. Shapes: qkv [(heads + 2 kv_heads) * head_dim, width], out [width, heads * head_dim],
    gate_up [2 * intermediate, width], down [width, intermediate]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Everything that decoding action tokens reads.

    Attributes:
        table: embeddings of the action rows [rows, width].
        head: output rows of the action tokens [rows, width]; the rest of the vocabulary can never be chosen.
        cos, sin: rotary tables [positions, head_dim]; `sin` is negative in its first half, so that rotating is
            x * cos + roll(x, head_dim / 2) * sin.
    """

    layers: tuple[Layer, ...]
    norm: torch.Tensor
    eps: float
    table: torch.Tensor
    head: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    heads: int
    kv_heads: int
    head_dim: int


def read(network: VLAForActionPrediction, positions: int) -> Decoder:
    """The decoder of `network` with rotary tables for `positions` positions.

    Raises:
        ConfigError: its architecture is not one of `ARCHITECTURES`, or a variant with a sliding window.
    """
    model, config = network.language_model.model, network.config.text_config
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(f"a decoder of type {config.model_type!r}; the engine knows {', '.join(ARCHITECTURES)}.")
    if (getattr(config, "sliding_window", None) or positions) < positions and _slides(config):
        raise ConfigError(f"a sliding window of {config.sliding_window} positions; the prefix needs {positions}.")
    begin = network.config.action_token_begin
    rows = slice(begin, begin + network.config.make_action_tokenizer().vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    table = _matrix(model.embed_tokens)[rows]
    cos, sin = model.rotary_emb(table[None], torch.arange(positions, device=table.device)[None])
    half = torch.ones(head_dim, device=table.device, dtype=sin.dtype)
    half[: head_dim // 2] = -1
    return Decoder(
        layers=tuple(_layer(layer) for layer in model.layers),
        norm=model.norm.weight.detach(),
        eps=config.rms_norm_eps,
        table=table.contiguous(),
        head=_matrix(network.language_model.lm_head)[rows].contiguous(),
        cos=cos[0].to(table.dtype),
        sin=(sin[0] * half).to(table.dtype),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
    )


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [bias for projection in queries if (bias := _bias(projection)) is not None]
    return Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_fuse(*queries),
        qkv_bias=torch.cat(biases) if biases else None,
        out=_matrix(attention.o_proj),
        out_bias=_bias(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_fuse(mlp.gate_proj, mlp.up_proj),
        down=_matrix(mlp.down_proj),
    )


def _fuse(*modules: Any) -> torch.Tensor:
    """The weights of several linear maps of one input, below each other. Frozen modules keep views of the result, so
    that a large decoder is not in memory twice."""
    fused = torch.cat([_matrix(module) for module in modules])
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
