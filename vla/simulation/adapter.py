"""Adapter from any Gymnasium environment to the package's conventions.

Owns: creating an environment by id, and the wrapper that converts its observations and infos to an `Observation`, an
instruction, a success flag and a `RobotSpec`, according to an `AdapterConfig`. It does not know particular environments
or policies.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from vla.config import AdapterConfig
from vla.errors import SimulatorError, SpecError, VLAError, unknown
from vla.simulation.environments import resolve
from vla.simulation.random_expert import RandomExpert
from vla.simulation.trees import is_nested, leaves, look_up, shapes
from vla.spec import RobotSpec
from vla.support import plugins
from vla.transforms.images import ImageFormat
from vla.transforms.prompt import text

LONGEST = 20_000  # maximum steps per episode in an environment without a step limit


class Expert(Protocol):
    """A source of demonstrations. An expert with noise also has the attribute `label`: the clean action for the state
    of the last `act`."""

    def act(self) -> np.ndarray: ...


def make(env_id: str, adapter: AdapterConfig | None = None) -> SimulatedRobot:
    """Create the environment `env_id` ("vla/PickUp-v0", "module:Id-v0", ...) and adapt it.

    Args:
        adapter: where to find images, state, ...; None: the defaults for this package's environments.
    Raises:
        SimulatorError: the id is unknown, the environment cannot start, or an entry named in the adapter is missing.
        SpecError: an entry named in the adapter is not a valid image, state or robot description.
    """
    adapter = adapter or AdapterConfig()
    # MuJoCo reads this variable on its first import. Without a display, only EGL and OSMesa work.
    if not os.environ.get("DISPLAY") and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    full_id = resolve(env_id, adapter)
    kwargs = dict(adapter.kwargs)
    if "render()" in adapter.images.values():
        kwargs.setdefault("render_mode", "rgb_array")
    if adapter.max_steps is not None:
        kwargs["max_episode_steps"] = adapter.max_steps
    try:
        env = gym.make(full_id, disable_env_checker=True, **kwargs)
    except gym.error.Error as error:
        raise SimulatorError(f"cannot create environment {env_id!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise SimulatorError(f"cannot create environment {env_id!r} with {kwargs} (adapter.kwargs): {error}") from error
    except Exception as error:
        raise _failure(env_id, error) from error
    try:
        return SimulatedRobot(env, env_id, adapter)
    except Exception as error:
        with contextlib.suppress(Exception):
            env.close()
        raise error if isinstance(error, VLAError) else _failure(env_id, error) from error


class SimulatedRobot(gym.Wrapper):
    """An environment with observations in the package's convention.

    The infos of `reset` and `step` always contain "instruction" (str) and "is_success" (bool).

    An environment may have a writable attribute `observe_images`. While it is False, the environment need not render
    images for its observations. `step(action, images=False)` sets it for one step.

    Attributes:
        env_id: the id of the environment, as passed to `make`.
        robot: the RobotSpec of the environment.
    Raises (all methods):
        SimulatorError, SpecError: a value from the environment is invalid, or its shape or type has changed.
    """

    def __init__(self, env: gym.Env, env_id: str, adapter: AdapterConfig) -> None:
        super().__init__(env)
        self.env_id, self.adapter = env_id, adapter
        self._omits_images = isinstance(getattr(env.unwrapped, "observe_images", None), bool)
        observation, info = self._reset(seed=0)
        self._images = dict(adapter.images) or {name: f"pixels.{name}" for name in _cameras(observation, env_id)}
        for camera in adapter.flip:
            if camera not in self._images:
                raise SimulatorError(unknown("camera in `flip`", camera, self._images))
        self._formats: dict[str, ImageFormat] = {}
        self._state_dim: int | None = None
        adapted = self._adapt(observation)
        self.observation_space = _space_of(adapted)
        self.robot = self._describe(adapted)
        self.robot.check_observation(adapted)
        self._said = self._instruction(info)
        self._solved: bool | None = None  # None: not reported in this episode so far

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        observation, info = self._reset(seed=seed, options=options)
        self._said, self._solved = self._instruction(info), None
        info = {**info, "instruction": self._said, "is_success": self._success(info, over=False)}
        self._solved = None
        return self._adapt(observation), info

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict, float, bool, bool, dict]:
        """Execute one action. With `images=False`, the observation's "pixels" are empty; an environment with
        `observe_images` does not render them."""
        self.robot.check_action(action)
        if self._omits_images:
            self.env.unwrapped.observe_images = images  # type: ignore[attr-defined]
        space = self.env.action_space
        assert isinstance(space, spaces.Box)
        action = within(np.asarray(action, np.float64), space).astype(space.dtype)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not isinstance(info, Mapping):
            raise SimulatorError(f"environment {self.env_id!r}: info must be a dict, got {type(info).__name__}.")
        if "instruction" in info:
            self._said = self._instruction(info)
        terminated = bool(self._number("terminated", terminated))
        truncated = bool(self._number("truncated", truncated))
        solved = self._success(info, over=terminated or truncated)
        info = {**info, "instruction": self._said, "is_success": solved}
        return self._adapt(observation, images), self._number("the reward", reward), terminated, truncated, info

    def check_length(self, steps: int) -> None:
        """Raise SimulatorError if an environment without a step limit reaches `LONGEST` steps."""
        limit = self.env.spec.max_episode_steps if self.env.spec is not None else None
        if steps >= LONGEST and limit is None:
            raise SimulatorError(
                f"environment {self.env_id!r}: the episode has not ended after {LONGEST} steps. Set adapter.max_steps."
            )

    def make_expert(self, noise: float = 0.0, seed: int = 0) -> Expert:
        """Create the adapter's expert, for the current and later episodes. `noise` is only for an environment's own
        expert."""
        source = self.adapter.expert
        if source == "random":
            return RandomExpert(self.env.action_space, seed)
        maker = self._expert_maker(source)
        try:
            expert = maker(noise=noise, seed=seed) if source == "env" else maker(self.env, seed)
        except Exception as error:
            raise SimulatorError(f"expert {source!r} failed to start: {type(error).__name__}: {error}") from error
        if not callable(getattr(expert, "act", None)):
            raise SimulatorError(
                f"expert {source!r} must be an object with `act() -> action`, got {type(expert).__name__}."
            )
        return expert

    def _expert_maker(self, source: str) -> Callable[..., Expert]:
        if source == "env":
            if self.env.has_wrapper_attr("make_expert"):
                return self.env.get_wrapper_attr("make_expert")
            raise SimulatorError(
                f"environment {self.env_id!r} has no expert. Set one in the adapter: "
                '`expert: "module:callable"` (called with the environment and a seed), or `expert: random`.'
            )
        try:
            return plugins.load(source)
        except Exception as error:
            raise SimulatorError(
                f"cannot load expert {source!r} (expected 'env', 'random' or 'module:callable'): {error}"
            ) from None

    def _reset(self, **arguments: Any) -> tuple[Any, Mapping[str, Any]]:
        if self._omits_images:
            self.env.unwrapped.observe_images = True  # type: ignore[attr-defined]
        result = self.env.reset(**arguments)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise SimulatorError(
                f"environment {self.env_id!r}: reset() must return (observation, info), got {type(result).__name__}. "
                "Wrap an environment that uses the old Gym API."
            )
        return result

    def _adapt(self, observation: Any, images: bool = True) -> dict[str, Any]:
        wanted = self._images.items() if images else ()
        pixels = {camera: self._image(observation, camera, path) for camera, path in wanted}
        adapted: dict[str, Any] = {"pixels": pixels}
        if self.adapter.state:
            state = np.concatenate([self._part_of_state(observation, path) for path in self.adapter.state])
            if self._state_dim not in (None, len(state)):
                raise SimulatorError(
                    f"environment {self.env_id!r}: the size of the state {', '.join(self.adapter.state)} has changed "
                    f"from {self._state_dim} to {len(state)}. It must be constant."
                )
            self._state_dim = len(state)
            with np.errstate(over="ignore"):  # overflow gives infinity, which the observation check rejects
                adapted["agent_pos"] = state.astype(np.float32)
        return adapted

    def _image(self, observation: Any, camera: str, path: str) -> np.ndarray:
        value = self._render(camera) if path == "render()" else self._read(observation, path, "images")
        image = self._array(value, "images", path)
        if camera not in self._formats:
            try:
                self._formats[camera] = ImageFormat.of(image, camera, _bounds(self.env, path))
            except SpecError as error:
                raise SpecError(
                    f"environment {self.env_id!r}, adapter.images, {path!r}: {error} The observation contains: "
                    f"{shapes(observation)}."
                ) from None
        image = self._formats[camera].convert(image, camera)
        return np.ascontiguousarray(image[::-1, ::-1]) if camera in self.adapter.flip else image

    def _render(self, camera: str) -> Any:
        image = self.env.render()
        if image is None or isinstance(image, list | str):
            what = "nothing" if image is None else "text" if isinstance(image, str) else "a list of images"
            raise SimulatorError(
                f"environment {self.env_id!r}, camera {camera!r}: render() returned {what} in render_mode "
                f"{self.env.render_mode!r}. Set `kwargs: {{render_mode: rgb_array}}` in the adapter."
            )
        return image

    def _part_of_state(self, observation: Any, path: str) -> np.ndarray:
        values = self._array(self._read(observation, path, "state"), "state", path)
        if values.dtype.kind not in "biuf":
            raise SimulatorError(
                f"environment {self.env_id!r}, adapter.state: {path!r} must be numeric, got dtype {values.dtype}."
            )
        return values.ravel()

    def _read(self, observation: Any, path: str, field: str) -> Any:
        try:
            found = look_up(observation, path)
        except KeyError:
            found = {}
        if is_nested(found):
            fix = "Use `state: []` for a policy without proprioception." if field == "state" else ""
            message = unknown("path into the observation", path, dict(leaves(observation)), fix)
            raise SimulatorError(f"environment {self.env_id!r}, adapter.{field}: {message}")
        return found

    def _array(self, value: Any, field: str, path: str) -> np.ndarray:
        try:
            return np.asarray(value)
        except Exception as error:
            raise SimulatorError(
                f"environment {self.env_id!r}, adapter.{field}: {path!r} is not an array ({error}). Convert it to "
                "numpy in a wrapper."
            ) from error

    def _instruction(self, info: Mapping[str, Any]) -> str:
        if self.adapter.instruction is not None:
            return self.adapter.instruction
        stated = info.get("instruction")
        if stated is None and self.env.has_wrapper_attr("task_description"):
            stated = self.env.get_wrapper_attr("task_description")
        said = text(stated)
        if said is None and stated is not None:
            raise SimulatorError(
                f"environment {self.env_id!r}: its instruction must be a string, got {stated!r}. Set one in the "
                "adapter: `instruction: push the T`."
            )
        if said is None or not said.strip():
            raise SimulatorError(
                f"environment {self.env_id!r} has no instruction. Set one in the adapter: `instruction: push the T`."
            )
        return said

    def _success(self, info: Mapping[str, Any], over: bool) -> bool:
        """The last success reported in this episode; False before the first. Many environments report success only at
        the end; SimulatorError if it is not reported at all."""
        path = self.adapter.success
        try:
            value = look_up(info, path)
        except KeyError:
            value = None
        if value is not None and not is_nested(value):
            flags = self._array(value, "success", path)
            if flags.dtype.kind not in "biuf" or not flags.size or np.isnan(flags).any():
                raise SimulatorError(
                    f"environment {self.env_id!r}, adapter.success: {path!r} must be a boolean or a number (success: "
                    f"at least 0.5), got {value!r}. Choose another entry, or convert it in a wrapper."
                )
            self._solved = bool(np.all(flags >= 0.5))
        if over and self._solved is None:
            message = unknown("path into the info of a step", path, dict(leaves(info)))
            raise SimulatorError(
                f"environment {self.env_id!r}, adapter.success: {message} This entry was missing in all steps of the "
                "episode."
            )
        return bool(self._solved)

    def _number(self, what: str, value: Any) -> float:
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "biuf":
            batch = " Vector environments are not supported; use a single one." if array.size > 1 else ""
            raise SimulatorError(
                f"environment {self.env_id!r}: {what} must be one number or boolean, got {value!r}.{batch}"
            )
        return float(array.item())

    def _describe(self, observation: Mapping[str, Any]) -> RobotSpec:
        space = self.env.action_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise SimulatorError(
                f"environment {self.env_id!r}: the action space must be a one-dimensional Box, got {space}. "
                f"{_remedy(space)}"
            )
        dims = {"state_names": len(observation.get("agent_pos", ())), "action_names": space.shape[0]}
        described: dict[str, Any] = {
            "cameras": list(observation["pixels"]),
            "control_hz": float(self.env.metadata.get("render_fps") or 10.0),
        }
        described |= {key: [f"{key.removesuffix('_names')}_{i}" for i in range(size)] for key, size in dims.items()}
        stated = self.env.get_wrapper_attr("robot") if self.env.has_wrapper_attr("robot") else None
        if isinstance(stated, Mapping):  # otherwise, it is an unrelated attribute
            described |= {key: value for key, value in stated.items() if key != "cameras"}
        if len(described["state_names"]) != dims["state_names"]:  # the adapter selects different entries
            described["state_names"] = [f"state_{i}" for i in range(dims["state_names"])]
        described |= self.adapter.robot
        for key, size in dims.items():
            if len(described[key]) != size:
                raise SimulatorError(
                    f"environment {self.env_id!r}: {key} has {len(described[key])} names "
                    f"({', '.join(map(str, described[key]))}) for {size} entries. Correct it in adapter.robot."
                )
        return RobotSpec.from_dict(described)


def within(action: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Clip `action` to the limits of `space`, and round it if the space has an integer dtype."""
    action = np.clip(action, space.low, space.high)
    return action if space.dtype.kind == "f" else np.rint(action)


def _failure(env_id: str, error: Exception) -> SimulatorError:
    return SimulatorError(
        f"environment {env_id!r} failed to start: {type(error).__name__}: {error}. "
        "`vla doctor` checks whether rendering works on this machine."
    )


def _cameras(observation: Any, env_id: str) -> list[str]:
    pixels = observation.get("pixels") if isinstance(observation, Mapping) else None
    if not isinstance(pixels, Mapping):
        raise SimulatorError(
            f'environment {env_id!r} has no observation["pixels"][camera]. Set `images` in the adapter, '
            f'e.g. `images: {{top: pixels}}` or `images: {{top: "render()"}}`. The observation contains: '
            f"{shapes(observation)}."
        )
    return list(map(str, pixels))


def _remedy(space: gym.Space) -> str:
    """Remedy for an action space that is not a vector."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return "Discrete actions are not supported; wrap the environment so that it takes a Box."
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return "Flatten it with gymnasium.wrappers.TransformAction, spaces.unflatten and spaces.flatten_space."
    if isinstance(space, spaces.Box) and len(space.shape) == 2:
        return "Use a single environment, not a vector one, or flatten it with gymnasium.wrappers.TransformAction."
    return "Wrap the environment so that it takes a one-dimensional Box."


def _bounds(env: gym.Env, path: str) -> tuple[float, float] | None:
    """Lowest and highest value of the observation space at `path`; None if it is not a float Box."""
    try:
        space = look_up(env.observation_space, path)
    except (AttributeError, KeyError):  # no space, no such entry, or an image from `render()`
        return None
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return None
    return float(space.low.min()), float(space.high.max())


def _space_of(value: Any) -> spaces.Space:
    if isinstance(value, Mapping):
        return spaces.Dict({key: _space_of(child) for key, child in value.items()})
    if value.dtype == np.uint8:
        return spaces.Box(0, 255, value.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, value.shape, value.dtype)
