"""A robot with OpenVLA's interface: one camera, no state, six deltas and a gripper. Registers "toy/Arm-v0"."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


class Arm(gym.Env):
    """Succeeds after two steps, if the last gripper command is not NaN."""

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own convention)

    def __init__(self, gripper_closed: float = 0.0, **_) -> None:
        self.observation_space = gym.spaces.Dict(
            pixels=gym.spaces.Dict(image=gym.spaces.Box(0, 255, (240, 320, 3), np.uint8))
        )
        self.action_space = gym.spaces.Box(-2, 2, (7,), np.float32)
        self.robot = {
            "cameras": ["image"],
            "state_names": [],
            "action_names": list(NAMES),
            "action_space": "ee_delta",
            "gripper_index": 6,
            "gripper_open": 1.0,
            "gripper_closed": gripper_closed,
            "control_hz": 5.0,
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.moved = 0, np.zeros(7)
        return self._see(), self._say()

    def step(self, action):
        self.steps, self.moved = self.steps + 1, self.moved + action
        return self._see(), float(self.moved.sum()), False, False, self._say()

    def _see(self):
        return {"pixels": {"image": np.random.default_rng(self.steps).integers(0, 256, (240, 320, 3), np.uint8)}}

    def _say(self):
        return {"is_success": self.steps >= 2, "instruction": "pick up the cup"}


if "toy/Arm-v0" not in gym.registry:
    gym.register("toy/Arm-v0", entry_point=Arm, max_episode_steps=3)
