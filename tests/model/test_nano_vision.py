"""The built-in vision tower is conditioned on the words of the instruction, and on nothing else in the prompt."""

import pytest
import torch

from vla.errors import ConfigError
from vla.model.nano_vision import Keypoints, NanoVisionConfig, NanoVisionModel
from vla.model.vision import tokens_per_image


def test_the_instruction_changes_the_features(nano, observations):
    network, processor = nano
    seen = observations(1) * 2
    red, blue = (processor.observe(seen, [f"reach the {color} cube"] * 2) for color in ("red", "blue"))
    pixels = red["pixel_values"]
    features = [
        network.encode_images(pixels, network._mean_word(ids, network.get_input_embeddings()(ids)))
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
    expected = network._mean_word(alone, embed(alone))
    assert padded.shape[1] > alone.shape[1]
    torch.testing.assert_close(network._mean_word(padded, embed(padded))[:1], expected)
    longer = torch.cat([alone, suffix], dim=1)
    torch.testing.assert_close(network._mean_word(longer, embed(longer)), expected)
    bos_and_words = [
        processor.tokenizer.bos_token_id,
        *processor.tokenizer(words, add_special_tokens=False)["input_ids"],
    ]
    torch.testing.assert_close(embed(torch.tensor(bos_and_words)).mean(0, keepdim=True), expected)


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
