"""Shared code of the tasks that move an object to one of two coloured zones.

Owns the sampling of zones. Does not know how an object is moved there.
"""

from __future__ import annotations

import numpy as np

from envs.base import Scene
from envs.furniture import put_zone
from envs.instructions import Thing
from envs.objects import draw_colors
from envs.tasks.common import ObjectTask, object_thing

N_ZONES = 2


class ZoneTask(ObjectTask):
    """A task with two zones. Each object of a scene has its own target zone, so the target zone depends on the target
    object.
    """

    def zones(self, rng: np.random.Generator, scene: Scene, places: np.ndarray) -> Scene:
        """Add zones of unused colours at `places` [2, 2] metres to `scene`. Each object has a random target zone."""
        colors = draw_colors(rng, N_ZONES, [thing["color"] for thing in scene["objects"]])
        scene["zones"] = [
            {"color": color, "xy": [float(v) for v in place]} for color, place in zip(colors, places, strict=True)
        ]
        scene["zone_of"] = [int(rng.integers(N_ZONES)) for _ in scene["objects"]]
        return scene

    def arrange(self, scene: Scene) -> None:
        for i, zone in enumerate(scene["zones"]):
            put_zone(self.world.model, i, zone["color"], zone["xy"])

    def named(self, scene: Scene, target: int) -> tuple[Thing, ...]:
        zone = scene["zones"][scene["zone_of"][target]]
        return (object_thing(scene, target), Thing("zone", zone["color"]))

    def zone(self) -> np.ndarray:
        """Position [2] of the target zone's centre in metres."""
        return np.array(self.scene["zones"][self.scene["zone_of"][self.target]]["xy"])
