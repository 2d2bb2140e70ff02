"""A LLaMA-architecture decoder as plain matrices, laid out for decoding.

Owns: reading them from transformers' modules (fused where several are applied to the same input, adapters folded in;
the modules stay as they are), how this device multiplies by them fastest, the rotary tables, and the refusal of
decoders that compute something else. It does not know how tokens are decoded.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction

# Model types whose layers are exactly: RMSNorm, rotary attention, RMSNorm, SwiGLU.
ARCHITECTURES = ("llama", "mistral", "qwen2")

# Fields of a decoder's config.json that the engine computes, or whose modules it reads.
READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias",
    "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "tie_word_embeddings",
}  # fmt: skip
# Fields without influence on the logits of a trained decoder: initialisation, training, output format, text, other
# heads, and notes of other software that transformers does not read either.
IGNORED = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "max_position_embeddings",
    "max_sequence_length", "model_max_length", "name_or_path", "_name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "return_dict", "rope_interleaved", "tokenizer_class", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache", "use_mrope",
}  # fmt: skip
# Rotary tables that do not depend on how long a sequence is.
ROPE_TYPES = ("default", "linear", "llama3", "proportional", "yarn")

_PARAMETERS = re.compile(
    r"(model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"(\.weight|\.bias|\.base_layer\.weight|\.base_layer\.bias|\.lora_[AB]\.[^.]+\.weight)"
    r"|model\.layers\.\d+\.(input|post_attention)_layernorm\.weight|model\.norm\.weight"
    r"|(model\.embed_tokens|lm_head)\.(weight|token_adapter\.(base_layer\.weight|trainable_tokens_delta\.[^.]+)))"
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Dropout)
_MODULES = (nn.Linear, nn.Embedding, nn.SiLU, SiLUActivation, *_CONTAINERS)


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
        reach: positions that attention covers, infinite unless it slides.
    """

    layers: tuple[Layer, ...]
    norm: RMSNorm
    table: torch.Tensor
    head: Linear
    heads: int
    kv_heads: int
    head_dim: int
    reach: float


def read(network: VLAForActionPrediction) -> Decoder:
    """The decoder of `network`, whose parameters are only read. ConfigError when it computes something else than the
    engine does."""
    model, config = network.language_model.model, network.language_model.config
    check_config(config)
    _check_modules(network.language_model, config.model_type)
    begin = network.config.action_token_begin
    rows = slice(begin, begin + network.action_tokenizer.vocab_size)
    table = _matrix(model.embed_tokens)[rows].contiguous()
    return Decoder(
        layers=tuple(_layer(layer) for layer in model.layers),
        norm=_norm(model.norm),
        table=table,
        head=Linear(_matrix(network.language_model.lm_head)[rows].contiguous()),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        reach=getattr(config, "sliding_window", None) or math.inf,
    )


def check_config(config: Any) -> None:
    """ConfigError, naming the field, unless the engine computes what a decoder's config.json describes."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(f"a decoder of type {config.model_type!r}; the engine knows {', '.join(ARCHITECTURES)}.")
    defaults = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name not in READ | IGNORED and value != defaults.get(name):
            raise ConfigError(f"the decoder's config.json has {name!r}: {value!r}, which the engine does not compute.")
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config.hidden_act!r}; the engine computes 'silu'.")
    rope = config.rope_parameters
    if rope.get("rope_type") not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope.get('rope_type')!r}; the engine computes {', '.join(ROPE_TYPES)}.")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"partial_rotary_factor {rope['partial_rotary_factor']}; the engine rotates whole heads.")
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types {', '.join(sorted(other))}; the engine computes full attention.")


def _check_modules(language_model: nn.Module, model_type: str) -> None:
    """ConfigError unless the language model consists of the modules and parameters that are read below."""
    own = f"transformers.models.{model_type}.modeling_{model_type}"
    for name, module in language_model.named_modules():
        kind = type(module)
        if kind not in _MODULES and kind.__module__ != own and not kind.__module__.startswith("peft."):
            raise ConfigError(f"the decoder's {name or 'class'} is a {kind.__name__}, which the engine does not know.")
        if getattr(module, "lora_variant", None):
            raise ConfigError(f"{name} has an adapter that is not plain LoRA.")
    for name, _ in language_model.named_parameters():
        if not _PARAMETERS.fullmatch(name):
            raise ConfigError(f"the decoder has a parameter {name}, which the engine does not read.")


def rotary(network: VLAForActionPrediction, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables cos and sin [positions, heads + 2 kv_heads, head_dim] for queries, keys and values side by side;
    values are turned by nothing. sin is negative in its first half, so that turning is

        x * cos + roll(x, head_dim / 2) * sin.
    """
    model, config = network.language_model.model, network.language_model.config
    table = model.embed_tokens.weight
    cos, sin = model.rotary_emb(table[None], torch.arange(positions, device=table.device)[None])
    first, second = sin[0].chunk(2, dim=-1)
    cos, sin = cos[0], torch.cat([-first, second], dim=-1)
    turned, kept = config.num_attention_heads + config.num_key_value_heads, (0, 0, 0, config.num_key_value_heads)
    expand = (positions, turned, cos.shape[-1])
    return F.pad(cos[:, None].expand(expand), kept, value=1.0), F.pad(sin[:, None].expand(expand), kept)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_fused(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        down=_fused(mlp.down_proj),
    )


def _norm(module: Any) -> RMSNorm:
    return RMSNorm(module.weight.detach(), module.variance_epsilon)


def _fused(*modules: Any) -> Linear:
    """Several linear maps of one input, below each other: a copy, on a CPU transposed in memory. One map alone is
    used where it is."""
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    if len(modules) == 1:
        return Linear(_matrix(*modules), bias)
    weight = torch.cat([_matrix(module) for module in modules])
    return Linear(weight.T.contiguous().T if weight.device.type == "cpu" else weight, bias)


def _matrix(module: Any) -> torch.Tensor:
    """The weight of a linear map, with what an unmerged adapter adds to it."""
    if hasattr(module, "token_adapter"):  # peft trains some rows of it
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters).detach()
    if not hasattr(module, "get_delta_weight"):
        return module.weight.detach()
    weight = module.get_base_layer().weight.detach()
    if module.merged or module.disable_adapters:
        return weight
    active = [name for name in module.active_adapters if name in module.lora_A]
    return sum((module.get_delta_weight(name).detach() for name in active), weight)
