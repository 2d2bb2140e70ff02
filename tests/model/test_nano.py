"""The built-in backbone: small, offline, and decoded exactly."""

import os

import gymnasium as gym
import pytest
import torch

from tests.decoders import reference
from vla.config import ModelConfig
from vla.decoding.engine import Engine
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.model.sources.checkpoint import NANO
from vla.policy import Policy

TASKS = ("Reach", "Push", "PickUp", "PickPlace", "Stack", "PressButton", "OpenDrawer", "CloseDrawer")
SCENES = int(os.environ.get("VLA_TEST_SCENES", "24"))  # 100 take two minutes


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> tuple[list[dict], list[str]]:
    """Observations of real episodes and their instructions: five of each of `SCENES` scenes, in order."""
    observations, instructions = [], []
    for number, task in enumerate(TASKS):
        env = gym.make(f"envs:vla/{task}-v0")
        for seed in range(number, SCENES, len(TASKS)):
            observation, info = env.reset(seed=500_000 + 100 * number + seed)
            expert = env.unwrapped.make_expert(noise=0.5, seed=seed)
            for _ in range(5):
                observations.append(observation)
                instructions.append(info["instruction"])
                observation, _, _, _, info = env.step(expert.act())
        env.close()
    return observations, instructions


def test_the_engine_equals_generate_on_real_observations(policy, scenes):
    """In batches of sixteen and one by one; drafts are from the previous chunk, and empty at the start of a scene."""
    observations, instructions = scenes
    sixteen, single = Engine(policy.network), Engine(policy.network)
    previous = policy.draft_ids([None])[0]
    for start in range(0, len(observations), 16):
        chosen = slice(start, start + 16)
        batch = policy.processor.observe(observations[chosen], instructions[chosen])
        expected = reference(policy.network, batch)
        drafts = torch.cat([previous[None], expected[:-1]])
        assert torch.equal(sixteen.stepwise(batch).ids, expected)
        assert torch.equal(sixteen.parallel(batch, drafts).ids, expected)
        for row, (observation, words) in enumerate(zip(observations[chosen], instructions[chosen], strict=True)):
            alone = policy.processor.observe([observation], [words])
            assert torch.equal(single.parallel(alone, drafts[row : row + 1]).ids[0], expected[row])
            if row % 4 == 0:
                assert torch.equal(single.stepwise(alone).ids[0], expected[row])
        previous = expected[-1]


def test_generate_does_not_depend_on_the_batch_size(policy, scenes):
    observations, instructions = (part[::6] for part in scenes)
    together = reference(policy.network, policy.processor.observe(observations, instructions))
    for row, (observation, words) in enumerate(zip(observations, instructions, strict=True)):
        alone = policy.processor.observe([observation], [words])
        assert torch.equal(reference(policy.network, alone)[0], together[row])


def test_instructions_change_the_actions(policy, scenes):
    observations, _ = scenes
    red = policy.predict(observations[:20], ["reach the red cube"] * 20).chunks
    blue = policy.predict(observations[:20], ["reach the blue cube"] * 20).chunks
    assert (red != blue).any()


def test_size_and_model_card():
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 16 * 2**20
    card = (NANO / "README.md").read_text()
    assert all(word in card for word in ("data", "steps", "hardware", "success"))


def test_untrained_architectures_accept_any_image_size_and_no_other_tower(facts):
    sizes = {}
    for name, image_size in (("nano-init", None), ("nano-init", 72), ("small-init", None)):
        network, processor = build_policy(ModelConfig(backbone=name, image_size=image_size, bins=31), facts)
        side, tower = network.config.image_size, network.vision_towers[0]
        image = torch.zeros(1, 3, side, side)
        tokens = tower(image, torch.zeros(1, tower.config.condition_size)).last_hidden_state
        assert tokens.shape[1:] == ((side // 24) ** 2, network.config.text_config.hidden_size)
        assert processor.config.image_size == side
        sizes[name, image_size] = side, sum(parameter.numel() for parameter in network.parameters())
    assert [side for side, _ in sizes.values()] == [96, 72, 144]
    assert sizes["nano-init", None][1] < 6e6 < 30e6 < sizes["small-init", None][1] < 100e6
    with pytest.raises(ConfigError, match="already has its vision tower"):
        build_policy(ModelConfig(backbone="small-init", vision=("google/siglip-base-patch16-224",)), facts)
    with pytest.raises(ConfigError, match="image_size must be at least 24"):
        build_policy(ModelConfig(backbone="nano-init", image_size=20), facts)
