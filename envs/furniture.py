"""Furniture: zones, buttons and the cabinet with two drawers.

Owns the geometry of the furniture and its placement in an episode. Does not know tasks, instructions or the robot.
Placement changes the compiled model, so a reset does not recompile it.
"""

from __future__ import annotations

import mujoco
import numpy as np

from envs.arm import STATIC_BITS
from envs.objects import COLORS

_BOX, _CYLINDER = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER
_DARK, _WOOD, _INSIDE = (0.25, 0.25, 0.27, 1), (0.66, 0.58, 0.49, 1), (0.42, 0.36, 0.30, 1)
_SOLID = {"contype": STATIC_BITS[0], "conaffinity": STATIC_BITS[1]}
_PAINT = {"contype": 0, "conaffinity": 0}

ZONE_RADIUS = 0.052
BUTTON_TOP, BUTTON_TRAVEL = 0.034, 0.014
DRAWER_TRAVEL = 0.13
HANDLE_HEIGHT = 0.030  # height of the handle's centre
_HANDLE_AHEAD = 0.054  # from the drawer's front to the handle's centre, so that a finger fits without jamming
_CABINET = np.array([0.060, 0.112, 0.035])  # half sizes
_DRAWER_SIDE = 0.055  # from the cabinet's centre to a drawer's centre


def add_zones(spec: mujoco.MjSpec, n: int, half: tuple[float, float] | None = None) -> None:
    """Add flat areas `zone0...`: discs, or rectangles with the half sizes `half` in metres."""
    for i in range(n):
        body = spec.worldbody.add_body(name=f"zone{i}")
        size = (ZONE_RADIUS, 0.0003, 0) if half is None else (*half, 0.0003)
        body.add_geom(type=_CYLINDER if half is None else _BOX, name=f"zone{i}", pos=(0, 0, 0.001), size=size, **_PAINT)


def put_zone(model: mujoco.MjModel, i: int, color: str, xy: np.ndarray) -> None:
    """Place zone `i` at `xy` [2] metres."""
    model.body(f"zone{i}").pos[:2] = xy
    # Slightly paler than objects, so that zone and object can be distinguished even if only one is visible.
    model.geom(f"zone{i}").rgba[:3] = 0.75 * np.array(COLORS[color]) + 0.25


def add_buttons(spec: mujoco.MjSpec, n: int) -> None:
    """Add `button0...`: spring-loaded caps on dark plates. Joint `button<i>` is the depth of the press in metres."""
    for i in range(n):
        base = spec.worldbody.add_body(name=f"button{i}")
        base.add_geom(type=_CYLINDER, pos=(0, 0, 0.005), size=(0.031, 0.005, 0), rgba=_DARK, **_SOLID)
        cap = base.add_body(name=f"cap{i}", pos=(0, 0, BUTTON_TOP - 0.012), gravcomp=1)
        cap.add_joint(
            name=f"button{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, 0, -1), limited=True,
            range=(0, BUTTON_TRAVEL), stiffness=150, damping=4,
        )  # fmt: skip
        cap.add_geom(type=_CYLINDER, name=f"button{i}", size=(0.025, 0.012, 0), mass=0.05, **_SOLID)


def put_button(model: mujoco.MjModel, i: int, color: str, xy: np.ndarray) -> None:
    """Place button `i` at `xy` [2] metres."""
    model.body(f"button{i}").pos[:2] = xy
    model.geom(f"button{i}").rgba[:3] = COLORS[color]


def add_cabinet(spec: mujoco.MjSpec) -> None:
    """Add a low cabinet with two drawers, one on the left and one on the right, that open towards the camera (+x).

    Joint `drawer<i>` is the opening of a drawer in metres; geom `handle<i>` is its post-shaped handle.
    """
    cabinet = spec.worldbody.add_body(name="cabinet")
    cabinet.add_geom(type=_BOX, pos=(0, 0, _CABINET[2]), size=_CABINET, rgba=_WOOD, **_SOLID)
    for i, side in enumerate((1, -1)):
        drawer = cabinet.add_body(name=f"drawer{i}", pos=(_CABINET[0], side * _DRAWER_SIDE, 0), gravcomp=1)
        drawer.add_joint(
            name=f"drawer{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(1, 0, 0), limited=True,
            range=(0, DRAWER_TRAVEL), damping=5, frictionloss=0.6, armature=0.1,
        )  # fmt: skip
        # The box is behind the front. A closed drawer is inside the cabinet and does not collide with it.
        drawer.add_geom(type=_BOX, pos=(-0.062, 0, 0.027), size=(0.056, 0.044, 0.022), rgba=_INSIDE, mass=0.2, **_SOLID)
        drawer.add_geom(type=_BOX, pos=(0.003, 0, 0.031), size=(0.005, 0.050, 0.029), rgba=_WOOD, mass=0.1, **_SOLID)
        drawer.add_geom(
            type=_BOX, pos=(_HANDLE_AHEAD / 2, 0, 0.009), size=(_HANDLE_AHEAD / 2, 0.012, 0.005), rgba=_DARK,
            mass=0.02, **_SOLID,
        )  # fmt: skip
        drawer.add_geom(
            type=_BOX, name=f"handle{i}", pos=(_HANDLE_AHEAD, 0, HANDLE_HEIGHT), size=(0.013, 0.018, 0.028),
            mass=0.05, condim=4, friction=(1.0, 0.01, 0.001), **_SOLID,
        )  # fmt: skip


def put_cabinet(model: mujoco.MjModel, xy: np.ndarray, colors: list[str]) -> None:
    """Place the cabinet at `xy` [2] metres and set the colours of its two handles."""
    model.body("cabinet").pos[:2] = xy
    for i, color in enumerate(colors):
        model.geom(f"handle{i}").rgba[:3] = COLORS[color]
