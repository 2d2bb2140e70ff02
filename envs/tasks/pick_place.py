"""PickPlace: put the target object on the target zone.

Owns the success condition. The grasping and carrying motions are in `moves`.
"""

from __future__ import annotations

import mujoco
import numpy as np

from envs.base import Scene
from envs.furniture import ZONE_RADIUS, add_zones
from envs.moves import carry, pick, release
from envs.objects import draw_pairs
from envs.scene import HALF, scatter
from envs.tasks.common import OBJECT_GAP, objects_at
from envs.tasks.zones import N_ZONES, ZoneTask

_INSIDE = ZONE_RADIUS - 0.010  # maximum distance between the centres in metres


class PickPlace(ZoneTask):
    """Success: the target object is released and rests on the table, with its centre well inside the target zone."""

    task = "pick_place"

    def furnish(self, spec: mujoco.MjSpec) -> None:
        add_zones(spec, N_ZONES)

    def layout(self, rng: np.random.Generator) -> Scene:
        n = self.n_objects
        gaps = np.full((n + N_ZONES, n + N_ZONES), OBJECT_GAP)
        gaps[n:, n:] = 2 * ZONE_RADIUS + 0.015
        places = scatter(rng, gaps)
        scene = {"objects": objects_at(rng, draw_pairs(rng, n, self.pairs), places[:n])}
        return self.zones(rng, scene, places[n:])

    def success(self) -> bool:
        return self._placed(_INSIDE, 0.006) and not self.world.touched(f"object{self.target}") and self._still()

    def plan(self) -> np.ndarray:
        name = f"object{self.target}"
        if self._placed(_INSIDE - 0.015, 0.010):
            return release(self.world, name)
        if self.world.gripped(name):
            return carry(self.world, self.object(), self.zone(), low=HALF, high=HALF + 0.085)
        return pick(self.world, self.object())

    def _placed(self, within: float, above: float) -> bool:
        at = self.object()
        return bool(np.linalg.norm(at[:2] - self.zone()) < within and at[2] < HALF + above)

    def _still(self) -> bool:
        return self.world.object_speed(self.target) < 0.05
