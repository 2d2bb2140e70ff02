"""The state-only model: which actions the state explains."""

import numpy as np
import pytest

from vla.data.state_only import state_only


def _demonstrations(random_starts: bool, seed: int = 0) -> tuple[np.ndarray, ...]:
    """60 straight motions to random goals: actions are the direction, states the position."""
    rng = np.random.default_rng(seed)
    states, actions, episodes = [], [], []
    for episode in range(60):
        goal, hand = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2) * random_starts
        for step in range(10):
            states.append(hand + (goal - hand) * step / 10)
            actions.append((goal - hand) / np.linalg.norm(goal - hand))
            episodes.append(episode)
    return np.array(states), np.array(actions), np.zeros(600, int), np.array(episodes)


def test_equal_starts_reveal_the_goal_and_random_ones_do_not():
    same, random = state_only(*_demonstrations(False)), state_only(*_demonstrations(True))
    assert same.explained > 0.6 > 0.4 > random.explained
    first = np.arange(0, 600, 10)  # at the start, the goal is unknown
    assert same.errors[first].mean() > 3 * same.errors[first + 5].mean()


def test_the_state_explains_all_of_a_function_of_it_and_nothing_of_noise():
    rng = np.random.default_rng(0)
    states, instructions, episodes = rng.normal(size=(400, 3)), np.arange(400) % 2, np.arange(400) // 10
    signs = np.where(instructions, 1, -1)[:, None]
    assert state_only(states, states[:, :2] * signs, instructions, episodes).explained > 0.9
    assert state_only(states, rng.normal(size=(400, 2)), instructions, episodes).explained < 0.1
    assert state_only(states, np.ones((400, 2)), instructions, episodes).explained == pytest.approx(1)


def test_one_episode():
    states, actions, instructions, episodes = (part[:10] for part in _demonstrations(False))
    result = state_only(states, actions, instructions, episodes)
    assert result.errors.shape == (10,) and np.isfinite(result.errors).all() and np.isfinite(result.explained)


def test_many_instructions():
    rng = np.random.default_rng(0)
    states, episodes = rng.normal(size=(20_000, 2)), np.arange(20_000) // 2
    result = state_only(states, states * 2, episodes, episodes)  # one instruction per episode
    assert result.explained > 0.95
