"""Point: output the position of the target. These are questions about an image, for language grounding.

Owns the encoding of the answer. The action's translation is the target's position relative to the centre of the
workspace; an action of 1 is 0.2 m. Nothing moves.

In demonstrations of a task, the instruction matters only at the beginning, before the hand's motion reveals the
target. Here, every frame requires the instruction, and the answer does not depend on the hand.
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

REACH = 0.2  # metres per action unit
_NEAR = 0.025  # metres
_ORIGIN = np.array([*CENTER, 0.0])


class Question(TabletopEnv):
    """A question. Success: the answer is within 2.5 cm of the target. An episode is one step."""

    task = "point"

    @abc.abstractmethod
    def places(self) -> np.ndarray:
        """Positions of the target candidates, [target_candidates, 3] metres."""

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Evaluate the answer, an action [7]. Only its translation is used."""
        self._answer: np.ndarray | None = _ORIGIN + REACH * check_action(action, ACTION_NAMES)[:3]
        success = self.success()
        return self._observe(), float(success), success, False, self._info(success)

    def _build(self, scene: Scene) -> None:
        self._answer = None
        super()._build(scene)

    def success(self) -> bool:
        return self.reached() == self.target

    def reached(self) -> int:
        """The candidate nearest to the answer if it is within 2.5 cm, else -1."""
        if self._answer is None:
            return -1
        distances = np.linalg.norm(self.places() - self._answer, axis=1)
        nearest = int(np.argmin(distances))
        return nearest if distances[nearest] < _NEAR else -1

    def plan(self) -> np.ndarray:
        return np.array([*(self.places()[self.target] - _ORIGIN) / REACH, 0.0, 0.0, 0.0, OPEN])


class Point(Question, ObjectTask):
    """Position of the target object."""

    # The hand starts anywhere above the objects, for images with unusual hand poses.
    hand_start = ((0.28, -0.20, 0.12), (0.62, 0.20, float(HAND_BOX[1, 2])))

    def places(self) -> np.ndarray:
        return np.array([self.world.object_pos(i) for i in range(self.n_objects)])


class PointZone(Question, PickPlace):
    """Position of the target object or zone."""

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
    """Position of the target button."""

    def places(self) -> np.ndarray:
        return np.array([[*button["xy"], 0.0] for button in self.scene["buttons"]])


class PointDrawer(Question, CloseDrawer):
    """Position of the target drawer's handle."""

    def places(self) -> np.ndarray:
        return np.array([self.world.data.geom(f"handle{i}").xpos for i in range(N_DRAWERS)])
