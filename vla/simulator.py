"""Any Gymnasium environment, seen through this package's eyes.

Owns: making an environment by id, and the wrapper that turns its observations, infos and description into an
`Observation`, an instruction, a success flag and a `RobotSpec`, as an `AdapterConfig` says. Every job that runs an
environment (collect, replay, rollout, ...) goes through here. It does not know the environments themselves (they are
found through Gymnasium's registry) nor any policy.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from vla.config import AdapterConfig
from vla.errors import SimulatorError, VLAError, unknown
from vla.spec import RobotSpec


class Expert(Protocol):
    """A source of demonstrations. `label`, where there is one, is the clean action for the state `act` last saw."""

    def act(self) -> np.ndarray: ...


def make(env_id: str, adapter: AdapterConfig | None = None, render: bool = False) -> SimulatedRobot:
    """Make the environment `env_id` ("vla/PickUp-v0", "module:Id-v0", ...) and adapt it.

    Args:
        adapter: where the environment keeps what; None fits this package's environments.
        render: also make `render()` return an RGB picture (for videos).
    Raises:
        SimulatorError: unknown id, an environment that cannot start, or one that lacks what the adapter names.
        SpecError: what the adapter names is there, but is not an image, a state or a robot.
    """
    adapter = adapter or AdapterConfig()
    # The renderer reads this when `mujoco` is first imported; without a display only EGL and OSMesa work.
    if not os.environ.get("DISPLAY") and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    full_id = resolve(env_id, adapter)
    kwargs = dict(adapter.kwargs)
    if render or "render()" in adapter.images.values():
        kwargs.setdefault("render_mode", "rgb_array")
    if adapter.max_steps is not None:
        kwargs["max_episode_steps"] = adapter.max_steps
    try:
        env = gym.make(full_id, disable_env_checker=True, **kwargs)
    except gym.error.Error as error:
        raise SimulatorError(f"cannot make environment {env_id!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise SimulatorError(f"cannot make environment {env_id!r} with {kwargs} (adapter.kwargs): {error}") from error
    except Exception as error:
        raise _failure(env_id, error) from error
    try:
        return SimulatedRobot(env, env_id, adapter)
    except Exception as error:
        with contextlib.suppress(Exception):
            env.close()
        raise error if isinstance(error, VLAError) else _failure(env_id, error) from error


class SimulatedRobot(gym.Wrapper):
    """An environment whose observations follow the package's convention.

    Attributes:
        env_id: the id it was made from.
        robot: its RobotSpec.
    `reset` and `step` return infos that always hold "instruction" (str) and "is_success" (bool).
    """

    def __init__(self, env: gym.Env, env_id: str, adapter: AdapterConfig) -> None:
        super().__init__(env)
        self.env_id, self.adapter = env_id, adapter
        observation, info = env.reset(seed=0)
        self._images = dict(adapter.images) or {name: f"pixels.{name}" for name in _cameras(observation, env_id)}
        for camera in adapter.flip:
            if camera not in self._images:
                raise SimulatorError(unknown("camera in `flip`", camera, self._images))
        adapted = self._adapt(observation)
        self.observation_space = _space_of(adapted)
        self.robot = self._describe(adapted)
        self.robot.check_observation(adapted)
        self._said = self._instruction(info)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._said = self._instruction(info)
        # An environment may leave success out of the info of `reset`; a wrong path shows in the first step's.
        success = self.adapter.success in dict(_leaves(info)) and self._success(info)
        return self._adapt(observation), {**info, "instruction": self._said, "is_success": success}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        space = self.env.action_space
        if isinstance(space, spaces.Box):
            action = np.clip(np.asarray(action, np.float64), space.low, space.high).astype(space.dtype)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "instruction" in info:
            self._said = self._instruction(info)
        info = {**info, "instruction": self._said, "is_success": self._success(info)}
        return self._adapt(observation), float(reward), bool(terminated), bool(truncated), info

    def make_expert(self, noise: float = 0.0, seed: int = 0) -> Expert:
        """The source of demonstrations that the adapter names, for this environment's current and future episodes.

        Only an environment's own expert knows `noise`.
        """
        source = self.adapter.expert
        if source == "random":
            return _RandomExpert(self.env.action_space, seed)
        if source == "env":
            try:
                maker = self.env.get_wrapper_attr("make_expert")
            except AttributeError:
                raise SimulatorError(
                    f"environment {self.env_id!r} has no expert of its own. Name one in the adapter: "
                    '`expert: "module:callable"` (called with the environment and a seed), or `expert: random`.'
                ) from None
            return maker(noise=noise, seed=seed)
        module, _, name = source.partition(":")
        try:
            maker = getattr(_import(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise SimulatorError(
                f"cannot load expert {source!r} ('env', 'random' or 'module:callable' is expected): {error}"
            ) from None
        return maker(self.env, seed)

    def _adapt(self, observation: Any) -> dict[str, Any]:
        found = dict(_leaves(observation))
        pixels = {}
        for camera, path in self._images.items():
            image = np.asarray(self._render(camera) if path == "render()" else self._read(found, path, "images"))
            # A copy: the environment may draw its next picture into the same memory.
            pixels[camera] = np.array(image[::-1, ::-1] if camera in self.adapter.flip else image, order="C")
        adapted: dict[str, Any] = {"pixels": pixels}
        if self.adapter.state:
            parts = [np.ravel(self._read(found, path, "state")) for path in self.adapter.state]
            adapted["agent_pos"] = np.concatenate(parts).astype(np.float32)
        return adapted

    def _render(self, camera: str) -> Any:
        image = self.env.render()
        if image is None:
            raise SimulatorError(
                f"environment {self.env_id!r}, camera {camera!r}: render() returned nothing in render_mode "
                f"{self.env.render_mode!r}. Set `kwargs: {{render_mode: rgb_array}}` in the adapter."
            )
        return image

    def _read(self, found: Mapping[str, Any], path: str, field: str) -> Any:
        if path not in found:
            fix = "`state: []` is for a policy without proprioception." if field == "state" else ""
            message = unknown("path into the observation", path, found, fix)
            raise SimulatorError(f"environment {self.env_id!r}, adapter.{field}: {message}")
        return found[path]

    def _instruction(self, info: Mapping[str, Any]) -> str:
        if self.adapter.instruction is not None:
            return self.adapter.instruction
        if "instruction" in info:
            return str(info["instruction"])
        try:
            return str(self.env.get_wrapper_attr("task_description"))
        except AttributeError:
            raise SimulatorError(
                f"environment {self.env_id!r} states no instruction; give one in the adapter: "
                "`instruction: push the T`."
            ) from None

    def _success(self, info: Mapping[str, Any]) -> bool:
        found, path = dict(_leaves(info)), self.adapter.success
        if path not in found:
            message = unknown("path into the info of a step", path, found)
            raise SimulatorError(f"environment {self.env_id!r}, adapter.success: {message}")
        return bool(np.all(np.asarray(found[path]) >= 0.5))

    def _describe(self, observation: Mapping[str, Any]) -> RobotSpec:
        space = self.env.action_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise SimulatorError(f"environment {self.env_id!r}: a vector of real actions is needed, got {space}.")
        dims = {"state_names": len(observation.get("agent_pos", ())), "action_names": space.shape[0]}
        described: dict[str, Any] = {
            "cameras": list(observation["pixels"]),
            "control_hz": float(self.env.metadata.get("render_fps") or 10.0),
        }
        described |= {key: [f"{key.removesuffix('_names')}_{i}" for i in range(size)] for key, size in dims.items()}
        stated = self.env.get_wrapper_attr("robot") if self.env.has_wrapper_attr("robot") else None
        if isinstance(stated, Mapping):  # else an attribute that means something else
            described |= {key: value for key, value in stated.items() if key != "cameras"}
        if len(described["state_names"]) != dims["state_names"]:  # the adapter chose other entries than the environment
            described["state_names"] = [f"state_{i}" for i in range(dims["state_names"])]
        described |= self.adapter.robot
        for key, size in dims.items():
            if len(described[key]) != size:
                raise SimulatorError(
                    f"environment {self.env_id!r}: {key} lists {len(described[key])} names "
                    f"({', '.join(map(str, described[key]))}) for {size} entries; mend it in adapter.robot."
                )
        return RobotSpec.from_dict(described)


class _RandomExpert:
    """Uniformly random actions: a stand-in that exercises the pipeline on an environment without an expert."""

    def __init__(self, space: gym.Space, seed: int) -> None:
        if not isinstance(space, spaces.Box):
            raise SimulatorError(f"random demonstrations need a Box action space, got {space}.")
        self._low = np.maximum(space.low, -1e3)
        self._high = np.minimum(space.high, 1e3)
        self._rng = np.random.default_rng(seed)

    def act(self) -> np.ndarray:
        return self._rng.uniform(self._low, self._high).astype(np.float32)


def resolve(env_id: str, adapter: AdapterConfig) -> str:
    """The registered id, after importing the module that registers it; a readable error for one that no module does."""
    module, _, name = env_id.rpartition(":")
    module = module or adapter.module or ("envs" if name.startswith("vla") else "")
    if module:
        try:
            _import(module)
        except Exception as error:
            raise SimulatorError(
                f"environment {env_id!r}: cannot import {module!r} ({error}). Install the package that provides it."
            ) from error
    if name in gym.registry:
        return name
    fix = "An environment of another package needs `adapter.module` (or the id written module:Id)."
    family = name.rpartition("/")[0]
    kin = [known for known in gym.registry if family and known.rpartition("/")[0] == family]
    if kin:
        raise SimulatorError(unknown("environment", name, kin, fix))
    with contextlib.suppress(Exception):  # so that a forgotten "vla/" is recognised
        importlib.import_module("envs")
    near = difflib.get_close_matches(name, gym.registry, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise SimulatorError(f"unknown environment {name!r}.{hint} {fix}")


def _import(module: str) -> ModuleType:
    """Import what a configuration names; files in the working directory count, as they do for `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)


def _failure(env_id: str, error: Exception) -> SimulatorError:
    return SimulatorError(
        f"environment {env_id!r} failed to start: {type(error).__name__}: {error}. "
        "`vla doctor` says whether rendering works on this machine."
    )


def _cameras(observation: Any, env_id: str) -> list[str]:
    pixels = observation.get("pixels") if isinstance(observation, Mapping) else None
    if not isinstance(pixels, Mapping):
        shapes = ", ".join(f"{path!r} {list(np.shape(value))}" for path, value in _leaves(observation))
        raise SimulatorError(
            f'environment {env_id!r} has no observation["pixels"][camera]; say in the adapter where its images are, '
            f'e.g. `images: {{top: pixels}}` or `images: {{top: "render()"}}`. Its observation has: {shapes}.'
        )
    return list(pixels)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested mappings; the path of a tree that is no mapping is ''."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _space_of(value: Any) -> spaces.Space:
    if isinstance(value, Mapping):
        return spaces.Dict({key: _space_of(child) for key, child in value.items()})
    if value.dtype == np.uint8:
        return spaces.Box(0, 255, value.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, value.shape, value.dtype)
