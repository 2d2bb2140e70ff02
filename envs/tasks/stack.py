"""Stack: put the target object on top of another object, the base.

Owns the choice of the base and the success condition. The grasping and carrying motions are in `moves`.
"""

from __future__ import annotations

import numpy as np

from envs.base import Scene
from envs.instructions import Thing
from envs.moves import carry, pick, release
from envs.objects import draw_pairs
from envs.scene import HALF, scatter
from envs.tasks.common import OBJECT_GAP, ObjectTask, object_thing, objects_at

_INSIDE = 0.020  # maximum horizontal distance between the centres in metres
_STEP = 2 * HALF  # height of an object


class Stack(ObjectTask):
    """Success: the target object is released and rests on the base, and neither moves. A ball is never the base."""

    task = "stack"

    def layout(self, rng: np.random.Generator) -> Scene:
        n = self.n_objects
        pairs = draw_pairs(rng, n, self.pairs, max_balls=n - 2)
        scene: Scene = {"objects": objects_at(rng, pairs, scatter(rng, np.full((n, n), OBJECT_GAP)))}
        bases = [[j for j in range(n) if j != i and pairs[j][1] != "ball"] for i in range(n)]
        scene["base_of"] = [int(rng.choice(options)) for options in bases]
        return scene

    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        return (object_thing(scene, target), object_thing(scene, scene["base_of"][target]))

    def success(self) -> bool:
        still = self.world.object_speed(self.target) < 0.04 and self.world.object_speed(self._base) < 0.04
        return self._stacked(_INSIDE, 0.006) and still and not self.world.touched(f"object{self.target}")

    def plan(self) -> np.ndarray:
        name, at, base = f"object{self.target}", self.object(), self.world.object_pos(self._base)
        if self._stacked(0.010, 0.009):
            return release(self.world, name)
        if self.world.gripped(name):
            height = float(base[2]) + _STEP
            return carry(self.world, at, base[:2], low=height, high=height + 0.045)
        if self._stacked(_INSIDE, 0.006):
            return release(self.world, name)
        return pick(self.world, at)

    @property
    def _base(self) -> int:
        return self.scene["base_of"][self.target]

    def _stacked(self, within: float, above: float) -> bool:
        way = self.object() - self.world.object_pos(self._base)
        return bool(np.linalg.norm(way[:2]) < within and abs(way[2] - _STEP) < above)
