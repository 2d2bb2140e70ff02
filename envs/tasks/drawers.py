"""Shared code of the drawer tasks: a cabinet with two drawers that differ in the colour of their handles.

Owns the pose of the cabinet, and the detection of the drawer that moved. Does not know whether the task is to open or
to close a drawer.
"""

from __future__ import annotations

import abc

import mujoco
import numpy as np

from envs.base import Scene, TabletopEnv
from envs.furniture import add_cabinet, put_cabinet
from envs.instructions import Thing
from envs.objects import draw_colors, draw_pairs
from envs.tasks.common import objects_at

N_DRAWERS = 2


class DrawerTask(TabletopEnv):
    """A task whose target candidates are the two drawers.

    An object in a corner, out of the way of the drawers and the hand, is a distractor of another colour.
    """

    @property
    def n_objects(self) -> int:
        return 1

    @property
    def target_candidates(self) -> int:
        return N_DRAWERS

    def furnish(self, spec: mujoco.MjSpec) -> None:
        add_cabinet(spec)

    @abc.abstractmethod
    def initial(self, rng: np.random.Generator) -> float:
        """Initial opening of a drawer in metres."""

    def layout(self, rng: np.random.Generator) -> Scene:
        corner = np.array([rng.uniform(0.58, 0.60), rng.choice([-1, 1]) * rng.uniform(0.14, 0.16)])
        objects = objects_at(rng, draw_pairs(rng, 1, self.pairs), corner[None])
        return {
            "objects": objects,
            "cabinet": [float(v) for v in rng.uniform((0.275, -0.03), (0.315, 0.03))],
            "handles": draw_colors(rng, N_DRAWERS, [objects[0]["color"]]),
            "open": [float(self.initial(rng)) for _ in range(N_DRAWERS)],
        }

    def arrange(self, scene: Scene) -> None:
        put_cabinet(self.world.model, scene["cabinet"], scene["handles"])
        for i, distance in enumerate(scene["open"]):
            self.world.data.joint(f"drawer{i}").qpos[0] = distance

    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        return (Thing("drawer", scene["handles"][target]),)

    def reached(self) -> int:
        """The drawer that moved furthest if it moved more than 1.5 cm, else a drawer with a grasped handle, else -1."""
        moved = [abs(self.extension(i) - start) for i, start in enumerate(self.scene["open"])]
        furthest = int(np.argmax(moved))
        if moved[furthest] > 0.015:
            return furthest
        gripped = [i for i in range(N_DRAWERS) if self.world.gripped(f"handle{i}")]
        return gripped[0] if gripped else -1

    def extension(self, i: int) -> float:
        """Opening of drawer `i` in metres."""
        return float(self.world.data.joint(f"drawer{i}").qpos[0])

    def handle(self) -> np.ndarray:
        """Position [3] of the centre of the target drawer's handle in metres."""
        return self.world.data.geom(f"handle{self.target}").xpos
