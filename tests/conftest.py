"""Fixtures shared by all tests: no network, no GPU, deterministic, small real networks instead of mocks.

torch is imported inside the fixtures, because the process that distributes the tests does not need it.
"""

from __future__ import annotations

import copy
import gc
import os
import signal
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from vla.config import ModelConfig
from vla.spec import RobotSpec
from vla.transforms.normalize import compute_statistics

if TYPE_CHECKING:
    from vla.model.build import DataFacts

# Background jobs of a shell ignore SIGINT, and so would the processes that the tests start and stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The time per example depends only on the machine.
slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
settings.load_profile("any machine")

pytest_plugins = ["tests.bench", "tests.forked", "tests.served", "tests.virtual_time"]


def pytest_collection_finish() -> None:
    """Prepare the process that runs the tests. Imported modules are excluded from garbage collection: three collections
    per training run would take a second."""
    import torch

    import tests.tiny  # noqa: F401  (adds "tiny-init")

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def robot() -> RobotSpec:
    """Two cameras, seven state entries, seven action entries; the three rotations are constant in the data."""
    return RobotSpec(
        cameras=("front", "wrist"),
        state_names=tuple(f"s{i}" for i in range(7)),
        action_names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
        action_space="ee_delta",
        gripper_index=6,
        control_hz=20.0,
        hold=(0, 0, 0, 0, 0, 0, None),
    )


@pytest.fixture(scope="session")
def facts(robot: RobotSpec) -> DataFacts:
    """Statistics of random actions with three constant entries."""
    from vla.model.build import DataFacts

    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2000, robot.action_dim)).astype(np.float32)
    actions[:, 3:6] = 0
    states = rng.normal(size=(2000, robot.state_dim))
    statistics = {"demo": {"action": compute_statistics(actions), "state": compute_statistics(states)}}
    return DataFacts(robot, statistics, {"demo": actions})


@pytest.fixture(scope="session")
def _nano(facts: DataFacts):
    return _untrained("nano-init", facts)


@pytest.fixture
def nano(_nano):
    """The built-in architecture with random weights, and its processor. Each test gets a copy, because copying is much
    faster than initialising."""
    return _copy(_nano)


@pytest.fixture(scope="session")
def _tiny(facts: DataFacts):
    return _untrained("tiny-init", facts)


@pytest.fixture
def tiny(_tiny):
    """A network with a twentieth of the parameters, and its processor, for tests that do not depend on the size."""
    return _copy(_tiny)


def _untrained(backbone: str, facts: DataFacts):
    import torch

    from vla.model.build import build_policy

    torch.manual_seed(0)
    network, processor = build_policy(ModelConfig(backbone=backbone, horizon=4, n_action_steps=4, bins=31), facts)
    return network.eval(), processor


def _copy(policy):
    import torch

    torch.manual_seed(0)  # for random numbers in the test
    return copy.deepcopy(policy)


@pytest.fixture(scope="session")
def observations(robot: RobotSpec):
    """`observations(n)`: n random observations of `robot`."""

    def make(n: int, seed: int = 0) -> list[dict]:
        rng = np.random.default_rng(seed)
        return [
            {
                "pixels": {name: rng.integers(0, 256, (96, 96, 3), np.uint8) for name in robot.cameras},
                "agent_pos": rng.normal(size=robot.state_dim).astype(np.float32),
            }
            for _ in range(n)
        ]

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    """`dataset(name, robot, ...)`: record a small dataset whose actions point from the hand to a bright square."""
    from vla.data.writer import DemonstrationWriter

    def make(name: str, robot: RobotSpec, episodes: int = 5, length: int = 9, size: int = 48):
        root = tmp_path_factory.mktemp("data") / name
        rng = np.random.default_rng(0)
        with DemonstrationWriter(root, robot) as writer:
            for number in range(episodes):
                target = rng.uniform(-1, 1, robot.action_dim)
                with writer.episode() as episode:
                    for step in range(length):
                        image = np.full((size, size, 3), 40, np.uint8)
                        row, column = ((target[:2] + 1) / 2 * (size - 8)).astype(int)
                        image[row : row + 8, column : column + 8, number % 3] = 250
                        observation = {"pixels": {camera: image for camera in robot.cameras}}
                        if robot.state_dim:
                            observation["agent_pos"] = np.full(robot.state_dim, step / length, np.float32)
                        episode.record(observation, (target * (1 - step / length)).astype(np.float32))
                    episode.finish(instruction=f"go to square {number % 3}", success=True)
        return root

    return make
