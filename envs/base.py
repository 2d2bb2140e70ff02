"""Base class of the tabletop environments.

Owns the observation, the action check, seeding, the instruction of an episode and the public interface (`robot`,
`make_expert`, `get_state`). A task is a subclass of `TabletopEnv` that defines the scene, the success condition and the
expert's next action.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np

from envs import randomize as randomization
from envs.errors import check_action, check_choice, check_range
from envs.expert import Expert
from envs.instructions import PHRASINGS, Thing, sample
from envs.objects import PAIRS
from envs.render import Camera
from envs.world import World

CAMERAS = ("front", "wrist")
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
CONTROL_HZ = 20.0
VIDEO_SIZE = 384

Scene = dict[str, Any]  # plain values that `layout` samples; they are sufficient to rebuild the scene


class TabletopEnv(gym.Env, abc.ABC):
    """A robot arm, a table, a few coloured objects, and an instruction that names the target.

    Args:
        cameras: cameras to render, of ("front", "wrist"); an empty tuple omits "pixels" and skips rendering.
        image_size: height and width of the observed images in pixels.
        objects: number of target candidates, 2 to 4 (drawer tasks always have two drawers).
        pairs: split of the colour-shape pairs: "train", "heldout" or "all".
        phrasing: split of the instructions: "train", "heldout" or "canonical".
        randomize: vary light, table colour, colour shades and camera poses between episodes.
        render_mode: None or "rgb_array" (a larger image of the front camera, for videos).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_HZ)}  # noqa: RUF012 (gym.Env declares it)
    #: Whether observations contain images. While it is False, nothing is rendered.
    observe_images = True
    #: Key into `instructions.GRAMMARS`.
    task: ClassVar[str]
    #: Corners of the box in which the hand starts, in metres.
    hand_start: ClassVar[tuple[tuple[float, float, float], tuple[float, float, float]]] = (
        (0.34, -0.08, 0.17),
        (0.44, 0.08, 0.23),
    )

    def __init__(
        self,
        cameras: Sequence[str] = CAMERAS,
        image_size: int = 96,
        objects: int = 3,
        pairs: str = "train",
        phrasing: str = "train",
        randomize: bool = False,
        render_mode: str | None = None,
    ) -> None:
        cameras = (cameras,) if isinstance(cameras, str) else tuple(cameras)
        for camera in cameras:
            check_choice("cameras", camera, CAMERAS)
        check_range("image_size", image_size, 16, 1024)
        check_range("objects", objects, 2, 4)
        check_choice("pairs", pairs, PAIRS)
        check_choice("phrasing", phrasing, PHRASINGS)
        check_choice("randomize", randomize, (False, True))
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.cameras, self.image_size, self.choices = cameras, int(image_size), int(objects)
        self.pairs, self.phrasing, self.randomize, self.render_mode = pairs, phrasing, bool(randomize), render_mode
        self.world = World(self.n_objects, self.furnish)
        self.scene: Scene = {}
        self.task_description = ""
        self._neutral = randomization.remember(self.world.model)
        self._camera: Camera | None = None
        self._video: Camera | None = None
        shape = (self.image_size, self.image_size, 3)
        pi = np.pi
        spaces: dict[str, gym.Space] = {
            "agent_pos": gym.spaces.Box(
                np.array([-1, -1, -0.5, -pi, -pi, -pi, 0], dtype=np.float32),
                np.array([1, 1, 1.5, pi, pi, pi, 1], dtype=np.float32),
            )
        }
        if cameras:
            spaces["pixels"] = gym.spaces.Dict({name: gym.spaces.Box(0, 255, shape, np.uint8) for name in cameras})
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)

    # Defined by a task -------------------------------------------------------------------------------------------

    @property
    def n_objects(self) -> int:
        """Number of free objects on the table."""
        return self.choices

    def furnish(self, spec: mujoco.MjSpec) -> None:
        """Add the task's furniture to the spec; called once, before it is compiled."""
        return None

    @abc.abstractmethod
    def layout(self, rng: np.random.Generator) -> Scene:
        """Sample a scene. It must contain "objects", a list of {color, shape, xy, yaw}."""

    def arrange(self, scene: Scene) -> None:
        """Place the task's furniture according to `scene`. Objects and hand have already been placed."""
        return None

    @abc.abstractmethod
    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        """What the instruction for candidate `target` refers to: the target, and the destination if there is one."""

    @property
    def target_candidates(self) -> int:
        """Number of target candidates in a scene; `options={"target": k}` accepts 0 to one less than this."""
        return self.choices

    @abc.abstractmethod
    def success(self) -> bool:
        """Whether the task is solved in the current state."""

    @abc.abstractmethod
    def reached(self) -> int:
        """Index of the candidate that was acted on (grasped, moved or pressed), or -1."""

    @abc.abstractmethod
    def plan(self) -> np.ndarray:
        """The expert's action [7] for the current state."""

    # Gymnasium ---------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; `options={"target": k}` selects another target in the same scene."""
        super().reset(seed=seed)
        options = options or {}
        for key in options:
            check_choice("option", key, ("target",))
        rng = self.np_random
        scene = self.layout(rng)
        scene["hand"] = [float(v) for v in rng.uniform(*self.hand_start)]
        scene["look"] = randomization.draw(rng) if self.randomize else None
        target, phrase_seed = int(rng.integers(self.target_candidates)), int(rng.integers(2**31))
        if options.get("target") is not None:
            check_range("target", options["target"], 0, self.target_candidates - 1)
            target = int(options["target"])
        scene["target"] = target
        self._build(scene)
        self.task_description = sample(
            self.task, self.named(scene, target), self.phrasing, np.random.default_rng(phrase_seed)
        )
        return self._observe(), self._info(self.success())

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action [7] in [-1, 1] for 50 ms. Success terminates the episode; only `TimeLimit` truncates."""
        command = check_action(action, ACTION_NAMES)
        if not self.scene:
            raise RuntimeError("step() was called before reset(): call reset() first.")
        self.world.move(command)
        success = self.success()
        return self._observe(), float(success), success, False, self._info(success)

    def render(self) -> np.ndarray | None:
        """An image of the front camera for videos, uint8 [384, 384, 3]; None unless render_mode is "rgb_array"."""
        if self.render_mode is None:
            return None
        if self._video is None:
            self._video = Camera(self.world.model, VIDEO_SIZE, nice=True)
        return self._video(self.world.data, "front")

    def close(self) -> None:
        """Free the GL contexts."""
        for camera in (self._camera, self._video):
            if camera is not None:
                camera.close()
        self._camera = self._video = None

    # Additions to Gymnasium --------------------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Index of the candidate that the instruction refers to."""
        return self.scene["target"]

    @property
    def robot(self) -> dict[str, Any]:
        """The properties of a RobotSpec as plain values. None in "hold" repeats the last command of a dimension."""
        return {
            "cameras": list(self.cameras),
            "state_names": list(STATE_NAMES),
            "action_names": list(ACTION_NAMES),
            "action_space": "ee_delta",
            "gripper_index": 6,
            "gripper_open": 1.0,
            "gripper_closed": -1.0,
            "control_hz": CONTROL_HZ,
            "hold": [0, 0, 0, 0, 0, 0, None],
        }

    def make_expert(self, noise: float = 0.0, seed: int | None = None) -> Expert:
        """The scripted expert of this task; see `expert.Expert`."""
        return Expert(self.plan, noise, seed)

    def get_state(self) -> dict[str, Any]:
        """A snapshot of the episode: scene, instruction and physics."""
        return {
            "scene": copy.deepcopy(self.scene),
            "task_description": self.task_description,
            "world": self.world.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a snapshot that `get_state` took in an environment with the same constructor arguments."""
        self._build(copy.deepcopy(state["scene"]))
        self.task_description = state["task_description"]
        self.world.set_state(state["world"])

    def _build(self, scene: Scene) -> None:
        self.scene = scene
        randomization.restore(self.world.model, self._neutral)
        self.world.clear(np.array(scene["hand"]))
        for i, thing in enumerate(scene["objects"]):
            self.world.put_object(i, thing["color"], thing["shape"], thing["xy"], thing["yaw"])
        self.arrange(scene)
        if scene["look"] is not None:
            randomization.apply(self.world.model, scene["look"])
        self.world.settle()

    def _observe(self) -> dict[str, Any]:
        world = self.world
        state = np.array([*world.hand, *world.rpy, world.opening], dtype=np.float32)
        if not self.cameras or not self.observe_images:
            return {"agent_pos": state}
        if self._camera is None:
            self._camera = Camera(world.model, self.image_size)
        return {"pixels": {name: self._camera(world.data, name) for name in self.cameras}, "agent_pos": state}

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "instruction": self.task_description,
            "is_success": bool(success),
            "reached": int(self.reached()),
            "target": self.target,
        }
