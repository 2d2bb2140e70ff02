"""The moves that scripted experts are made of: approach, pick, carry, push, release.

Owns how the hand moves. Does not know the tasks: each of them combines these moves in its `plan`.

Every move is a function of the current state of the world only. There is no phase and no timer, so an expert gives the
right next action in any state: it relabels states that a policy visited, and it recovers from any disturbance.
"""

from __future__ import annotations

import numpy as np

from envs.scene import HAND_BOX
from envs.world import ROTATION, TRANSLATION, World

OPEN, CLOSED = 1.0, -1.0
_SPEED = 0.7  # of the fastest possible: leaves room to be told apart from a disturbance, and time to be observed
_GAIN = 0.3  # share of the remaining way per step, once that is slower than full speed
_CLEAR = 0.075  # metres from an object's centre to the hand at which the fingers pass above its neighbours


def go(world: World, goal: np.ndarray, grip: float) -> np.ndarray:
    """Action [7] straight to `goal` [3] metres, at full speed until close; an upright wrist is left alone."""
    action = np.zeros(7)
    action[:3] = np.clip(_GAIN * (goal - world.hand) / TRANSLATION, -_SPEED, _SPEED)
    rpy = world.rpy
    action[3:6] = np.where(np.abs(rpy) > 0.04, -rpy / ROTATION, 0.0)
    action[6] = grip
    return np.clip(action, -1.0, 1.0)


def approach(
    world: World, xy: np.ndarray, low: float, high: float, grip: float, inner: float = 0.010, outer: float = 0.045
) -> np.ndarray:
    """Action [7] that comes down on `xy` [2] through a funnel: at height `high` until close, at `low` when above it.

    Below the funnel the hand climbs before it moves sideways, so it does not knock over what it is next to.
    """
    way = xy - world.hand[:2]
    share = np.clip((np.linalg.norm(way) - inner) / (outer - inner), 0.0, 1.0)
    height = low + (high - low) * share
    climb = height - world.hand[2]
    slow = np.clip(1.0 - (climb - 0.01) / 0.025, 0.0, 1.0)
    return go(world, np.array([*(world.hand[:2] + slow * way), height]), grip)


def between_fingers(world: World, at: np.ndarray) -> bool:
    """Whether a thing with its centre `at` [3] is where closing the fingers grips it."""
    dx, dy, dz = np.abs(at - world.hand)
    return bool(dx < 0.014 and dy < 0.02 and dz < 0.014)


def pick(world: World, at: np.ndarray, clear: float = _CLEAR) -> np.ndarray:
    """Action [7] towards gripping the thing whose centre is `at` [3]."""
    low = max(float(at[2]), HAND_BOX[0, 2])
    if between_fingers(world, at):
        return go(world, np.array([at[0], at[1], low]), CLOSED)
    # Half-closed fingers would land on top of it: stay above until they are wide open.
    wait = clear * float(np.clip((0.75 - world.opening) / 0.25, 0.0, 1.0))
    return approach(world, at[:2], low + wait, low + clear, OPEN)


def carry(world: World, at: np.ndarray, xy: np.ndarray, low: float, high: float) -> np.ndarray:
    """Action [7] that brings the gripped thing with its centre `at` [3] to `xy` [2] at height `low`, metres."""
    goal = world.hand[:2] + (xy - at[:2])
    lift = world.hand[2] - at[2]
    return approach(world, goal, low + lift, high + lift, CLOSED, inner=0.012, outer=0.05)


def push(world: World, at: np.ndarray, way: np.ndarray, reach: float, height: float) -> np.ndarray:
    """Action [7] that pushes the thing at `at` [3] by the vector `way` [2] metres with closed fingers.

    `reach` is the distance in metres between the hand and its centre at which the hand comes down behind it.
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
    """How much higher to stay, in metres, while the fingers are still open: they must not close around something."""
    return 0.05 * float(np.clip((world.opening - 0.2) / 0.2, 0.0, 1.0))


def release(world: World, geom: str) -> np.ndarray:
    """Action [7] that lets go of the geom called `geom` where it is, and leaves upwards once the fingers are off it."""
    up = 0.0 if world.gripped(geom) else 0.06
    return go(world, world.hand + np.array([0.0, 0.0, up]), OPEN)
