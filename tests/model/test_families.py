"""All supported families of language models: two training steps, merging, saving, reloading and decoding."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SmolVLMConfig,
)

from tests import random_models
from tests.decoders import reference
from vla.config import LoraConfig, ModelConfig, TrainConfig
from vla.decoding.engine import Engine
from vla.decoding.strategies import teacher_forced
from vla.errors import ConfigError
from vla.jobs.train import train
from vla.model.build import build_policy
from vla.policy import Policy, checkpoint

SMALL = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
FAMILIES = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen 2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen 3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "smollm 3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "olmo 2": ("olmo2", {}),
    "gemma 3": ("gemma3_text", {"head_dim": 32, "sliding_window": 512, "query_pre_attn_scalar": 64}),
}


def save(folder, kind, values):
    """A random language model of this family, with a text tokenizer."""
    random_models.save_llama(folder)  # for the tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | values)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that each part changes the tokens.
            spread = 0.3 if "norm" in name or name.endswith("bias") else 0.15
            parameter.add_(torch.randn(parameter.shape) * spread)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, robot, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    save(folder / "llm", *FAMILIES[request.param])
    random_models.save_siglip(folder / "eyes")
    model = ModelConfig(backbone=str(folder / "llm"), vision=(str(folder / "eyes"),), horizon=2, bins=31)
    demos = dataset("demos", robot, episodes=1, length=4)
    values = {"steps": 2, "batch_size": 2, "val_fraction": 0.0, "warmup_steps": 0, "precision": "float32"}
    return train(TrainConfig(data=(demos,), out=folder / "run", model=model, lora=LoraConfig(rank=4), **values))


@pytest.mark.filterwarnings("ignore:vision tower .* has no image_mean")
def test_trained_merged_reloaded_and_decoded(trained, observations):
    policy = Policy.from_pretrained(str(trained), device="cpu")
    network, words = policy.network, ["reach", "pick up the red cube", "open"]
    batch = policy.processor.observe(observations(3), words)
    fast = Engine(network).stepwise(batch)
    assert torch.equal(fast.ids, reference(network, batch))
    exact = teacher_forced(network, batch, fast.ids).logits
    assert exact.std() > 0.5
    torch.testing.assert_close(fast.logits, exact, atol=2e-3, rtol=1e-3)


def save_llava(folder, **changes):
    """A random LLaVA, with a text tokenizer."""
    random_models.save_llama(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(6)
    text, vision = LlamaConfig(**SMALL), CLIPVisionConfig(**random_models.VISION)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, **changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore:vision tower .* has no image_mean")
def test_llava_keeps_its_projector(tmp_path, facts, observations):
    theirs = save_llava(tmp_path / "llava", vision_feature_layer=-1)
    network, processor = build_policy(ModelConfig(backbone=str(tmp_path / "llava"), horizon=2, bins=31), facts)
    pixels = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values[0])[:, None, None] for values in (network.config.image_mean, network.config.image_std)
    )
    with torch.inference_mode():
        features = theirs.model.get_image_features((pixels[:, 0] / 255 - mean) / std, return_dict=True).pooler_output
        torch.testing.assert_close(
            network.eval().encode_images(pixels), torch.stack(list(features)), atol=1e-5, rtol=1e-5
        )
        ids = torch.randint(6, 200, (2, 9))
        torch.testing.assert_close(network(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    checkpoint.save(network, processor, tmp_path / "policy")
    policy = Policy.from_pretrained(str(tmp_path / "policy"), device="cpu")
    batch = policy.processor.observe(observations(2), ["reach", "pick up the red cube"])
    assert torch.equal(Engine(policy.network).stepwise(batch).ids, reference(network, batch))


@pytest.mark.parametrize(
    "changes",
    [{"projector_hidden_act": "relu"}, {"vision_feature_select_strategy": "full"}, {"vision_feature_layer": 1}],
)
def test_other_llavas_are_rejected(tmp_path, facts, changes):
    save_llava(tmp_path / "llava", **changes)
    with pytest.raises(ConfigError, match=f"has {next(iter(changes))} "):
        build_policy(ModelConfig(backbone=str(tmp_path / "llava")), facts)


def save_idefics3(folder, kind, **changes):
    """A random Idefics3 or SmolVLM with 2 x 2 patches per token, and a text tokenizer."""
    random_models.save_llama(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(7)
    text = {"model_type": "llama", **SMALL}
    config = kind(vision_config=random_models.VISION, text_config=text, image_token_id=5, scale_factor=2, **changes)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore:vision tower .* has no image_mean")
@pytest.mark.parametrize(("kind", "tied"), [(Idefics3Config, False), (SmolVLMConfig, True)])
def test_idefics3_keeps_its_connector_and_is_trained(tmp_path, facts, robot, dataset, observations, kind, tied):
    theirs = save_idefics3(tmp_path / "vlm", kind, tie_word_embeddings=tied)
    model = ModelConfig(backbone=str(tmp_path / "vlm"), horizon=2, bins=31)
    network, processor = build_policy(model, facts)
    assert processor.tokens_per_image == 4
    pixels = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        features = theirs.get_image_features((pixels / 255 - 0.5) / 0.5, return_dict=True).pooler_output
        ours = network.eval().encode_images(pixels)
        torch.testing.assert_close(ours, torch.stack(list(features)), atol=1e-5, rtol=1e-5)
        ids = torch.randint(6, 200, (2, 9))
        torch.testing.assert_close(network(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    values = {"steps": 2, "batch_size": 2, "val_fraction": 0.0, "warmup_steps": 0, "precision": "float32"}
    demos = dataset("demos", robot, episodes=1, length=4)
    run = train(TrainConfig(data=(demos,), out=tmp_path / "run", model=model, lora=LoraConfig(rank=4), **values))
    policy = Policy.from_pretrained(str(run), device="cpu")
    batch = policy.processor.observe(observations(3), ["reach", "pick up the red cube", "open"])
    assert torch.equal(Engine(policy.network).stepwise(batch).ids, reference(policy.network, batch))
