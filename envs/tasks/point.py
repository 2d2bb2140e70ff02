"""Point: say where the named thing is. Questions about the picture, for learning what words refer to.

Owns the meaning of the answer: the action's translation is the place of the thing, counted from the middle of the
workspace, a fifth of a metre at 1; nothing moves. In a task's demonstrations words matter only in the first moments,
before the hand's own motion tells where it is going; here every frame asks for them. The place is the same wherever the
hand is, so that the answer needs nothing but the picture and the words. Does not know how anything is reached.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from envs.base import ACTION_NAMES, Scene, TabletopEnv
from envs.errors import check_action
from envs.instructions import Thing
from envs.moves import OPEN
from envs.scene import CENTER, HAND_BOX
from envs.tasks.close_drawer import CloseDrawer
from envs.tasks.common import ObjectTask, object_thing
from envs.tasks.drawers import N_DRAWERS
from envs.tasks.pick_place import PickPlace
from envs.tasks.press_button import PressButton
from envs.tasks.zones import N_ZONES

REACH = 0.2  # metres at an action of 1
_NEAR = 0.025  # metres
_ORIGIN = np.array([*CENTER, 0.0])


class Question(TabletopEnv):
    """Success: the answer is within 2.5 cm of the named thing. An episode is one step."""

    task = "point"

    @abc.abstractmethod
    def places(self) -> np.ndarray:
        """Where the things are that could be named, [target_candidates, 3] metres."""

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take the answer [7]; only its translation counts."""
        self._answer: np.ndarray | None = _ORIGIN + REACH * check_action(action, ACTION_NAMES)[:3]
        success = self.success()
        return self._observe(), float(success), success, False, self._info(success)

    def _build(self, scene: Scene) -> None:
        self._answer = None
        super()._build(scene)

    def success(self) -> bool:
        return self.reached() == self.target

    def reached(self) -> int:
        """The thing that was pointed at, within 2.5 cm; else -1."""
        if self._answer is None:
            return -1
        distances = np.linalg.norm(self.places() - self._answer, axis=1)
        nearest = int(np.argmin(distances))
        return nearest if distances[nearest] < _NEAR else -1

    def plan(self) -> np.ndarray:
        return np.array([*(self.places()[self.target] - _ORIGIN) / REACH, 0.0, 0.0, 0.0, OPEN])


class Point(Question, ObjectTask):
    """Where is the named object?"""

    # Anywhere above the objects: pictures with the hand in odd places are seen, too.
    hand_start = ((0.28, -0.20, 0.12), (0.62, 0.20, float(HAND_BOX[1, 2])))

    def places(self) -> np.ndarray:
        return np.array([self.world.object_pos(i) for i in range(self.n_objects)])


class PointZone(Question, PickPlace):
    """Where is the named object, or the named zone?"""

    @property
    def target_candidates(self) -> int:
        return self.n_objects + N_ZONES

    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        if target < self.n_objects:
            return (object_thing(scene, target),)
        return (Thing("zone", scene["zones"][target - self.n_objects]["color"]),)

    def places(self) -> np.ndarray:
        objects = [self.world.object_pos(i) for i in range(self.n_objects)]
        return np.array(objects + [[*zone["xy"], 0.0] for zone in self.scene["zones"]])


class PointButton(Question, PressButton):
    """Where is the named button?"""

    def places(self) -> np.ndarray:
        return np.array([[*button["xy"], 0.0] for button in self.scene["buttons"]])


class PointDrawer(Question, CloseDrawer):
    """Where is the named handle?"""

    def places(self) -> np.ndarray:
        return np.array([self.world.data.geom(f"handle{i}").xpos for i in range(N_DRAWERS)])
