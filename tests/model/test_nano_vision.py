"""The built-in vision tower is conditioned on the words of the instruction, and on nothing else in the prompt."""

import copy

import pytest
import torch

from tests.decoders import reference
from vla.config import ModelConfig
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.model.nano_vision import Keypoints, NanoVisionConfig, NanoVisionModel
from vla.model.processing import VLAProcessor
from vla.model.vision import tokens_per_image
from vla.policy import Policy, checkpoint


def test_the_instruction_changes_the_features(nano, observations):
    network, processor = nano
    seen = observations(1) * 2
    red, blue = (processor.observe(seen, [f"reach the {color} cube"] * 2) for color in ("red", "blue"))
    pixels = red["pixel_values"]
    features = [
        network.encode_images(pixels, network.words_condition(ids, network.get_input_embeddings()(ids)))
        for ids in (red["input_ids"], blue["input_ids"])
    ]
    assert not torch.allclose(features[0], features[1])


def test_padding_images_state_and_actions_are_not_words(nano, observations):
    network, processor = nano
    words = "reach the red cube"
    alone = processor.observe(observations(1), [words])["input_ids"]
    padded = processor.observe(observations(2), [words, "please move the hand over to the red cube now"])["input_ids"]
    suffix = torch.full((1, 4), network.config.action_token_begin)
    embed = network.get_input_embeddings()
    expected = network.words_condition(alone, embed(alone))
    assert padded.shape[1] > alone.shape[1]
    torch.testing.assert_close(network.words_condition(padded, embed(padded))[:1], expected)
    longer = torch.cat([alone, suffix], dim=1)
    torch.testing.assert_close(network.words_condition(longer, embed(longer)), expected)
    bos_and_words = [
        processor.tokenizer.bos_token_id,
        *processor.tokenizer(words, add_special_tokens=False)["input_ids"],
    ]
    torch.testing.assert_close(embed(torch.tensor(bos_and_words)).mean(0, keepdim=True), expected)


def condition_on(network, processor, *instructions):
    ids = processor.tokenizer(list(instructions), return_tensors="pt")["input_ids"]
    return network.words_condition(ids, network.get_input_embeddings()(ids))


@pytest.fixture
def ordered(nano):
    """A tower that sees the order of the words, with random weights for it."""
    network = copy.deepcopy(nano[0])
    network.add_word_order()
    for block in network.vision_towers[0].blocks:
        torch.nn.init.normal_(block.film_order.weight, std=0.1)
    return network


def test_the_order_of_the_words_can_be_added_without_a_change(nano, observations):
    network, processor = copy.deepcopy(nano[0]), nano[1]
    batch = processor.observe(observations(2), ["stack the red cube on the blue cube", "reach"])
    before = network(**batch).logits
    assert not network.sees_word_order
    network.add_word_order()
    assert network.sees_word_order
    torch.testing.assert_close(network(**batch).logits, before, atol=0, rtol=0)
    batch["input_ids"] = batch["input_ids"].clone()
    network(**batch).logits.sum().backward()
    assert all(block.film_order.weight.grad.abs().sum() > 0 for block in network.vision_towers[0].blocks)


def test_the_order_of_the_words_changes_the_features(nano, ordered, observations):
    processor, width = nano[1], ordered.config.hidden_size
    swapped = ("stack the red cube on the blue cube", "stack the blue cube on the red cube")
    conditions = condition_on(ordered, processor, *swapped)
    torch.testing.assert_close(conditions[0, :width], conditions[1, :width])
    vectors = ordered.get_input_embeddings()(torch.tensor(processor.tokenizer(swapped[0])["input_ids"]))
    weighted = (vectors * torch.linspace(-1, 1, len(vectors))[:, None]).mean(0)
    torch.testing.assert_close(conditions[0, width:], weighted)
    pixels = processor.observe(observations(1) * 2, list(swapped))["pixel_values"]
    first, second = ordered.encode_images(pixels, conditions)
    assert not torch.allclose(first, second, atol=1e-4)
    first, second = nano[0].encode_images(pixels, conditions[:, :width])
    torch.testing.assert_close(first, second)
    assert condition_on(ordered, processor, "the").isfinite().all()  # a single token


def test_order_dropout(nano, ordered):
    processor, width = nano[1], ordered.config.hidden_size
    words = ["stack the red cube on the blue cube"] * 400
    complete = condition_on(ordered, processor, *words)
    ordered.order_dropout = 0.25
    torch.testing.assert_close(condition_on(ordered, processor, *words), complete)
    ordered.train()
    condition = condition_on(ordered, processor, *words)
    dropped = (condition[:, width:] == 0).all(1)
    assert 60 < dropped.sum() < 140
    torch.testing.assert_close(condition[~dropped], complete[~dropped])
    torch.testing.assert_close(condition[:, :width], complete[:, :width])


def test_a_policy_with_word_order_is_saved_decoded_and_trained_further(nano, ordered, observations, facts, tmp_path):
    processor = nano[1]
    checkpoint.save(ordered, VLAProcessor(ordered.config, processor.tokenizer), tmp_path / "policy")
    policy = Policy.from_pretrained(str(tmp_path / "policy"), device="cpu")
    words = ["stack the red cube on the blue cube", "stack the blue cube on the red cube"]
    batch = processor.observe(observations(1) * 2, words)
    torch.testing.assert_close(policy.network(**batch).logits, ordered(**batch).logits)
    ids = policy.predict(observations(1) * 2, words).ids
    assert torch.equal(reference(policy.network, batch), torch.from_numpy(ids))
    further, _ = build_policy(ModelConfig(backbone=str(tmp_path / "policy")), facts)
    assert further.sees_word_order
    with pytest.raises(ConfigError, match="word_order, which cannot be removed"):
        build_policy(ModelConfig(backbone=str(tmp_path / "policy"), word_order=False), facts)
    assert build_policy(ModelConfig(backbone="nano-init", word_order=True), facts)[0].sees_word_order


@pytest.mark.parametrize("condition_size", [None, 16])
def test_shapes_with_and_without_a_condition(condition_size):
    tower = NanoVisionModel(NanoVisionConfig(channels=[8, 16], hidden_size=32, condition_size=condition_size))
    condition = torch.randn(2, 16) if condition_size else None
    assert tower(torch.randn(2, 3, 96, 96), condition).last_hidden_state.shape == (2, 16, 32)


def test_keypoints_are_at_the_maxima_of_their_maps():
    head = Keypoints(channels=2, count=2, width=4)
    torch.nn.init.eye_(head.maps.weight.data[..., 0, 0])
    torch.nn.init.zeros_(head.maps.bias)
    torch.nn.init.eye_(head.out.weight)
    torch.nn.init.zeros_(head.out.bias)
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 1, 4] = maps[0, 1, 3, 0] = maps[0, 1, 4, 0] = 50.0  # one cell; halfway between two cells
    down, right = head(maps)[0, 0].view(2, 2)
    torch.testing.assert_close(down, torch.tensor([-0.5, 0.75]))
    torch.testing.assert_close(right, torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(("grid", "tokens"), [(True, 16), (False, 1)])
def test_keypoints_beside_and_instead_of_the_grid(grid, tokens):
    config = NanoVisionConfig(channels=[8, 16], hidden_size=32, keypoints=6, grid=grid)
    assert tokens_per_image([config], 96) == tokens
    tower = NanoVisionModel(config)
    features = tower(torch.randn(2, 3, 96, 96)).last_hidden_state
    assert features.shape == (2, tokens, 32)
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    with pytest.raises(ConfigError, match="needs keypoints"):
        NanoVisionConfig(keypoints=0, grid=False)
