"""Checks of `vla inspect`: each kind of problem is found, and a clean dataset has none."""

import dataclasses

import numpy as np
import pytest

from tests.data.recordings import record
from vla.data.checks import check, check_images, moves


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return record(tmp_path_factory.mktemp("checks") / "set", [34, 42, 35, 33, 36, 34])


@pytest.fixture
def demos(clean):
    """The same dataset with writable arrays."""
    copied = object.__new__(type(clean))
    copied.__dict__.update(clean.__dict__)
    copied.actions, copied.states = clean.actions.copy(), clean.states.copy()
    copied.episodes = list(clean.episodes)
    return copied


def found(demos):
    return {finding.what: finding.episodes for finding in check(demos)}


def test_a_clean_dataset(clean):
    assert found(clean) == {}


def test_entries(demos):
    demos.actions[:, 0] = 0.5
    demos.actions[:, 1] *= 0.01
    demos.actions[7, 1] = 50
    kinds = found(demos)
    assert {"constant entries", "far outliers"} <= set(kinds)
    demos.actions[:] = 1
    assert "constant actions" in found(demos)


def test_gripper(demos):
    original = demos.actions.copy()
    demos.actions[demos.episodes[3].rows, 2] = 1
    assert found(demos) == {"gripper never moves": (3,)}
    demos.actions[:] = original
    demos.actions[:, 2] *= -1
    assert "gripper polarity" in found(demos)
    demos.actions[:, 2] = 5 * original[:, 2]
    assert "gripper out of range" in found(demos)
    demos.actions[:, 2] = (original[:, 2] + 1) / 2
    assert "gripper range" in found(demos)


def test_pauses_and_jumps(demos):
    still = demos.episodes[2]
    demos.states[still.rows] = demos.states[still.start]
    demos.actions[:, :2] = 0.02 * np.sin(np.arange(demos.num_frames))[:, None]
    demos.actions[demos.episodes[4].start + 6, 0] = 1
    kinds = found(demos)
    assert kinds["pauses"] == (2,) and kinds["jumps"] == (4,)


def test_without_states_motion_is_inferred_from_actions(demos):
    demos.states = None
    demos.actions[demos.episodes[1].rows] = 0
    assert found(demos)["pauses"] == (1,)
    demos.actions[demos.episodes[1].rows, 0] = 0.5  # a constant velocity is not a pause
    assert moves(demos)[demos.episodes[1].rows].all()


def test_episodes(demos):
    demos.episodes[1] = dataclasses.replace(demos.episodes[1], success=False, instructions=("",))
    demos.actions[demos.episodes[5].rows] = demos.actions[demos.episodes[0].rows]
    kinds = found(demos)
    assert kinds == {"failures": (1,), "no instruction": (1,), "repeated episodes": (5,)}


def test_lengths(tmp_path):
    kinds = found(record(tmp_path / "set", [20, 20, 3, 90, 20]))
    assert kinds["short episodes"] == (2,) and kinds["long episodes"] == (3,)


def test_images(clean):
    episode = clean.episodes[0]
    images = list(clean.frames(0, "front"))
    moved = np.ones(len(images), bool)
    assert check_images("front", episode, images, moved) == []
    frozen = [images[i // 3] for i in range(len(images))]
    assert [finding.what for finding in check_images("front", episode, frozen, moved)] == ["repeated images"]
    assert check_images("front", episode, frozen, ~moved) == []
    black = [np.zeros_like(image) for image in images]
    assert "empty images" in [finding.what for finding in check_images("front", episode, black, ~moved)]


def test_demonstrations_whose_state_predicts_the_actions(tmp_path):
    demos = record(tmp_path / "set", [30] * 24)
    assert "state gives the answer away" not in found(demos)
    demos.actions[:, :2] = demos.states[:, :2] - demos.states[:, :2].mean(0)
    demos.actions[:, 2:] = 0
    assert "state gives the answer away" in found(demos)
