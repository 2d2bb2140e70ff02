"""Shared code of the object tasks.

Owns the default layout of objects, and the detection of the object that was acted on. Does not know instructions,
furniture or success conditions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.base import Scene, TabletopEnv
from envs.instructions import Thing
from envs.objects import draw_pairs
from envs.scene import HALF, scatter

OBJECT_GAP = 0.10  # minimum distance between object centres in metres


def objects_at(rng: np.random.Generator, pairs: list[tuple[str, str]], places: np.ndarray) -> list[dict[str, Any]]:
    """Scene entries for `pairs` (colour, shape) at `places` [n, 2] metres, with random yaw."""
    turns = rng.uniform(-np.pi, np.pi, size=len(pairs))
    return [
        {"color": str(color), "shape": shape, "xy": [float(v) for v in place], "yaw": float(turn)}
        for (color, shape), place, turn in zip(pairs, places, turns, strict=True)
    ]


class ObjectTask(TabletopEnv):
    """A task whose target candidates are the objects on the table."""

    def layout(self, rng: np.random.Generator) -> Scene:
        pairs = draw_pairs(rng, self.n_objects, self.pairs)
        gaps = np.full((self.n_objects, self.n_objects), OBJECT_GAP)
        return {"objects": objects_at(rng, pairs, scatter(rng, gaps))}

    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        return (object_thing(scene, target),)

    def object(self) -> np.ndarray:
        """Position [3] of the target object's centre in metres."""
        return self.world.object_pos(self.target)

    def in_hand(self, i: int) -> bool:
        """Whether object `i` is grasped by both fingers."""
        return self.world.gripped(f"object{i}")

    def reached(self) -> int:
        """The grasped object, else the object that moved furthest if it moved more than 2 cm, else -1."""
        for i in range(self.n_objects):
            if self.in_hand(i):
                return i
        starts = [(*thing["xy"], HALF) for thing in self.scene["objects"]]
        moved = [np.linalg.norm(self.world.object_pos(i) - start) for i, start in enumerate(starts)]
        furthest = int(np.argmax(moved))
        return furthest if moved[furthest] > 0.02 else -1


def object_thing(scene: Scene, i: int) -> Thing:
    """Object `i` of a scene, as the instruction grammar refers to it."""
    return Thing("object", scene["objects"][i]["color"], scene["objects"][i]["shape"])
