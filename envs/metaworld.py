"""Meta-World's 50 tasks with the interface of the tabletop suite, e.g. `vla-metaworld/drawer-open-v3`.

Owns the evaluation protocol on Meta-World: camera, state, seeding, episode end and expert. The `metaworld` package
provides physics, rewards and scripted policies. It is imported when the first environment is created.

Observations contain only quantities that a robot can measure with its camera and joints. The remaining dimensions of
Meta-World's observation vector are the positions of objects and goal; only the expert uses them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from envs.errors import check_action, check_choice, check_range
from envs.expert import Expert
from envs.instructions import PHRASINGS
from envs.metaworld_instructions import TASKS, sample
from envs.render import Camera

METAWORLD_IDS: tuple[str, ...] = tuple(f"vla-metaworld/{task}" for task in TASKS)
CAMERA = "corner2"
CAMERA_POS = (0.75, 0.075, 0.7)  # metres; the usual camera position for training on Meta-World
STATE_NAMES = ("x", "y", "z", "gripper")  # hand position in metres; opening, 1 open to 0 closed
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
STEP_HZ = 80  # a Meta-World step has 5 substeps of 2.5 ms
MAX_STEPS = 500  # Meta-World steps per episode
VIDEO_SIZE = 384
#: The version that the pinned Meta-World release requires. Other versions fail or change the physics.
MUJOCO = "3.3.0"
_INSTALL = "scripts/setup metaworld in the checkout of this package (Python 3.11 to 3.13)"
_OURS = [0, 1, 2, 6]  # indices of a Meta-World action's dimensions in an action of the tabletop suite


def register_all() -> None:
    """Register every task, without importing Meta-World; repeated calls have no effect."""
    for env_id, task in zip(METAWORLD_IDS, TASKS, strict=True):
        if env_id not in gym.registry:
            gym.register(
                env_id, entry_point="envs.metaworld:MetaWorldEnv", max_episode_steps=MAX_STEPS, kwargs={"task": task}
            )


class MetaWorldEnv(gym.Env):
    """A Meta-World task with an instruction.

    Actions [4] in [-1, 1]: the first three move the commanded hand position by up to 1 cm per step and axis; the last
    closes the gripper at +1 and opens it at -1 (the opposite of the tabletop suite).

    Args:
        task: Meta-World's name of the task, e.g. "drawer-open-v3".
        cameras: ("corner2",), or an empty tuple, which omits "pixels" and skips rendering.
        image_size: height and width of the observed images in pixels.
        phrasing: split of the instructions: "train", "heldout" or "canonical".
        action_repeat: number of Meta-World steps per action; with 4, the control rate is 20 Hz and an episode has at
            most 125 actions.
        start_steps: before an episode begins, the hand moves in a random direction for up to this number of actions. If
            all demonstrations start at the same place, the goal can be inferred from the hand's position.
        convention: "suite", or "lerobot" for the observations of LeRobot's environment with `obs_type`
            "pixels_agent_pos". With "lerobot", "pixels" is a single image, rendered by Meta-World with shadows, and
            the state is float64. This does not change `image_size` and `action_repeat`; LeRobot's policies are trained
            with 480 px and one step per action.
        render_mode: None or "rgb_array" (a larger image, for videos).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": STEP_HZ}  # noqa: RUF012 (gym.Env declares it)
    #: Whether observations contain images. While it is False, nothing is rendered.
    observe_images = True

    def __init__(
        self,
        task: str,
        cameras: Sequence[str] = (CAMERA,),
        image_size: int = 96,
        phrasing: str = "train",
        action_repeat: int = 1,
        start_steps: int = 0,
        convention: str = "suite",
        render_mode: str | None = None,
    ) -> None:
        check_choice("task", task, TASKS)
        cameras = (cameras,) if isinstance(cameras, str) else tuple(cameras)
        for camera in cameras:
            check_choice("cameras", camera, (CAMERA,))
        check_range("image_size", image_size, 16, 1024)
        check_choice("phrasing", phrasing, PHRASINGS)
        check_range("action_repeat", action_repeat, 1, MAX_STEPS)
        check_range("start_steps", start_steps, 0, MAX_STEPS // 4)
        check_choice("convention", convention, ("suite", "lerobot"))
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.task, self.cameras, self.image_size, self.phrasing = task, cameras, int(image_size), phrasing
        self.action_repeat, self.start_steps = int(action_repeat), int(start_steps)
        self.convention, self.render_mode = convention, render_mode
        self.metadata = {**self.metadata, "render_fps": round(STEP_HZ / self.action_repeat)}
        self.task_description = ""
        self._inner, self._make_policy = _load(task, self.image_size)
        self._raw = np.zeros(0)  # Meta-World's full observation [39]; empty before the first reset
        self._camera: Camera | None = None
        self._video: Camera | None = None
        self._limits = np.array([[-0.525, 0.348, -0.0525, 0], [0.525, 1.025, 0.7, 1]], np.float32)  # of the state
        spaces: dict[str, gym.Space] = {"agent_pos": gym.spaces.Box(*self._limits)}
        if cameras:
            image = gym.spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
            spaces["pixels"] = gym.spaces.Dict(dict.fromkeys(cameras, image))
        if convention == "lerobot":
            spaces["agent_pos"] = gym.spaces.Box(-1000.0, 1000.0, (len(STATE_NAMES),), np.float64)
            spaces |= {"pixels": image} if cameras else {}
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode. The seed determines the positions and the phrasing of the instruction."""
        super().reset(seed=seed)
        if seed is not None:
            self._inner.seed(seed)
        self._inner.reset()
        # Meta-World moves furniture after updating the kinematics; without this call, the first image would show the
        # previous episode.
        mujoco.mj_forward(self._inner.model, self._inner.data)
        self._raw = self._inner._get_obs()
        self._disturb_hand()
        self.task_description = sample(self.task, self.phrasing, self.np_random)
        return self._observe(), self._info(False)

    def _disturb_hand(self) -> None:
        if self.start_steps:
            direction = self.np_random.normal(size=3)
            move = np.append(np.clip(direction / np.abs(direction).max(), -1, 1), -1.0).astype(np.float32)
            for _ in range(self.action_repeat * int(self.np_random.integers(self.start_steps + 1))):
                self._raw, *_ = self._inner.step(move)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Repeat one action [4] in [-1, 1] for `action_repeat` steps of 12.5 ms, or until success.

        Success terminates the episode. The reward is Meta-World's own (0 to 10) after the last of these steps.
        `TimeLimit` truncates the episode after 500 actions. Meta-World truncates it after 500 of its own steps, which
        is earlier if actions are repeated.
        """
        command = check_action(action, ACTION_NAMES).astype(np.float32)
        if not self._raw.size:
            raise RuntimeError("step() was called before reset(): call reset() first.")
        for _ in range(self.action_repeat):
            self._raw, reward, _, truncated, info = self._inner.step(command)
            success = info["success"] >= 0.5
            if success or truncated:
                break
        return self._observe(), float(reward), success, truncated and not success, self._info(success)

    def render(self) -> np.ndarray | None:
        """An image for videos, uint8 [384, 384, 3]; None unless render_mode is "rgb_array"."""
        if self.render_mode is None:
            return None
        if self._video is None:
            self._video = Camera(self._inner.model, VIDEO_SIZE, nice=True, sky=True)
        return _upright(self._video(self._inner.data, CAMERA))

    def close(self) -> None:
        """Free the GL contexts."""
        for camera in (self._camera, self._video):
            if camera is not None:
                camera.close()
        self._camera = self._video = None
        if self.convention == "lerobot":
            self._inner.close()

    @property
    def robot(self) -> dict[str, Any]:
        """The properties of a RobotSpec as plain values. None in "hold" repeats the last command of a dimension."""
        return {
            "cameras": list(self.cameras),
            "state_names": list(STATE_NAMES),
            "action_names": list(ACTION_NAMES),
            "action_space": "ee_delta",
            "gripper_index": 3,
            "gripper_open": -1.0,
            "gripper_closed": 1.0,
            "control_hz": STEP_HZ / self.action_repeat,
            "hold": [0, 0, 0, None],
        }

    def make_expert(self, noise: float = 0.0, seed: int | None = None) -> MetaWorldExpert:
        """Meta-World's scripted policy for this task. Call its `act` once per `step`."""
        policy = self._make_policy()
        return MetaWorldExpert(lambda: np.clip(policy.get_action(self._raw), -1.0, 1.0), noise, seed)

    def _observe(self) -> dict[str, Any]:
        images = bool(self.cameras) and self.observe_images
        if self.convention == "lerobot":
            theirs = {"agent_pos": self._raw[: len(STATE_NAMES)].copy()}
            return theirs | {"pixels": _upright(self._inner.render())} if images else theirs
        state = np.clip(self._raw[: len(STATE_NAMES)].astype(np.float32), *self._limits)
        if not images:
            return {"agent_pos": state}
        if self._camera is None:
            self._camera = Camera(self._inner.model, self.image_size, sky=True)
        return {
            "pixels": {name: _upright(self._camera(self._inner.data, name)) for name in self.cameras},
            "agent_pos": state,
        }

    def _info(self, success: bool) -> dict[str, Any]:
        return {"instruction": self.task_description, "is_success": bool(success)}


class MetaWorldExpert:
    """A scripted policy with the interface and noise of the experts of the tabletop suite.

    `act()` returns the action [4] to execute; `label` is the clean action for the same state. Both are float32 in
    [-1, 1].
    """

    def __init__(self, plan: Callable[[], np.ndarray], noise: float = 0.0, seed: int | None = None) -> None:
        def widened() -> np.ndarray:
            action = np.zeros(7)
            action[_OURS] = plan()
            return action

        self._expert = Expert(widened, noise, seed)

    @property
    def label(self) -> np.ndarray:
        return self._expert.label[_OURS]

    def act(self) -> np.ndarray:
        return self._expert.act()[_OURS]


def _load(task: str, image_size: int) -> tuple[Any, Callable[[], Any]]:
    """Meta-World's environment for `task`, configured for the protocol, and the class of its scripted policy."""
    if mujoco.__version__ != MUJOCO:
        raise gym.error.DependencyNotInstalled(
            f"Meta-World needs mujoco=={MUJOCO}, but {mujoco.__version__} is installed: run {_INSTALL}."
        )
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(f"Meta-World is not installed ({error}): run {_INSTALL}.") from error
    # Most scripted policies warn at every step that their action will be clipped. `make_expert` clips it.
    warnings.filterwarnings("ignore", message="Constant.* may be too high", module="metaworld")
    inner = ALL_V3_ENVIRONMENTS[task](render_mode="rgb_array", camera_name=CAMERA, width=image_size, height=image_size)
    # Show the goal to the expert. Observations are clipped to a cached space that hides it, so also drop this cache.
    inner._partially_observable = False
    inner.__dict__.pop("sawyer_observation_space", None)
    # Sample positions at every reset with the generator that `seed` seeds, instead of using a list of stored tasks.
    inner._freeze_rand_vec, inner.seeded_rand_vec, inner._set_task_called = False, True, True
    inner.model.cam_pos[inner.model.camera(CAMERA).id] = CAMERA_POS
    return inner, ENV_POLICY_MAP[task]


def _upright(image: np.ndarray) -> np.ndarray:
    """Rotate an image by 180 degrees; Meta-World's corner cameras are mounted upside down."""
    return np.ascontiguousarray(image[::-1, ::-1])
