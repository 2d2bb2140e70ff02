"""PickEither: lift one of two identical objects, left and right of the hand.

Owns the symmetric layout and the success condition. An instruction fits both objects, and demonstrations choose one at
random, so they solve the task in two equally good ways ("modes"). It is for policies with a latent
(`scripts/eval_latent`).
"""

from __future__ import annotations

import numpy as np

from envs.base import Scene
from envs.moves import CLOSED, go, pick
from envs.objects import draw_pairs
from envs.scene import HALF
from envs.tasks.common import ObjectTask, objects_at

_LIFT = 0.05  # metres


class PickEither(ObjectTask):
    """Success: one of the two objects is grasped and more than 5 cm above its resting height.

    The target is the object that the expert takes: 0 is on the left (y > 0), 1 on the right.
    """

    task = "pick_up"
    hand_start = ((0.36, -0.01, 0.17), (0.42, 0.01, 0.23))

    @property
    def n_objects(self) -> int:
        return 2

    @property
    def target_candidates(self) -> int:
        return 2

    def layout(self, rng: np.random.Generator) -> Scene:
        pair = draw_pairs(rng, 1, self.pairs)[0]
        x, y = rng.uniform(0.38, 0.54), rng.uniform(0.06, 0.12)
        places = np.array([(x, y), (x, -y)]) + rng.uniform(-0.005, 0.005, size=(2, 2))
        return {"objects": objects_at(rng, [pair, pair], places)}

    def success(self) -> bool:
        return any(self.in_hand(i) and self.world.object_pos(i)[2] > HALF + _LIFT for i in range(self.n_objects))

    def plan(self) -> np.ndarray:
        if any(self.in_hand(i) for i in range(self.n_objects)):
            return go(self.world, np.array([*self.world.hand[:2], HALF + 0.10]), CLOSED)
        return pick(self.world, self.object())
