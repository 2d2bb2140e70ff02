"""Motion primitives of the scripted experts: approach, pick, carry, push, release.

Owns the motion of the hand. A task combines these primitives in its `plan`.

Every primitive depends only on the current state of the world, without phases or timers. An expert can therefore
compute the next action in any state. It can label the states that a policy visits, and it recovers from disturbances.
"""

from __future__ import annotations

import numpy as np

from envs.scene import HAND_BOX
from envs.world import ROTATION, TRANSLATION, World

OPEN, CLOSED = 1.0, -1.0
_SPEED = 0.7  # maximum action; below 1, so that noise remains visible and motions have more frames
_GAIN = 0.3  # fraction of the remaining distance per step near the goal
_CLEAR = 0.075  # height in metres of the hand above an object's centre at which the fingers clear its neighbours


def go(world: World, goal: np.ndarray, grip: float) -> np.ndarray:
    """Action [7] straight to `goal` [3] metres, at full speed until the hand is close. Also corrects a tilted wrist."""
    action = np.zeros(7)
    action[:3] = np.clip(_GAIN * (goal - world.hand) / TRANSLATION, -_SPEED, _SPEED)
    rpy = world.rpy
    action[3:6] = np.where(np.abs(rpy) > 0.04, -rpy / ROTATION, 0.0)
    action[6] = grip
    return np.clip(action, -1.0, 1.0)


def approach(
    world: World, xy: np.ndarray, low: float, high: float, grip: float, inner: float = 0.010, outer: float = 0.045
) -> np.ndarray:
    """Action [7] that descends to `xy` [2] through a funnel, from height `high` far away to `low` above `xy`.

    Below the funnel, the hand rises before it moves sideways, so that it does not knock over nearby objects.
    """
    way = xy - world.hand[:2]
    share = np.clip((np.linalg.norm(way) - inner) / (outer - inner), 0.0, 1.0)
    height = low + (high - low) * share
    climb = height - world.hand[2]
    slow = np.clip(1.0 - (climb - 0.01) / 0.025, 0.0, 1.0)
    return go(world, np.array([*(world.hand[:2] + slow * way), height]), grip)


def between_fingers(world: World, at: np.ndarray) -> bool:
    """Whether closing the fingers would grasp an object centred at `at` [3]."""
    dx, dy, dz = np.abs(at - world.hand)
    return bool(dx < 0.014 and dy < 0.02 and dz < 0.014)


def pick(world: World, at: np.ndarray, clear: float = _CLEAR) -> np.ndarray:
    """Action [7] towards grasping an object centred at `at` [3]."""
    low = max(float(at[2]), HAND_BOX[0, 2])
    if between_fingers(world, at):
        return go(world, np.array([at[0], at[1], low]), CLOSED)
    # Half-closed fingers would collide with the object. Stay above it until they are wide open.
    wait = clear * float(np.clip((0.75 - world.opening) / 0.25, 0.0, 1.0))
    return approach(world, at[:2], low + wait, low + clear, OPEN)


def carry(world: World, at: np.ndarray, xy: np.ndarray, low: float, high: float) -> np.ndarray:
    """Action [7] that carries the grasped object from its centre `at` [3] to `xy` [2] at height `low`, in metres."""
    goal = world.hand[:2] + (xy - at[:2])
    lift = world.hand[2] - at[2]
    return approach(world, goal, low + lift, high + lift, CLOSED, inner=0.012, outer=0.05)


def push(world: World, at: np.ndarray, way: np.ndarray, reach: float, height: float) -> np.ndarray:
    """Action [7] that pushes the object at `at` [3] by the vector `way` [2] metres with closed fingers.

    The hand is lowered behind the object, `reach` metres from its centre.
    """
    direction = way / np.linalg.norm(way)
    rel = world.hand[:2] - at[:2]
    behind = -float(rel @ direction)
    aside = rel + behind * direction
    low = world.opening < 0.3 and world.hand[2] < height + 0.015
    if low and 0.018 < behind < reach + 0.03 and np.linalg.norm(aside) < 0.013:
        gap = direction * max(behind - reach, 0.0)
        return go(world, np.array([*(world.hand[:2] + way + gap - aside), height]), CLOSED)
    return approach(world, at[:2] - reach * direction, height + wait_closed(world), height + _CLEAR, CLOSED)


def wait_closed(world: World) -> float:
    """Additional height in metres while the fingers are open, so that they do not close around an object."""
    return 0.05 * float(np.clip((world.opening - 0.2) / 0.2, 0.0, 1.0))


def release(world: World, geom: str) -> np.ndarray:
    """Action [7] that releases geom `geom` in place, and moves up once the fingers no longer touch it."""
    up = 0.0 if world.gripped(geom) else 0.06
    return go(world, world.hand + np.array([0.0, 0.0, up]), OPEN)
