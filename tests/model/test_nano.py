"""The embedded backbone: small, offline, and decoded exactly."""

import gymnasium as gym
import pytest
import torch

from tests.decoders import greedy, reference
from vla.model.backbones import NANO
from vla.policy import Policy

TASKS = ("Reach", "Push", "PickUp", "PickPlace", "Stack", "PressButton", "OpenDrawer", "CloseDrawer")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> tuple[list[dict], list[str]]:
    """200 observations of real episodes, with their instructions."""
    observations, instructions = [], []
    for number, task in enumerate(TASKS):
        env = gym.make(f"envs:vla/{task}-v0")
        for seed in range(5):
            observation, info = env.reset(seed=500_000 + 10 * number + seed)
            expert = env.unwrapped.make_expert(noise=0.5, seed=seed)
            for _ in range(5):
                observations.append(observation)
                instructions.append(info["instruction"])
                observation, _, _, _, info = env.step(expert.act())
        env.close()
    return observations, instructions


def test_decoding_equals_generate_on_200_observations(policy, scenes):
    observations, instructions = scenes
    assert len(observations) == 200
    for start in range(0, 200, 50):
        chosen = slice(start, start + 50)
        batch = policy.processor.observe(observations[chosen], instructions[chosen])
        assert torch.equal(greedy(policy.network, batch), reference(policy.network, batch))


def test_instructions_change_what_is_done(policy, scenes):
    observations, _ = scenes
    red = policy.predict_chunks(observations[:20], ["reach the red cube"] * 20)
    blue = policy.predict_chunks(observations[:20], ["reach the blue cube"] * 20)
    assert (red != blue).any()


def test_it_is_small_and_says_what_it_is():
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 16 * 2**20
    card = (NANO / "README.md").read_text()
    assert all(word in card for word in ("data", "steps", "hardware", "success"))
