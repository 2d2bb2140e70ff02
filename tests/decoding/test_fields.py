"""Each field of a decoder's config.json that changes the computation is supported by the engine, or falls back."""

import ast
import importlib
import inspect
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, cache_utils, masking_utils

from tests.decoders import reference
from vla.config import LoraConfig
from vla.decoding import weights
from vla.decoding.engine import Engine
from vla.decoding.strategies import teacher_forced
from vla.errors import ConfigError
from vla.model import lora
from vla.policy import Policy

FACTOR = {"rope_theta": 1e4, "factor": 4.0}
YARN = FACTOR | {"rope_type": "yarn", "original_max_position_embeddings": 16}
LLAMA3 = FACTOR | {"rope_type": "llama3", "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = FACTOR | {"rope_type": "dynamic", "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}

# Both kinds of layers and of rotary embeddings.
GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256, "head_dim": 64}
LOCAL, GLOBAL = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e6}
GEMMA |= {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": GLOBAL}}
SCALED = {"sliding_attention": LOCAL, "full_attention": FACTOR | {"rope_type": "linear"}}


def with_decoder(nano, kind, **values):
    """The network and processor of `nano`, with another random decoder of two layers."""
    network, processor = nano
    text = network.config.text_config.to_dict() | {"model_type": kind, "num_hidden_layers": 2} | values
    network.config.text_config = AutoConfig.for_model(**text)
    torch.manual_seed(3)
    network.language_model = AutoModelForCausalLM.from_config(network.config.text_config)
    with torch.no_grad():
        for name, parameter in network.language_model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.08)
            elif kind not in (
                "llama",
                "mistral",
                "qwen2",
            ):  # so that ignoring a norm changes tokens
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return network.eval(), processor


def decode(network, processor, observations):
    """Ids of the policy and of `generate`, and whether the policy uses the engine."""
    batch = processor.observe(observations(3), ["reach", "pick up the red cube", "open the drawer"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        policy = Policy(network, processor)
        ids = policy.decode(batch).ids
    slower = [str(warning.message) for warning in said if "through transformers" in str(warning.message)]
    forced = teacher_forced(network, batch, ids).logits.argmax(-1) + network.config.action_token_begin
    assert torch.equal(ids, reference(network, batch)) and torch.equal(ids, forced)
    return slower


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"head_dim": 32}),
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("llama", {"rope_parameters": FACTOR | {"rope_type": "linear"}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 256, "head_dim": 96}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 32, "num_key_value_heads": 2}),
        ("qwen3", {"attention_bias": True, "rope_parameters": YARN}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        ("smollm3", {"no_rope_layer_interval": 2, "num_key_value_heads": 2, "mlp_bias": True}),
        ("olmo2", {"num_key_value_heads": 2}),
        ("gemma3_text", GEMMA),
        ("gemma3_text", GEMMA | {"head_dim": 32, "num_key_value_heads": 2, "query_pre_attn_scalar": 5}),
        ("gemma3_text", GEMMA | {"rope_parameters": SCALED}),
        ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 2, "sliding_window": 4}),
    ],
)
def test_supported_by_the_engine(nano, observations, kind, values):
    assert decode(*with_decoder(nano, kind, **values), observations) == []


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"rope_parameters": DYNAMIC}, "rope_type 'dynamic'"),
        ("llama", {"rope_parameters": LONG}, "rope_type 'longrope'"),
        ("llama", {"attention_multiplier": 0.5}, "attention_multiplier"),
        ("qwen2", {"attention_chunk_size": 64}, "attention_chunk_size"),
        ("mistral", {"sliding_window": 12}, "attention window has 12 positions"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}, "window has 12"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}, "window has 12"),
        ("gemma3_text", GEMMA | {"sliding_window": 12}, "attention window has 12 positions"),
        ("gemma3_text", GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("olmo3", {}, "'olmo3'"),
    ],
)
def test_falls_back_to_transformers(nano, observations, kind, values, named):
    """With the same tokens, and with a warning that names the field."""
    (slower,) = decode(*with_decoder(nano, kind, **values), observations)
    assert named in slower


@pytest.mark.parametrize(
    ("kind", "values"), [("gemma3_text", GEMMA), ("olmo2", {}), ("qwen3", {"head_dim": 32}), ("smollm3", {})]
)
def test_an_adapter_before_and_after_its_merge(nano, observations, kind, values):
    """The rows of action tokens in the embedding are trained; Gemma scales this embedding."""
    network, processor = with_decoder(nano, kind, **values)
    batch = processor.observe(observations(3), ["reach", "pick up the red cube", "open the drawer"])
    before, adapted = reference(network, batch), lora.attach(network, LoraConfig(rank=4, alpha=16)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    expected = reference(network, batch)
    assert not torch.equal(before, expected)
    assert torch.equal(Engine(network).stepwise(batch).ids, expected)
    merged = lora.merge(adapted)
    assert torch.equal(Engine(merged).stepwise(batch).ids, expected) and torch.equal(reference(merged, batch), expected)


@pytest.mark.parametrize(
    "values",
    [{"per_layer_config": {0: {"rms_norm_eps": 1e-3}}}, {"is_causal": False}, {"is_encoder_decoder": True}],
    ids=lambda values: next(iter(values)),
)
def test_rejected(values):
    """Configurations that transformers' own classes do not decode from left to right."""
    with pytest.raises(ConfigError, match=next(iter(values))):
        weights.check_config(AutoConfig.for_model("llama", num_hidden_layers=2, **values))


def test_a_window_counts_from_the_real_length(nano, observations):
    """A window with as many positions as prefix and chunk has no effect; a shorter one does."""
    network, processor = nano
    batch = processor.observe(observations(1), ["reach"])
    needed = batch["input_ids"].shape[1] + processor.action_tokenizer.max_tokens - 1
    for window, fits in ((needed, True), (needed - 1, False)):
        network, processor = with_decoder(nano, "mistral", sliding_window=window)
        assert Policy(network, processor)._decoder.engine.fits(batch) == fits
        assert torch.equal(Policy(network, processor).decode(batch).ids, reference(network, batch))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda decoder: setattr(decoder.model.layers[1].mlp, "act_fn", torch.nn.GELU()), "act_fn is a GELU"),
        (lambda decoder: setattr(decoder.model.layers[0].self_attn, "q_norm", torch.nn.LayerNorm(64)), "q_norm"),
        (lambda decoder: setattr(decoder, "lm_head", torch.nn.Linear(256, 1024)), r"lm_head\.bias"),
        (
            lambda decoder: decoder.model.layers[0].register_parameter("scale", torch.nn.Parameter(torch.ones(1))),
            r"layers\.0\.scale",
        ),
    ],
    ids=["activation", "norm", "bias of the head", "parameter"],
)
def test_unknown_modules_are_rejected(nano, change, named):
    change(nano[0].language_model)
    with pytest.raises(ConfigError, match=named):
        weights.read(nano[0])


def fields_read(module) -> set[str]:
    """Names of the fields of `config` that a module of transformers reads, as attributes or with `getattr`."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1].endswith("config"):
            found.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and "config" in ast.unparse(node.args[0]):
            found.add(ast.literal_eval(node.args[1]))
    return found


# Fields that cause a fallback if they are set, and fields of the vision-language model in the same file.
REFUSED = {"gemma3_text": {"final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"}}
ELSEWHERE = {"gemma3_text": {"text_config", "vision_config", "patch_size", "image_size", "image_token_id"}}
ELSEWHERE["gemma3_text"] |= {"mm_tokens_per_image", "layer_norm_eps"}


@pytest.mark.parametrize("kind", weights.ARCHITECTURES)
def test_every_field_that_transformers_reads_is_accounted_for(kind):
    """Fails if a new version of transformers reads a new field."""
    family = kind.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    read = fields_read(modeling)
    assert {"rms_norm_eps", "rope_parameters", "num_hidden_layers"} <= read  # the search finds fields at all
    methods = {"get_text_config", "_attn_implementation"}
    assert read <= weights.READ | weights.IGNORED | methods | REFUSED.get(kind, set()) | ELSEWHERE.get(kind, set())
    # Undeclared fields that transformers' caches and masks read.
    undeclared = fields_read(cache_utils) | fields_read(masking_utils)
    assert not undeclared & weights.IGNORED


@pytest.mark.parametrize("kind", weights.ARCHITECTURES)
def test_every_declared_field_is_known(kind):
    declared = set(AutoConfig.for_model(kind).to_dict())
    assert declared - weights.READ - weights.IGNORED == {"is_encoder_decoder"} | REFUSED.get(kind, set())
