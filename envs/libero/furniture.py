"""More motion primitives of the LIBERO experts: pull a drawer open, turn a knob, drag a plate.

Owns the geometry of handles and knobs. As in `moves`, all primitives depend only on the current state.
"""

from __future__ import annotations

import numpy as np

from envs.libero.moves import CLOSED, OPEN, Grasp, go, pick, pointing
from envs.libero.world import World

_TILT = 1.31  # radians; 0 is straight down. A tilted hand closes its fingers on a handle from above and below
_FINGERTIP = 0.012  # metres from the point between the fingers to their tips


class Drawer:
    """A drawer of a cabinet.

    Args:
        joint: name of its slide joint, whose negative direction opens the drawer.
    """

    def __init__(self, world: World, joint: str) -> None:
        self._world, self._joint = world, joint
        model = world.model
        slide = model.joint(joint)
        self._body = int(slide.bodyid[0])
        self._axis = slide.axis.copy()
        geoms = world.geoms(model.body(self._body).name)
        world_axis = self.way
        self._handle = max(geoms, key=lambda geom: float(world.data.geom_xpos[geom] @ world_axis))

    @property
    def way(self) -> np.ndarray:
        """Direction [3] in which the drawer opens."""
        return -self._world.data.xmat[self._body].reshape(3, 3) @ self._axis

    @property
    def opening(self) -> float:
        """How far the drawer is open, in metres."""
        return -self._world.angle(self._joint)

    def pull(self, to: float = 0.2) -> np.ndarray:
        """Action [7] that opens the drawer by its handle, up to `to` metres."""
        world, rotation = self._world, self._rotation()
        if self.held:
            return go(world, world.hand + (to + 0.005 - self.opening) * self.way, CLOSED, rotation)
        out, aside = self._from_handle()
        askew = _angle(rotation, world.rotation)
        if out < 0.012 and aside < 0.010 and askew < 0.2:
            return go(world, self._point(0.005), CLOSED, rotation)
        if aside < 0.018 and askew < 0.2:
            return go(world, self._point(0.005), OPEN, rotation)
        return go(world, self._point(0.10), OPEN, rotation)

    @property
    def held(self) -> bool:
        """Whether the handle is gripped."""
        return self._world.gripped({self._handle})

    @property
    def front(self) -> float:
        """Yaw of a hand whose fingers open parallel to the drawer's front, so that the palm does not hit the
        cabinet."""
        x, y, _ = self.way
        return float(np.arctan2(x, -y)) - np.pi / 2

    def leave(self) -> np.ndarray | None:
        """Action [7] that moves a tilted hand away from the handle and turns it down; None once it points down."""
        world = self._world
        if _angle(pointing(world.yaw), world.rotation) < 0.5:
            return None
        out, aside = self._from_handle()
        if out < 0.03 and world.opening < 0.05:  # still around the handle
            return go(world, world.hand, OPEN, self._rotation())
        if out < 0.07 and aside < 0.05:
            return go(world, world.hand + 0.08 * self.way, OPEN, self._rotation())
        return go(world, self._point(0.10) + np.array([0, 0, 0.12]), OPEN)

    def _from_handle(self) -> tuple[float, float]:
        """Metres from the handle to the hand along the opening direction, and across it."""
        offset = self._world.hand - self._point(0.0)
        out = float(offset @ self.way)
        return out, float(np.linalg.norm(offset - out * self.way))

    def _point(self, out: float) -> np.ndarray:
        return self._world.data.geom_xpos[self._handle] + out * self.way

    def _rotation(self) -> np.ndarray:
        x, y, _ = self.way
        return pointing(float(np.arctan2(-x, y)), _TILT)


def turn(world: World, name: str, joint: str) -> np.ndarray:
    """Action [7] that grips the ridge of a knob of the object `name` and turns it counter-clockwise, seen from above.
    `joint` is the hinge of the knob, with a vertical axis."""
    slot = world.model.joint(joint)
    geoms = set(world.geoms(world.model.body(slot.bodyid[0]).name))
    top = max(world.geom_points(geom)[:, 2].max() for geom in geoms)
    point = np.array([*world.data.xanchor[slot.id][:2], top - 0.02])
    closing = world.opening < 0.04 and np.linalg.norm(world.hand - point) < 0.03
    if world.gripped(geoms) or (closing and world.touching(geoms)):
        return go(world, point, CLOSED, pointing(world.yaw + 0.4))
    return pick(world, name, Grasp(point, world.angle(joint), top))


def drag(world: World, name: str, xy: np.ndarray) -> np.ndarray:
    """Action [7] that drags a plate to `xy` [2] with closed fingers inside its rim. A plate pushed from behind would
    not stay on course."""
    at, hand = world.origin(name), world.hand
    way = xy - at[:2]
    low = at[2] + 0.004 + _FINGERTIP  # fingertips 4 mm above the plate's origin; dragging, they press on the plate
    inside = np.linalg.norm(hand[:2] - at[:2])
    if inside < 0.06 and hand[2] < low + 0.007 and world.opening < 0.02:
        step = way * min(1.0, 0.009 / max(float(np.linalg.norm(way)), 1e-6))
        return go(world, np.array([*(hand[:2] + step), low - 0.004]), CLOSED)
    if inside < 0.02:
        return go(world, np.array([*at[:2], low - 0.004]), CLOSED)
    height = low + 0.05
    if hand[2] < height - 0.02:
        return go(world, np.array([*hand[:2], height]), CLOSED)
    return go(world, np.array([*at[:2], height + float(np.clip(inside - 0.03, 0, 0.06))]), CLOSED)


def _angle(rotation: np.ndarray, other: np.ndarray) -> float:
    """Angle in radians between two orientations [3, 3]."""
    return float(np.arccos(np.clip((np.trace(rotation @ other.T) - 1) / 2, -1, 1)))
