"""Scripted experts for LIBERO's tasks.

Owns where to grasp each object, and which motion brings each predicate of a goal about. The motions are in `moves` and
`furniture`. An expert solves the first predicate that does not hold, so it can start in any state.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from envs.libero.moves import Grasp, pick, place, rise
from envs.libero.simulator import Simulator
from envs.libero.world import World

_RIM_YAWS = (0.0, np.pi / 2, -np.pi / 2, np.pi / 4, -np.pi / 4)
#: Height in metres above the origin of a supporting object at which a placed object stands.
_SEATS = {"plate": 0.0055, "akita_black_bowl": 0.02}


@dataclasses.dataclass(frozen=True)
class Rim:
    """How to grasp the wall of a round object: radius of the wall, and depth of the fingertips below the rim."""

    radius: float
    depth: float


_RIMS = {"akita_black_bowl": Rim(0.046, 0.026)}


class Plan:
    """The clean action [7] for the current state.

    Raises:
        ValueError: the task has a goal for which no motion is known.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.world = simulator, World(simulator)
        self._goals = simulator.goals
        for goal in self._goals:
            if goal[0] not in ("in", "on"):
                raise ValueError(f"there is no scripted expert for the goal {goal}.")

    def __call__(self) -> np.ndarray:
        for goal in self._goals:
            if not self.simulator.solved(goal):
                return self._put(goal[1], goal[2])
        return rise(self.world)

    def _put(self, name: str, destination: str) -> np.ndarray:
        """Pick an object up and put it on or into an object or a region."""
        world = self.world
        xy, support, within = self._seat(destination)
        centre = None if _category(name) in _RIMS else world.centre(name)[:2]
        if world.held(name):
            return place(world, name, xy, support, within, centre)
        at = world.origin(name)[:2] if centre is None else centre
        if np.linalg.norm(xy - at) < within + 0.018 and world.box(name)[0][2] < support + 0.02:  # just released
            return rise(world)
        return pick(world, self._grasp(name))

    def _seat(self, destination: str) -> tuple[np.ndarray, float, float]:
        """Position [2] and height at which an object is released, and the tolerance in metres."""
        world = self.world
        if destination in world.bodies:
            at = world.origin(destination)
            return at[:2], at[2] + _SEATS.get(_category(destination), 0.01), 0.012
        at = world.site(destination)
        if destination.endswith("contain_region"):
            owner = destination.removesuffix("_contain_region")
            return at[:2], world.box(owner)[1][2] + 0.018, 0.02
        return at[:2], at[2], 0.012

    def _grasp(self, name: str) -> Grasp:
        low, high = self.world.box(name)
        centre = self.world.centre(name)
        rim = _RIMS.get(_category(name))
        if rim is None:
            return Grasp(np.array([*centre[:2], max(high[2] - 0.035, low[2] + 0.010)]), 0.0, high[2])
        return self._rim_grasp(name, rim, high[2])

    def _rim_grasp(self, name: str, rim: Rim, top: float) -> Grasp:
        """The point of the rim at which the open hand meets the fewest other things."""
        at = self.world.origin(name)
        around = self.world.clutter([name], at, 0.22)
        grasps = []
        for yaw in _RIM_YAWS:
            for side in (1, -1):
                angle = yaw + side * np.pi / 2
                offset = rim.radius * np.array([np.cos(angle), np.sin(angle)])
                grasps.append(Grasp(np.array([*(at[:2] + offset), top - rim.depth]), yaw, top))
        return min(grasps, key=lambda grasp: 0.15 * abs(grasp.yaw) + 0.012 * _collisions(grasp, around))


def _collisions(grasp: Grasp, points: np.ndarray) -> int:
    """How many of `points` [n, 3] are inside the open hand at a grasp."""
    x, y, z = (points - grasp.point).T
    along = np.abs(y * np.cos(grasp.yaw) - x * np.sin(grasp.yaw))  # the axis along which the fingers open
    across = np.abs(x * np.cos(grasp.yaw) + y * np.sin(grasp.yaw))
    palm = (along < 0.105) & (across < 0.035) & (z > 0.043) & (z < 0.25)
    fingers = (np.abs(along - 0.047) < 0.011) & (across < 0.011) & (z > -0.012) & (z < 0.06)
    return int(palm.sum() + fingers.sum())


def _category(name: str) -> str:
    """ "akita_black_bowl" of "akita_black_bowl_1"."""
    return name.rpartition("_")[0]
