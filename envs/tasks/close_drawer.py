"""CloseDrawer: push the named drawer shut.

Owns how far closed is closed. Does not know how the hand pushes.
"""

from __future__ import annotations

import numpy as np

from envs.moves import push
from envs.tasks.drawers import DrawerTask

_SHUT = 0.008  # metres
_REACH = 0.046  # between hand and handle when the hand comes down


class CloseDrawer(DrawerTask):
    """Success: the named drawer, open by 7 to 11 cm at first as is the other one, is open by less than 8 mm."""

    task = "close_drawer"

    def initial(self, rng: np.random.Generator) -> float:
        return rng.uniform(0.07, 0.11)

    def success(self) -> bool:
        return self.extension(self.target) < _SHUT

    def plan(self) -> np.ndarray:
        at = self.handle()
        way = np.array([-self.extension(self.target) - 0.05, 0.0])  # beyond shut: no slowing down before the end
        return push(self.world, at, way, _REACH, float(at[2]))
