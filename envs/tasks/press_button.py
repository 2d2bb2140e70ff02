"""PressButton: press the target button.

Owns the layout of the buttons and the success condition. The hand's motion is in `moves`.
"""

from __future__ import annotations

import mujoco
import numpy as np

from envs.base import Scene, TabletopEnv
from envs.furniture import BUTTON_TOP, BUTTON_TRAVEL, add_buttons, put_button
from envs.instructions import Thing
from envs.moves import CLOSED, approach, wait_closed
from envs.objects import draw_colors, draw_pairs
from envs.scene import scatter
from envs.tasks.common import OBJECT_GAP, objects_at

_PRESSED = 0.6 * BUTTON_TRAVEL
_LOW, _HIGH = BUTTON_TOP - 0.006, BUTTON_TOP + 0.07  # heights of the hand; the fingertips are 12 mm lower


class PressButton(TabletopEnv):
    """Success: the target button is pressed by more than 60 % of its travel. A distractor has another colour."""

    task = "press_button"

    @property
    def n_objects(self) -> int:
        return 1

    def furnish(self, spec: mujoco.MjSpec) -> None:
        add_buttons(spec, self.choices)

    def layout(self, rng: np.random.Generator) -> Scene:
        n = self.choices
        places = scatter(rng, np.full((n + 1, n + 1), OBJECT_GAP))
        objects = objects_at(rng, draw_pairs(rng, 1, self.pairs), places[n:])
        colors = draw_colors(rng, n, [objects[0]["color"]])
        buttons = [{"color": c, "xy": [float(v) for v in xy]} for c, xy in zip(colors, places[:n], strict=True)]
        return {"objects": objects, "buttons": buttons}

    def arrange(self, scene: Scene) -> None:
        for i, button in enumerate(scene["buttons"]):
            put_button(self.world.model, i, button["color"], button["xy"])

    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        return (Thing("button", scene["buttons"][target]["color"]),)

    def success(self) -> bool:
        return self._pressed(self.target) > _PRESSED

    def reached(self) -> int:
        """The button that is pressed furthest if it is pressed by more than a quarter of its travel, else -1."""
        pressed = [self._pressed(i) for i in range(self.choices)]
        furthest = int(np.argmax(pressed))
        return furthest if pressed[furthest] > 0.25 * BUTTON_TRAVEL else -1

    def plan(self) -> np.ndarray:
        at = np.array(self.scene["buttons"][self.target]["xy"])
        return approach(self.world, at, _LOW + wait_closed(self.world), _HIGH, CLOSED, inner=0.012)

    def _pressed(self, i: int) -> float:
        return float(self.world.data.joint(f"button{i}").qpos[0])
