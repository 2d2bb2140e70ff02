"""Push: slide the target object into the target zone, a strip to the left or right of the objects.

Owns the strips and the success condition. The pushing motion is in `moves`.
"""

from __future__ import annotations

import mujoco
import numpy as np

from envs.base import Scene
from envs.furniture import add_zones
from envs.moves import push
from envs.objects import draw_pairs
from envs.scene import CENTER, HALF, OBJECT_BOX
from envs.tasks.common import objects_at
from envs.tasks.zones import N_ZONES, ZoneTask

_STRIP = np.array([0.165, 0.040])  # half sizes in metres
_STRIP_SIDE = 0.150  # metres from the centre of the table to the centre of a strip
_ROW_GAP = 0.090  # minimum distance in metres between objects along x, so that the path to either strip is free
_MIDDLE = 0.050  # maximum initial distance in metres of an object from the centre line
_REACH = 0.056  # metres behind the object's centre at which the hand is lowered


class Push(ZoneTask):
    """Success: the target object is at rest on the table, and its centre is at least 8 mm inside the target strip."""

    task = "push"

    def furnish(self, spec: mujoco.MjSpec) -> None:
        add_zones(spec, N_ZONES, (float(_STRIP[0]), float(_STRIP[1])))

    def layout(self, rng: np.random.Generator) -> Scene:
        n = self.n_objects
        low, high = OBJECT_BOX[:, 0]
        slack = np.sort(rng.uniform(0.0, high - low - (n - 1) * _ROW_GAP, size=n))
        rows = rng.permutation(low + slack + _ROW_GAP * np.arange(n))
        places = np.stack([rows, rng.uniform(-_MIDDLE, _MIDDLE, size=n)], axis=1)
        scene = {"objects": objects_at(rng, draw_pairs(rng, n, self.pairs), places)}
        sides = [(CENTER[0], _STRIP_SIDE), (CENTER[0], -_STRIP_SIDE)]
        return self.zones(rng, scene, np.array(sides))

    def success(self) -> bool:
        at = self.object()
        inside = np.all(np.abs(at[:2] - self.zone()) < _STRIP - 0.008)
        return bool(inside and at[2] < HALF + 0.006 and self.world.object_speed(self.target) < 0.06)

    def plan(self) -> np.ndarray:
        at = self.object()
        way = np.array([0.0, self.zone()[1] - at[1]])
        if abs(way[1]) < 0.002:  # the object has arrived but still moves: push on by 2 mm, as zero has no direction
            way[1] = 0.002 * np.sign(self.zone()[1])
        return push(self.world, at, way, _REACH, HALF)
