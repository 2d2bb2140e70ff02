"""Small datasets for tests. Each image encodes the number of its frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.pointworld import draw
from vla.data.reader import Demonstrations
from vla.data.writer import DemonstrationWriter
from vla.spec import RobotSpec

ROBOT = RobotSpec(
    ("front",), ("x", "y"), ("dx", "dy", "gripper"), action_space="ee_delta", gripper_index=2, control_hz=10.0
)


def path_of(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random path of a point in [0, 1], as states [T, 2] and actions [T, 3]."""
    rng = np.random.default_rng(seed)
    actions = np.column_stack([rng.uniform(-1, 1, (length, 2)), np.where(np.arange(length) < length // 2, 1, -1)])
    states = np.clip(0.5 + 0.05 * np.cumsum(actions[:, :2], axis=0), 0, 1)
    return states.astype(np.float32), actions.astype(np.float32)


def record(root: Path, lengths: Sequence[int] = (12, 9, 15), robot: RobotSpec = ROBOT) -> Demonstrations:
    """Write a dataset with these episode lengths, and read it."""
    with DemonstrationWriter(root, robot) as writer:
        for seed, length in enumerate(lengths):
            states, actions = path_of(length, seed)
            seen = [{"pixels": {"front": draw(state)}, "agent_pos": state} for state in states]
            writer.add_episode(
                seen, actions, f"task {seed % 2}", env_id="test/Point-v0", seed=seed, success=True, noise=0.1 * seed
            )
    return Demonstrations(root)
