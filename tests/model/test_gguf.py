"""GGUF files give the same LLaMA that they were written from; other contents are rejected by name."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import random_models
from tests.decoders import reference
from tests.model.test_families import LLAMA3, SMALL
from vla.config import LoraConfig, ModelConfig, TrainConfig
from vla.decoding.engine import Engine
from vla.errors import ConfigError
from vla.jobs.train import train
from vla.model.build import build_policy
from vla.policy import Policy

gguf = pytest.importorskip("gguf")

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
NAMES |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk"}


def save_gguf(path, *, architecture="llama", without="", extra=None, factors=None, kind="F32", **changes):
    """Write a random LLaMA as llama.cpp's converter does, and return it.

    Args:
        without: omit tensors with this in their name.
        extra: additional metadata.
        factors: divisors of the rotary frequencies.
        kind: type of the matrices.
    """
    torch.manual_seed(1)
    config = LlamaConfig(**(SMALL | changes))
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for name, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    writer.add_tokenizer_model("gpt2")
    alphabet = sorted(random_models.pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list(["<unk>", "<s>", "</s>", *alphabet, "th"])
    writer.add_token_types([3, 3, 3] + [1] * (len(alphabet) + 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for own, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if own in name:  # rows 0, 1, ..., d-1 of a head are stored in the order 0, d/2, 1, d/2 + 1, ...
                half = config.head_dim // 2
                order = np.arange(heads * 2 * half).reshape(heads, 2, half).transpose(0, 2, 1).ravel()
                array = array[order]
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if (without and without in name) or (config.tie_word_embeddings and name.startswith("output.")):
            continue
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def compose(path, facts, **values):
    values = {"backbone": str(path), "vision": ("nano",), "horizon": 2, "bins": 31} | values
    return build_policy(ModelConfig(**values), facts)


def factors_of(rope, dim):
    """The divisors of the rotary frequencies, from transformers' implementation."""
    config = LlamaConfig(**SMALL, head_dim=dim, rope_parameters=rope)
    default = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    plain = LlamaConfig(**SMALL, head_dim=dim, rope_parameters=default)
    inverse = [LlamaForCausalLM(values).model.rotary_emb.inv_freq for values in (plain, config)]
    return inverse[0] / inverse[1]


PUBLISHED = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {"kind": "F16"}),
        ({"attention_bias": True, "head_dim": 32}, {"extra": {"llama.attention.key_length": 32}}),
        ({"rope_parameters": PUBLISHED}, {"factors": factors_of(PUBLISHED, 16)}),
        ({"rope_parameters": LINEAR}, {"extra": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4}}),
    ],
    ids=["plain", "tied, half precision", "biases, wide heads", "llama 3.2", "linear scaling"],
)
def test_logits_equal_those_of_the_original_model(tmp_path, facts, changes, written):
    model = save_gguf(tmp_path / "small.gguf", **changes, **written)
    network, processor = compose(tmp_path / "small.gguf", facts)
    ids = torch.randint(0, 600, (2, 40))
    tolerance = 2e-2 if written.get("kind") == "F16" else 1e-5
    with torch.inference_mode():
        torch.testing.assert_close(network(ids).logits, model(ids).logits, atol=tolerance, rtol=tolerance)
    assert processor.tokenizer.tokenize("the cat") == ["th", "e", "Ġ", "c", "a", "t"]


def test_quantised_files_are_trained_saved_and_decoded(tmp_path, robot, dataset, observations):
    save_gguf(tmp_path / "small.gguf", kind="Q8_0")
    model = ModelConfig(backbone=str(tmp_path / "small.gguf"), vision=("nano",), horizon=2, bins=31)
    values = {"steps": 2, "batch_size": 2, "val_fraction": 0.0, "warmup_steps": 0, "precision": "float32"}
    demos = dataset("demos", robot, episodes=1, length=4)
    run = train(TrainConfig(data=(demos,), out=tmp_path / "run", model=model, lora=LoraConfig(rank=4), **values))
    (tmp_path / "small.gguf").unlink()
    policy = Policy.from_pretrained(str(run), device="cpu")
    batch = policy.processor.observe(observations(2), ["reach", "pick up the red cube"])
    assert torch.equal(Engine(policy.network).stepwise(batch).ids, reference(policy.network, batch))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; only 'llama' is supported"),
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count 8, which is not supported"),
        ({"extra": {"llama.attention.causal_window": 3}}, "llama.attention.causal_window 3"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "scaling.type 'longrope'"),
        ({"factors": [1.0] * 7 + [3.0]}, "rope_freqs.weight that differs from those of"),
        ({"without": "ffn_down"}, r"missing keys: model\.layers\.0\.mlp\.down_proj\.weight"),
        ({"without": "token_embd"}, "token_embd"),
    ],
)
def test_other_files_are_rejected(tmp_path, facts, written, said):
    save_gguf(tmp_path / "other.gguf", **written)
    with pytest.raises(ConfigError, match=said):
        compose(tmp_path / "other.gguf", facts)


@pytest.mark.parametrize("size", [0, 3, 2000, -1000])
def test_truncated_files(tmp_path, facts, size):
    save_gguf(tmp_path / "small.gguf")
    whole = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(ConfigError, match=r"cut\.gguf is damaged, incomplete or not a GGUF file"):
        compose(tmp_path / "cut.gguf", facts)
    with pytest.raises(ConfigError, match="there is no such file"):
        compose(tmp_path / "none.gguf", facts)
