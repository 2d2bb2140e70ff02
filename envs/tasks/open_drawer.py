"""OpenDrawer: pull the target drawer open by its handle.

Owns the success threshold. The grasping motion is in `moves`.
"""

from __future__ import annotations

import numpy as np

from envs.moves import CLOSED, go, pick
from envs.tasks.drawers import DrawerTask

_OPEN = 0.09  # metres


class OpenDrawer(DrawerTask):
    """Both drawers start closed. Success: the target drawer is open by more than 9 cm."""

    task = "open_drawer"

    def initial(self, rng: np.random.Generator) -> float:
        return 0.0

    def success(self) -> bool:
        return self.extension(self.target) > _OPEN

    def plan(self) -> np.ndarray:
        at = self.handle()
        if self.world.gripped(f"handle{self.target}"):
            remaining = _OPEN + 0.05 - self.extension(self.target)
            return go(self.world, np.array([self.world.hand[0] + remaining, at[1], at[2]]), CLOSED)
        return pick(self.world, at)
