"""The base scene: table, light, front camera and the objects on the table.

Owns geometry, friction and colours of the scene that all tasks share. Does not know the robot, the tasks' furniture or
the layout of an episode. Units are metres. The table top is at z = 0, and the robot is at the origin and faces +x.
"""

from __future__ import annotations

import math
from itertools import product

import mujoco
import numpy as np

from envs.arm import OBJECT_BITS, STATIC_BITS
from envs.objects import COLORS

CENTER = np.array([0.45, 0.0])  # of the table's part with objects
#: Workspace of the tool centre point: minimum, maximum.
HAND_BOX = np.array([[0.25, -0.24, 0.014], [0.66, 0.24, 0.30]])
#: Region of the initial object centres: minimum, maximum.
OBJECT_BOX = np.array([[0.31, -0.14], [0.59, 0.14]])
#: Invisible walls that collide with objects only, to keep them within reach: minimum, maximum.
FENCE = np.array([[0.27, -0.20], [0.63, 0.20]])
HALF = 0.022  # half the height of every object, which is the height of its centre at rest
TABLE_RGBA = (0.80, 0.79, 0.77, 1.0)
TIMESTEP, SUBSTEPS = 0.005, 10  # 20 Hz

_SIZES = {"cube": (HALF, HALF, HALF), "cylinder": (HALF, HALF, 0.0), "ball": (HALF, 0.0, 0.0)}
_GEOM_TYPES = {
    "cube": mujoco.mjtGeom.mjGEOM_BOX,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "ball": mujoco.mjtGeom.mjGEOM_SPHERE,
}
_MASS = 0.08
# Differences between the supported MuJoCo versions: lights have a type since 3.3.3, and several contacts per pair of
# convex geoms are the default since 3.8.
_DIRECTIONAL: dict[str, object] = (
    {"type": mujoco.mjtLightType.mjLIGHT_DIRECTIONAL} if hasattr(mujoco, "mjtLightType") else {"directional": True}
)
_MULTICCD = int(getattr(mujoco.mjtEnableBit, "mjENBL_MULTICCD", 0))
# Rolling friction keeps a ball, or a cylinder that has fallen over, in place.
_ROLLING = {"cube": 0.0005, "cylinder": 0.004, "ball": 0.010}


def base_spec() -> mujoco.MjSpec:
    """An empty spec with solver options and visual settings."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    option = spec.option
    option.timestep = TIMESTEP
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 5  # stiff friction, so that grasped objects do not slip out of the fingers
    option.iterations = 30
    option.enableflags |= _MULTICCD  # a cylinder on a cube needs more than one contact
    spec.visual.quality.offsamples = 0  # in software GL, multisampling takes longer than the rest of the scene
    spec.visual.headlight.ambient = (0.42, 0.42, 0.42)
    spec.visual.headlight.diffuse = (0.28, 0.28, 0.28)
    spec.visual.headlight.specular = (0, 0, 0)
    spec.visual.map.znear = 0.02
    spec.visual.map.zfar = 10
    spec.stat.extent = 1.0
    spec.stat.center = (0.4, 0, 0.1)
    return spec


def add_table(spec: mujoco.MjSpec) -> None:
    """Add table, fence, lamp and front camera."""
    contype, conaffinity = STATIC_BITS
    spec.worldbody.add_geom(
        type=mujoco.mjtGeom.mjGEOM_PLANE, name="table", pos=(0.3, 0, 0), size=(0.8, 0.9, 0.1), rgba=TABLE_RGBA,
        contype=contype, conaffinity=conaffinity, friction=(0.8, 0.01, 0.0001), condim=4,
    )  # fmt: skip
    only_objects = {"contype": 0, "conaffinity": OBJECT_BITS[0], "rgba": (0, 0, 0, 0), "group": 5}
    middle, half = FENCE.mean(axis=0), (FENCE[1] - FENCE[0]) / 2
    for axis, sign in product((0, 1), (-1, 1)):
        pos, size = np.array([*middle, 0.15]), np.array([*(half + 0.05), 0.15])
        pos[axis] += sign * (half[axis] + 0.025)
        size[axis] = 0.025
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=pos, size=size, **only_objects)
    spec.worldbody.add_light(
        name="lamp", pos=(0.75, -0.5, 1.6), dir=(-0.2, 0.35, -1.0), castshadow=True, **_DIRECTIONAL,
        diffuse=(0.38, 0.38, 0.38), specular=(0.05, 0.05, 0.05), ambient=(0, 0, 0),
    )  # fmt: skip
    # Faces the robot, 52 degrees below the horizon. The objects' region fills the image as far as perspective allows.
    down, distance = math.radians(52.0), 0.80
    target = np.array([CENTER[0] - 0.075, 0.0, 0.02])
    pos = target + distance * np.array([math.cos(down), 0, math.sin(down)])
    spec.worldbody.add_camera(name="front", pos=pos, quat=_facing_robot(down), fovy=35)


def _facing_robot(down: float) -> np.ndarray:
    """Quaternion of a camera that looks along -x, `down` radians below the horizon. Image right is +y."""
    right = np.array([0.0, 1.0, 0.0])
    back = np.array([math.cos(down), 0.0, math.sin(down)])
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quat


def add_objects(spec: mujoco.MjSpec, n: int) -> None:
    """Add `n` free bodies `object0...`; `dress` sets shape and colour at every reset without recompiling.

    Each object is compiled as a box that encloses all shapes, so that the bounds of MuJoCo's broad phase are valid for
    every shape. Whatever its shape, an object has the mass and inertia of this box.
    """
    contype, conaffinity = OBJECT_BITS
    for i in range(n):
        body = spec.worldbody.add_body(name=f"object{i}", pos=(CENTER[0], 0.1 * i, HALF))
        body.add_freejoint(name=f"object{i}")
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, name=f"object{i}", size=(HALF, HALF, HALF), mass=_MASS, condim=6,
            friction=(0.8, 0.01, 0.001), solref=(0.01, 1), contype=contype, conaffinity=conaffinity,
        )  # fmt: skip


def dress(model: mujoco.MjModel, i: int, color: str, shape: str) -> None:
    """Set the shape and colour of object `i`."""
    geom = model.geom(f"object{i}").id
    model.geom_type[geom] = _GEOM_TYPES[shape]
    model.geom_size[geom] = _SIZES[shape]
    model.geom_friction[geom, 2] = _ROLLING[shape]
    model.geom_rgba[geom] = (*COLORS[color], 1.0)


def scatter(rng: np.random.Generator, gaps: np.ndarray, box: np.ndarray = OBJECT_BOX) -> np.ndarray:
    """Draw positions [n, 2] uniformly in `box` such that i and j are at least `gaps[i, j]` metres apart.

    Positions are drawn sequentially. If a position does not fit after 40 attempts, all are drawn again.
    """
    n = len(gaps)
    while True:
        places: list[np.ndarray] = []
        for i in range(n):
            for _ in range(40):
                spot = rng.uniform(box[0], box[1])
                if all(np.linalg.norm(spot - other) >= gaps[i, j] for j, other in enumerate(places)):
                    places.append(spot)
                    break
            else:
                break
        if len(places) == n:
            return np.array(places)
