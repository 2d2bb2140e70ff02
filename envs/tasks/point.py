"""Point: say where the named object is. A question about the picture, for learning what words refer to.

Owns the meaning of the answer: the action's translation is the way from the hand to the object, half a metre at 1, and
nothing moves. In a task's demonstrations words matter only in the first moments, before the hand's own motion tells
where it is going; here every frame asks for them. Does not know how anything is reached.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.base import ACTION_NAMES
from envs.errors import check_action
from envs.moves import OPEN
from envs.scene import HAND_BOX
from envs.tasks.common import ObjectTask

REACH = 0.5  # metres at an action of 1
_NEAR = 0.025  # metres


class Point(ObjectTask):
    """Success: the answer is within 2.5 cm of the named object. An episode is one step."""

    task = "point"
    # Anywhere above the objects: the answer depends on both, and pictures with the hand in odd places are seen, too.
    hand_start = ((0.28, -0.20, 0.12), (0.62, 0.20, float(HAND_BOX[1, 2])))

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take the answer [7]; only its translation counts."""
        self._answer: np.ndarray | None = self.world.hand + REACH * check_action(action, ACTION_NAMES)[:3]
        success = self.success()
        return self._observe(), float(success), success, False, self._info(success)

    def _build(self, scene: dict[str, Any]) -> None:
        self._answer = None
        super()._build(scene)

    def success(self) -> bool:
        return self.reached() == self.target

    def reached(self) -> int:
        """The object that was pointed at, within 2.5 cm; else -1."""
        if self._answer is None:
            return -1
        distances = [float(np.linalg.norm(self.world.object_pos(i) - self._answer)) for i in range(self.n_objects)]
        nearest = int(np.argmin(distances))
        return nearest if distances[nearest] < _NEAR else -1

    def plan(self) -> np.ndarray:
        return np.array([*(self.object() - self.world.hand) / REACH, 0.0, 0.0, 0.0, OPEN])
