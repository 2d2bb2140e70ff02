"""The weights of a decoder as plain matrices, laid out for decoding.

Owns: reading the weights from transformers' modules, the fastest matrix product on the device, the rotary tables, and
the check of a decoder's architecture. Matrices with the same input are fused, and adapters are merged into the copies;
the modules are not modified. It does not know how tokens are decoded.

A supported decoder is a LLaMA, possibly with biases; RMSNorm of queries and keys, per head (Qwen3, Gemma 3) or over all
heads (OLMo 2); RMSNorm after a block instead of before it (OLMo 2), or before and after it (Gemma 3); layers without
rotary embeddings (SmolLM3), or two kinds of rotary embeddings (Gemma 3); a scaled embedding and GELU (Gemma 3).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUTanh, SiLUActivation

from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction

# Supported model types -> the norms of a layer: before and after attention, before and after the gated network.
_PRE_NORM = ("input_layernorm", None, "post_attention_layernorm", None)
ARCHITECTURES = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "gemma3_text": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}

# Fields of a decoder's config.json that the engine implements, or whose modules it reads.
READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias",
    "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "tie_word_embeddings", "no_rope_layers", "query_pre_attn_scalar", "hidden_activation",
}  # fmt: skip
# Fields that do not affect the logits of a trained decoder: initialisation, training, output format, text, other heads,
# and fields of other software, which transformers ignores.
IGNORED = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "max_position_embeddings",
    "max_sequence_length", "model_max_length", "name_or_path", "_name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "return_dict", "rope_interleaved", "tokenizer_class", "transformers.js_config", "transformers_version",
    "no_rope_layer_interval", "_sliding_window_pattern",  # no_rope_layers and layer_types contain their effect
    "unsloth_fixed", "unsloth_version", "use_cache", "use_mrope",
}  # fmt: skip
# Types of rotary embeddings whose tables do not depend on the sequence length.
ROPE_TYPES = ("default", "linear", "llama3", "proportional", "yarn")

_PARAMETERS = re.compile(
    r"(model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"(\.weight|\.bias|\.base_layer\.weight|\.base_layer\.bias|\.lora_[AB]\.[^.]+\.weight)"
    r"|model\.layers\.\d+\.(input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight"
    r"|model\.layers\.\d+\.self_attn\.[qk]_norm\.weight|model\.norm\.weight"
    r"|(model\.embed_tokens|lm_head)\.(weight|token_adapter\.(base_layer\.weight|trainable_tokens_delta\.[^.]+)))"
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Dropout)
_MODULES = (nn.Linear, nn.Embedding, nn.SiLU, SiLUActivation, GELUTanh, *_CONTAINERS)


class Linear:
    """x -> x W^T + b, for W [out, in] in the layout that is fastest on this device.

    On CPUs, `F.linear` calls MKL. For two to sixty rows, MKL is three times slower than oneDNN with packed weights, and
    does not gain from a second thread. For a single row, a transposed matrix is fastest (docs/benchmarks.md, at the
    sizes of the built-in backbone). `_linear_pointwise` is the operation that torch.compile emits on CPUs; torch has no
    public name for it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._packed = None
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and native(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, in] -> [B, n, out]."""
        if self._packed is None or (x.shape[0] == x.shape[1] == 1 and x.dtype == torch.float32):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def native(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports `dtype` on this processor. bfloat16 and float16 need AVX-512 or AVX-NE-CONVERT."""
    ops = torch.ops.mkldnn
    checks = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return dtype not in checks or checks[dtype]()


class RMSNorm:
    """x -> w x / sqrt(mean(x^2) + eps), over the last axis.

    On CPUs it is computed as sqrt(n) w x / hypot(|x|, sqrt(n eps)), three operations instead of the seven of
    `F.rms_norm`. This makes a forward pass of the built-in backbone 12 % faster.
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
class QueryKeyNorm:
    """RMSNorm of queries and keys, per head or over all heads; values are not changed.

    Attributes:
        widths: widths of queries, keys and values.
        head_dim: width of a head; None: normalise over all heads.
    """

    query: RMSNorm
    key: RMSNorm
    widths: tuple[int, int, int]
    head_dim: int | None

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """[B, n, (heads + 2 kv_heads) * head_dim] -> the same shape."""
        query, key, value = qkv.split(self.widths, dim=-1)
        return torch.cat([self._normed(self.query, query), self._normed(self.key, key), value], dim=-1)

    def _normed(self, norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return norm(x) if self.head_dim is None else norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder block. Shapes: qkv [(heads + 2 kv_heads) * head_dim, width], out [width, heads * head_dim],
    gate_up [2 * intermediate, width], down [width, intermediate].

    Attributes:
        rope: the kind of rotary embedding, a key of the tables of `rotary`.
    """

    attention_norm: RMSNorm | None
    qkv: Linear
    query_key_norm: QueryKeyNorm | None
    out: Linear
    attention_post_norm: RMSNorm | None
    mlp_norm: RMSNorm | None
    gate_up: Linear
    down: Linear
    mlp_post_norm: RMSNorm | None
    rope: str


@dataclasses.dataclass(frozen=True)
class Injection:
    """The latent of a Free Transformer: in one block, an embedding of its codes is added to the input of keys and
    values.

    Attributes:
        layer: index of the block.
        query: the block's projection to queries [heads * head_dim, width].
        key_value: the block's projection to keys and values [2 kv_heads * head_dim, width].
        shift: codes, int64 [B, n] -> their embedding [B, n, width].
    """

    layer: int
    query: Linear
    key_value: Linear
    shift: Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """All weights needed to decode action tokens.

    Attributes:
        layers: the decoder blocks.
        norm: the final norm.
        table: embeddings of the action tokens [rows, width].
        head: output layer for the action tokens [rows, width]; other tokens cannot be chosen.
        heads, kv_heads: number of query heads and of key/value heads.
        head_dim: width of a head.
        scale: factor of the attention logits.
        gelu: whether the gate is GELU (tanh approximation) instead of SiLU.
        reach: size of the attention window in positions; infinite without a sliding window.
        injection: the latent; None without a latent.
    """

    layers: tuple[Layer, ...]
    norm: RMSNorm
    table: torch.Tensor
    head: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    gelu: bool
    reach: float
    injection: Injection | None


def read(network: VLAForActionPrediction) -> Decoder:
    """Read the decoder of `network` without modifying it. ConfigError if the engine does not support the decoder."""
    model, config = network.language_model.model, network.language_model.config
    check_config(config)
    _check_modules(network.language_model, config.model_type)
    begin = network.config.action_token_begin
    rows = slice(begin, begin + network.action_tokenizer.vocab_size)
    table = _matrix(model.embed_tokens)[rows].contiguous()
    for module in model.embed_tokens.modules():
        if hasattr(module, "embed_scale"):
            table = table * module.embed_scale.to(table.dtype)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return Decoder(
        layers=tuple(_layer(layer, rope, config) for layer, rope in zip(model.layers, _ropes(config), strict=True)),
        norm=_norm(model.norm),
        table=table,
        head=Linear(_matrix(network.language_model.lm_head)[rows].contiguous()),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        scale=(getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        gelu=config.model_type == "gemma3_text",
        reach=(getattr(config, "sliding_window", None) if sliding else None) or math.inf,
        injection=None if network.latent is None else _injection(network, table.dtype),
    )


def check_config(config: Any) -> None:
    """Raise ConfigError if the engine does not support a field of the decoder's config.json."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(f"decoder of type {config.model_type!r}; the engine supports {', '.join(ARCHITECTURES)}.")
    defaults = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name not in READ | IGNORED and value != defaults.get(name):
            raise ConfigError(f"the decoder's config.json has {name!r}: {value!r}, which the engine does not support.")
    field, expected = ("hidden_act", "silu")
    if config.model_type == "gemma3_text":
        field, expected = ("hidden_activation", "gelu_pytorch_tanh")
    if (activation := getattr(config, field)) not in (expected, "swish" if expected == "silu" else expected):
        raise ConfigError(f"{field} {activation!r}; the engine supports {expected!r}.")
    ropes = config.rope_parameters
    for rope in [ropes] if "rope_type" in ropes else ropes.values():
        if rope.get("rope_type") not in ROPE_TYPES:
            raise ConfigError(f"rope_type {rope.get('rope_type')!r}; the engine supports {', '.join(ROPE_TYPES)}.")
        if (factor := rope.get("partial_rotary_factor")) not in (None, 1):
            raise ConfigError(f"partial_rotary_factor {factor}; the engine supports rotation of whole heads only.")
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types {', '.join(sorted(other))}; the engine supports full and sliding attention.")


def _check_modules(language_model: nn.Module, model_type: str) -> None:
    """Raise ConfigError if the language model has modules or parameters that `read` does not use."""
    family = model_type.removesuffix("_text")
    own = f"transformers.models.{family}.modeling_{family}"
    for name, module in language_model.named_modules():
        kind = type(module)
        if kind not in _MODULES and kind.__module__ != own and not kind.__module__.startswith("peft."):
            raise ConfigError(
                f"the decoder's {name or 'class'} is a {kind.__name__}, which the engine does not support."
            )
        if getattr(module, "lora_variant", None):
            raise ConfigError(f"{name} has an adapter other than plain LoRA, which the engine does not support.")
    for name, _ in language_model.named_parameters():
        if not _PARAMETERS.fullmatch(name):
            raise ConfigError(f"the decoder has a parameter {name}, which the engine does not support.")


def rotary(network: VLAForActionPrediction, positions: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each kind of rotary embedding, tables cos and sin [positions, heads + 2 kv_heads, head_dim] for concatenated
    queries, keys and values.

    Values are not rotated (cos = 1, sin = 0). The first half of sin is negated, so that the rotation is

        x * cos + roll(x, head_dim / 2) * sin.
    """
    model, config = network.language_model.model, network.language_model.config
    table, tables = model.embed_tokens.weight, {}
    places = torch.arange(positions, device=table.device)[None]
    turned, kept = config.num_attention_heads + config.num_key_value_heads, (0, 0, 0, config.num_key_value_heads)
    for kind in dict.fromkeys(_ropes(config)):
        by_type = (kind,) if kind in config.rope_parameters else ()
        cos, sin = model.rotary_emb(table[None], places, *by_type)
        if kind == _NO_ROPE:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        first, second = sin[0].chunk(2, dim=-1)
        cos, sin = cos[0], torch.cat([-first, second], dim=-1)
        expand = (positions, turned, cos.shape[-1])
        tables[kind] = F.pad(cos[:, None].expand(expand), kept, value=1.0), F.pad(sin[:, None].expand(expand), kept)
    return tables


_ROPE, _NO_ROPE = "rope", "none"


def _ropes(config: Any) -> list[str]:
    """The kind of rotary embedding of each layer."""
    if "rope_type" not in config.rope_parameters:  # parameters by layer type
        return list(config.layer_types)
    used = getattr(config, "no_rope_layers", None) or [True] * config.num_hidden_layers
    return [_ROPE if rotated else _NO_ROPE for rotated in used]


def _layer(layer: Any, rope: str, config: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    names = ARCHITECTURES[config.model_type]
    norms = [None if name is None else _norm(getattr(layer, name)) for name in names]
    return Layer(
        attention_norm=norms[0],
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        query_key_norm=_query_key_norm(attention) if hasattr(attention, "q_norm") else None,
        out=_fused(attention.o_proj),
        attention_post_norm=norms[1],
        mlp_norm=norms[2],
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        down=_fused(mlp.down_proj),
        mlp_post_norm=norms[3],
        rope=rope,
    )


def _injection(network: VLAForActionPrediction, dtype: torch.dtype) -> Injection:
    layers = network.language_model.model.layers
    attention = layers[len(layers) // 2].self_attn
    return Injection(
        layer=len(layers) // 2,
        query=_fused(attention.q_proj),
        key_value=_fused(attention.k_proj, attention.v_proj),
        shift=lambda codes: network.latent.shift(codes).to(dtype),
    )


def _query_key_norm(attention: Any) -> QueryKeyNorm:
    width, kv_width = attention.q_proj.out_features, attention.k_proj.out_features
    per_head = attention.head_dim if len(attention.q_norm.weight) != width else None
    return QueryKeyNorm(_norm(attention.q_norm), _norm(attention.k_norm), (width, kv_width, kv_width), per_head)


def _norm(module: Any) -> RMSNorm:
    if hasattr(module, "variance_epsilon"):
        return RMSNorm(module.weight.detach(), module.variance_epsilon)
    return RMSNorm(1 + module.weight.detach(), module.eps)  # Gemma's


def _fused(*modules: Any) -> Linear:
    """Fuse linear layers with the same input into one copy, transposed in memory on CPUs. A single layer is not
    copied."""
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    if len(modules) == 1:
        return Linear(_matrix(*modules), bias)
    weight = torch.cat([_matrix(module) for module in modules])
    return Linear(weight.T.contiguous().T if weight.device.type == "cpu" else weight, bias)


def _matrix(module: Any) -> torch.Tensor:
    """The weight of a linear layer, plus the update of an unmerged adapter."""
    if hasattr(module, "token_adapter"):  # peft trains some of its rows
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters).detach()
    if not hasattr(module, "get_delta_weight"):
        return module.weight.detach()
    weight = module.get_base_layer().weight.detach()
    if module.merged or module.disable_adapters:
        return weight
    active = [name for name in module.active_adapters if name in module.lora_A]
    return sum((module.get_delta_weight(name).detach() for name in active), weight)
