"""Motion primitives of the LIBERO experts: pick, place, and retreat.

Owns the motion of the hand. As in `envs.moves`, every primitive depends only on the current state, without phases or
timers: an expert can label any state, and recovers from disturbances.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from envs.libero.world import World

OPEN, CLOSED = -1.0, 1.0
_METRES, _RADIANS = 0.05, 0.5  # of the controller's goal at an action of 1
_GAIN, _TURN_GAIN = 2.5, 1.5
_TURN = 0.5  # maximum rotation action
#: Radians. For smaller errors, the action's rotation is 0, and the controller holds its last goal. Small corrections
#: would be noise in the training data.
_ALIGNED = 0.1
#: Maximum rotation action with an object in the hand. Faster rotations take so much torque that the hand stops short of
#: its goal.
GENTLE = 0.12
_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # the hand's orientation at rest


@dataclasses.dataclass(frozen=True)
class Grasp:
    """Where to close the fingers: position [3] between the fingertips, yaw of the axis along which they open, and
    height of the object's top."""

    point: np.ndarray
    yaw: float
    top: float


def pointing(yaw: float = 0.0, tilt: float = 0.0) -> np.ndarray:
    """Orientation [3, 3] of a hand that points down, tilted by `tilt` towards -y, then turned by `yaw` about z."""
    cosine, sine = np.cos(tilt), np.sin(tilt)
    lean = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ lean @ _DOWN


def go(
    world: World, goal: np.ndarray, grip: float, rotation: np.ndarray | None = None, turn: float = _TURN
) -> np.ndarray:
    """Action [7] straight to `goal` [3] metres and to the orientation `rotation` [3, 3]; None: pointing down."""
    rotation = pointing() if rotation is None else rotation
    action = np.zeros(7)
    action[:3] = np.clip((goal - world.hand) / _METRES * _GAIN, -1, 1)
    error = _rotation_vector(rotation @ world.rotation.T)
    if np.linalg.norm(error) > _ALIGNED:
        action[3:6] = np.clip(error / _RADIANS * _TURN_GAIN, -turn, turn)
    action[6] = grip
    return action


def pick(world: World, name: str, grasp: Grasp) -> np.ndarray:
    """Action [7] towards gripping the object `name`. The hand descends once it is aligned with the grasp."""
    hand, point = world.hand, grasp.point
    aside, above = np.linalg.norm(point[:2] - hand[:2]), hand[2] - point[2]
    yaw = grasp.yaw + np.pi * np.round((world.yaw - grasp.yaw) / np.pi)  # half a turn exchanges the fingers
    rotation, twist = pointing(yaw), abs(world.yaw - yaw)
    missed = world.opening < 0.004 or (world.opening < 0.05 and world.at_rest and not world.touched(name))
    if missed and aside < 0.05 and above < 0.03:
        return go(world, np.array([*hand[:2], point[2] + 0.06]), OPEN, rotation)
    if aside < 0.012 and abs(above) < 0.012 and twist < 0.15:
        return go(world, point, CLOSED, rotation)
    if (aside < 0.015 and twist < 0.2) or (aside < 0.03 and above < 0.03 and world.opening > 0.06):
        return go(world, point, OPEN, rotation)
    safe = max(grasp.top + 0.02, point[2] + 0.03)
    height = safe + float(np.clip(aside - 0.02, 0, 0.05))
    for around in (hand, point):  # before the descent, fingers and palm stay above everything
        height = max(height, world.clutter([name], around, _FINGERS)[:, 2].max(initial=0.0) + 0.022)
        height = max(height, world.clutter([name], around, _PALM)[:, 2].max(initial=0.0) - 0.028)
    if hand[2] < safe - 0.02 and aside > 0.03:  # rise before moving sideways
        return go(world, np.array([*hand[:2], height]), OPEN, rotation)
    return go(world, np.array([*point[:2], height]), OPEN, rotation)


def place(
    world: World, name: str, xy: np.ndarray, support: float, within: float = 0.012, centre: np.ndarray | None = None
) -> np.ndarray:
    """Action [7] that carries the held object above `xy` [2], lowers it to the height `support`, and releases it.

    The object first rises until it clears everything on the next 12 cm of its way.

    Args:
        within: distance from `xy` in metres at which the object may be lowered.
        centre: the point [2] of the object that goes to `xy`; None: its origin.
    """
    hand, rotation = world.hand, pointing(world.yaw)
    at = world.origin(name)[:2] if centre is None else centre
    low, _ = world.box(name)
    way = xy - at
    distance, gap = float(np.linalg.norm(way)), low[2] - support

    def move(by: np.ndarray, up: float) -> np.ndarray:
        return go(world, np.array([*(hand[:2] + by), hand[2] + up]), CLOSED, rotation, GENTLE)

    if distance < within or (distance < 2 * within and gap < 0.04):
        if gap < 0.012:
            return go(world, hand, OPEN, rotation, GENTLE)
        return move(way, -gap - 0.005)
    around = world.clutter([name], at, 0.30)
    step = np.clip((around[:, :2] - at) @ way / max(distance, 1e-6), 0, min(distance, 0.12))
    aside = np.linalg.norm(around[:, :2] - at - step[:, None] * way / max(distance, 1e-6), axis=1)
    below = np.linalg.norm(around[:, :2] - at, axis=1) < _RADIUS
    highest = around[aside < _RADIUS, 2].max(initial=support)
    highest_here = around[below, 2].max(initial=support)
    climb = max(highest + _MARGIN, support + 0.02) - low[2]
    sideways = 1.0
    if climb > 0.012:
        sideways = 0.5 if highest <= highest_here + 1e-3 and climb < 0.03 else 0.0
    action = move(sideways * way, climb)
    if climb > 0.012 and low[2] - highest_here < 0.02:
        action[2] = min(action[2], 0.5)  # a faster start pulls a rim out of the fingers
    return action


#: Metres from the middle of the open hand to the outside of the fingers, whose tips are 1.2 cm below the point between
#: them, and of the palm, which is 4.3 cm above it.
_FINGERS, _PALM = 0.065, 0.11
_RADIUS = 0.065  # metres; of a carried object
_MARGIN = 0.03  # metres between a carried object and everything below it


def rise(world: World, grip: float = OPEN) -> np.ndarray:
    """Action [7] straight up, away from a released object."""
    return go(world, world.hand + np.array([0, 0, 0.06]), grip, pointing(world.yaw))


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle [3] of a rotation matrix."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    length = np.linalg.norm(axis)
    return axis / length * angle if length > 1e-8 else np.zeros(3)
