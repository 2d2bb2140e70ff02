"""Scripted experts for those of LIBERO's tasks that consist of placing objects, opening drawers and turning knobs.

Owns the grasp of each object and the choice of a motion for each predicate of a goal. The motions are in `moves` and
`furniture`. An expert works on the first predicate that does not hold, so it can start in any state.
"""

from __future__ import annotations

import dataclasses

import mujoco
import numpy as np

from envs.libero.furniture import Drawer, drag, turn
from envs.libero.moves import CLOSED, GENTLE, Grasp, go, pick, place, pointing, rise
from envs.libero.simulator import Simulator
from envs.libero.world import World

#: Metres. Before it puts an object into a drawer that is open by less than `_OPEN`, the expert pulls it open to
#: `_WIDE`. An object in front of a drawer that is open further would be hard to reach.
_OPEN, _WIDE = 0.075, 0.10
_RIM_YAWS = (0.0, np.pi / 2, -np.pi / 2, np.pi / 4, -np.pi / 4)
#: Height in metres of the surface on which objects are placed, above the supporting object's origin.
_SEATS = {"plate": 0.0055, "akita_black_bowl": 0.02}


@dataclasses.dataclass(frozen=True)
class Rim:
    """Where to grasp the wall of a round object, in metres: distance of the grasp point from the rim's outer radius
    inwards, and below the rim."""

    inset: float
    depth: float


_RIMS = {
    "akita_black_bowl": Rim(0.008, 0.026),
    "porcelain_mug": Rim(0.002, 0.028),
    "white_yellow_mug": Rim(0.003, 0.028),
    "red_coffee_mug": Rim(0.003, 0.028),
}


class Plan:
    """Computes the expert's action [7] for the current state, without noise.

    Raises:
        ValueError: the task's goal has a predicate for which no motion is known.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.world = simulator, World(simulator)
        self._goals = simulator.goals
        regions = simulator.env.object_sites_dict
        self._drawers = {
            name: Drawer(self.world, region.joints[0])
            for name, region in regions.items()
            if region.joints and _is_slide(self.world, region.joints[0])
        }

        for goal in self._goals:
            if goal[0] not in ("in", "on", "turnon") and not (goal[0] == "open" and goal[1] in self._drawers):
                raise ValueError(f"there is no scripted expert for goals such as {goal}.")

    def __call__(self) -> np.ndarray:
        for goal in self._goals:
            if self.simulator.solved(goal):
                continue
            if goal[0] == "open":
                return self._drawers[goal[1]].pull()
            if goal[0] == "turnon":
                return turn(self.world, goal[1], f"{goal[1]}_button")
            if goal[1].startswith("plate"):
                return drag(self.world, goal[1], self.world.site(goal[2])[:2])
            return self._put(goal[1], goal[2])
        return rise(self.world)

    def _put(self, name: str, destination: str) -> np.ndarray:
        """Pick an object up and put it on or into an object or a region."""
        world = self.world
        if (drawer := self._drawers.get(destination)) is not None:
            if drawer.opening < (_WIDE if drawer.held else _OPEN):
                return drawer.pull(_WIDE)
            if (away := drawer.leave()) is not None:
                return away
        xy, support, within = self._seat(destination)
        centre = None if _category(name) in _RIMS else world.centre(name)[:2]
        if world.held(name):
            for region, drawer in self._drawers.items():
                if self._inside(name, region) and world.covered(name, 0.048):
                    return go(world, world.hand + 0.05 * drawer.way, CLOSED, pointing(world.yaw), GENTLE)
            return place(world, name, xy, support, within, centre)
        at = world.origin(name)[:2] if centre is None else centre
        if np.linalg.norm(xy - at) < within + 0.018 and world.box(name)[0][2] < support + 0.02:  # just released
            return rise(world)
        low = world.box(name)[0][2]
        return pick(world, name, self._grasp(name, np.array([*(xy - at), support + 0.02 - low])))

    def _seat(self, destination: str) -> tuple[np.ndarray, float, float]:
        """Position [2] and height at which an object is released, and the tolerance in metres."""
        world = self.world
        if destination in world.bodies:
            at = world.origin(destination)
            return at[:2], at[2] + _SEATS.get(_category(destination), 0.01), 0.012
        at = world.site(destination)
        if (drawer := self._drawers.get(destination)) is not None:
            # Halfway between the cabinet and the drawer's front.
            return (at + (0.086 - drawer.opening / 2) * drawer.way)[:2], at[2] - 0.02, 0.015
        if destination.endswith("contain_region"):
            owner = destination.removesuffix("_contain_region")
            return at[:2], world.box(owner)[1][2] + 0.018, 0.02
        return at[:2], at[2], 0.012

    def _grasp(self, name: str, way: np.ndarray) -> Grasp:
        """The grasp of an object that will be moved by `way` [3]."""
        low, high = self.world.box(name)
        centre = self.world.centre(name)
        rim = _RIMS.get(_category(name))
        if rim is None:
            return Grasp(np.array([*centre[:2], max(high[2] - 0.035, low[2] + 0.010)]), 0.0, high[2])
        return self._rim_grasp(name, rim, high[2], way)

    def _inside(self, name: str, region: str) -> bool:
        return self.simulator.solved(["in", name, region])

    def _rim_grasp(self, name: str, rim: Rim, top: float, way: np.ndarray) -> Grasp:
        """The grasp of the rim with the lowest cost: a weighted sum of the rotation, and of the points that the open
        hand would hit before and after a motion by `way`. In a drawer, the fingers open parallel to its front."""
        points = self.world.points(name)
        edge = points[points[:, 2] > top - 0.006, :2]
        centre = (edge.min(0) + edge.max(0)) / 2
        radius = float(np.linalg.norm(edge - centre, axis=1).max())
        handle = points[np.linalg.norm(points[:, :2] - centre, axis=1) > radius + 0.008]
        around = np.concatenate([self.world.clutter([name], centre, 0.22), handle])
        there = self.world.clutter([name], centre + way[:2], 0.22) - way
        inside = [drawer.front for region, drawer in self._drawers.items() if self._inside(name, region)]
        grasps = []
        for yaw in inside or _RIM_YAWS:
            for side in (1, -1):
                angle = yaw + side * np.pi / 2
                offset = (radius - rim.inset) * np.array([np.cos(angle), np.sin(angle)])
                grasps.append(Grasp(np.array([*(centre + offset), top - rim.depth]), yaw, top))

        def cost(grasp: Grasp) -> float:
            return 0.15 * abs(grasp.yaw) + 0.012 * (_collisions(grasp, around) + _collisions(grasp, there))

        return min(grasps, key=cost)


def _collisions(grasp: Grasp, points: np.ndarray) -> int:
    """Number of `points` [n, 3] that the palm or the fingers of the open hand would hit at a grasp."""
    x, y, z = (points - grasp.point).T
    along = np.abs(y * np.cos(grasp.yaw) - x * np.sin(grasp.yaw))  # the axis along which the fingers open
    across = np.abs(x * np.cos(grasp.yaw) + y * np.sin(grasp.yaw))
    palm = (along < 0.105) & (across < 0.035) & (z > 0.036) & (z < 0.25)
    fingers = (np.abs(along - 0.047) < 0.011) & (across < 0.011) & (z > -0.012) & (z < 0.06)
    return int(palm.sum() + fingers.sum())


def _is_slide(world: World, joint: str) -> bool:
    return bool(world.model.joint(joint).type[0] == mujoco.mjtJoint.mjJNT_SLIDE)


def _category(name: str) -> str:
    """ "akita_black_bowl" of "akita_black_bowl_1"."""
    return name.rpartition("_")[0]
