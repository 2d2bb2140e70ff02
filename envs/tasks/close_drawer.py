"""CloseDrawer: push the target drawer shut.

Owns the initial opening and the success threshold. The pushing motion is in `moves`.
"""

from __future__ import annotations

import numpy as np

from envs.moves import push
from envs.tasks.drawers import DrawerTask

_SHUT = 0.008  # metres
_REACH = 0.046  # metres between hand and handle when the hand is lowered


class CloseDrawer(DrawerTask):
    """Both drawers start open by 7 to 11 cm. Success: the target drawer is open by less than 8 mm."""

    task = "close_drawer"

    def initial(self, rng: np.random.Generator) -> float:
        return rng.uniform(0.07, 0.11)

    def success(self) -> bool:
        return self.extension(self.target) < _SHUT

    def plan(self) -> np.ndarray:
        at = self.handle()
        way = np.array([-self.extension(self.target) - 0.05, 0.0])  # past the end, so that the hand does not slow down
        return push(self.world, at, way, _REACH, float(at[2]))
