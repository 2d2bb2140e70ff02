"""The weights of a decoder with LLaMA architecture as plain matrices, laid out for decoding.

Owns: reading the weights from transformers' modules, the fastest matrix product on the device, the rotary tables, and
the check that a decoder has the supported architecture. Matrices with the same input are fused, and adapters are merged
into the copies; the modules are not modified. It does not know how tokens are decoded.
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

# Model types whose layers are exactly RMSNorm, attention with rotary embeddings, RMSNorm, SwiGLU.
ARCHITECTURES = ("llama", "mistral", "qwen2")

# Fields of a decoder's config.json that the engine implements, or whose modules it reads.
READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias",
    "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "tie_word_embeddings",
}  # fmt: skip
# Fields that do not affect the logits of a trained decoder: initialisation, training, output format, text, other heads,
# and fields of other software that transformers ignores as well.
IGNORED = {
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "max_position_embeddings",
    "max_sequence_length", "model_max_length", "name_or_path", "_name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "return_dict", "rope_interleaved", "tokenizer_class", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache", "use_mrope",
}  # fmt: skip
# Types of rotary embeddings whose tables do not depend on the sequence length.
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
    """x -> x W^T + b, for W [out, in] in the layout that is fastest on this device.

    On CPUs, `F.linear` calls MKL. For two to sixty rows, MKL is three times slower than oneDNN with packed weights, and
    a second thread does not make it faster. For a single row, a transposed matrix is fastest. Both were measured at
    the sizes of the embedded backbone (docs/benchmarks.md). `_linear_pointwise` is the operation that torch.compile
    emits on CPUs; torch has no public name for it.
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

    On CPUs it is computed as sqrt(n) w x / hypot(|x|, sqrt(n eps)). This is equal, but takes three operations instead
    of the seven of `F.rms_norm`. A forward pass of the embedded backbone takes 12 % less time.
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
    """One decoder block. Shapes: qkv [(heads + 2 kv_heads) * head_dim, width], out [width, heads * head_dim],
    gate_up [2 * intermediate, width], down [width, intermediate]."""

    attention_norm: RMSNorm
    qkv: Linear
    out: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear


@dataclasses.dataclass(frozen=True)
class Decoder:
    """All weights that are needed to decode action tokens.

    Attributes:
        layers: the decoder blocks.
        norm: the final norm.
        table: embeddings of the action tokens [rows, width].
        head: output layer for the action tokens [rows, width]; other tokens cannot be chosen.
        heads, kv_heads: number of query heads and of key/value heads.
        head_dim: width of a head.
        reach: number of positions that attention covers; infinite without a sliding window.
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
    """Read the decoder of `network`, which is not modified. ConfigError if the engine does not support the decoder."""
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
    """Raise ConfigError, naming the field, if the engine does not support a decoder's config.json."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(f"decoder of type {config.model_type!r}; the engine supports {', '.join(ARCHITECTURES)}.")
    defaults = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name not in READ | IGNORED and value != defaults.get(name):
            raise ConfigError(f"the decoder's config.json has {name!r}: {value!r}, which the engine does not support.")
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config.hidden_act!r}; the engine supports 'silu'.")
    rope = config.rope_parameters
    if rope.get("rope_type") not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope.get('rope_type')!r}; the engine supports {', '.join(ROPE_TYPES)}.")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(
            f"partial_rotary_factor {rope['partial_rotary_factor']}; the engine supports rotation of whole heads only."
        )
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types {', '.join(sorted(other))}; the engine supports full and sliding attention.")


def _check_modules(language_model: nn.Module, model_type: str) -> None:
    """Raise ConfigError if the language model has modules or parameters that `read` does not use."""
    own = f"transformers.models.{model_type}.modeling_{model_type}"
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


def rotary(network: VLAForActionPrediction, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables cos and sin [positions, heads + 2 kv_heads, head_dim] for concatenated queries, keys and values.

    Values are not rotated (cos = 1, sin = 0). The first half of sin is negated, so that the rotation is

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
    """Fuse linear layers with the same input into one. Several layers are copied (on CPUs transposed in memory); a
    single layer keeps its weight without a copy."""
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    if len(modules) == 1:
        return Linear(_matrix(*modules), bias)
    weight = torch.cat([_matrix(module) for module in modules])
    return Linear(weight.T.contiguous().T if weight.device.type == "cpu" else weight, bias)


def _matrix(module: Any) -> torch.Tensor:
    """The weight of a linear layer, plus the update of an unmerged adapter."""
    if hasattr(module, "token_adapter"):  # some rows are trained by peft
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters).detach()
    if not hasattr(module, "get_delta_weight"):
        return module.weight.detach()
    weight = module.get_base_layer().weight.detach()
    if module.merged or module.disable_adapters:
        return weight
    active = [name for name in module.active_adapters if name in module.lora_A]
    return sum((module.get_delta_weight(name).detach() for name in active), weight)
