"""The state of a LIBERO simulation for the experts: the hand, the shapes of objects and furniture, and contacts.

Owns these quantities, which all describe the current state. Does not know tasks or motions.
"""

from __future__ import annotations

from collections.abc import Collection

import mujoco
import numpy as np

from envs.libero.simulator import Simulator

#: Distance in metres between the points on the surface of a box.
_SPACING = 0.012
_AT_REST = 0.03  # m/s, sum over both fingers


class World:
    """The current state of `simulator`, for scripted motions. Positions are in metres in the world frame."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.model, self.data = simulator.model, simulator.data
        self.bodies: dict[str, int] = dict(simulator.env.obj_body_id)  # objects and furniture -> root body
        self._grip = self.model.site("gripper0_grip_site").id
        fingers = [self.model.body(f"gripper0_{side}finger").id for side in ("left", "right")]
        self._fingers = [self._geoms(finger) for finger in fingers]
        joints = [self.model.joint(f"gripper0_finger_joint{i}") for i in (1, 2)]
        self._finger_qpos = [joint.qposadr[0] for joint in joints]
        self._finger_qvel = [joint.dofadr[0] for joint in joints]
        self._solids = {name: set(self._geoms(root)) for name, root in self.bodies.items()}
        self._shapes = {name: self._shape(geoms) for name, geoms in self._solids.items()}

    @property
    def hand(self) -> np.ndarray:
        """Position [3] between the fingertips (a copy)."""
        return self.data.site_xpos[self._grip].copy()

    @property
    def rotation(self) -> np.ndarray:
        """Orientation [3, 3] of the hand: the columns are the axis along which the fingers open, their cross product,
        and the direction in which the hand points."""
        return self.data.site_xmat[self._grip].reshape(3, 3)

    @property
    def yaw(self) -> float:
        """Angle in radians from the world's y axis to the axis along which the fingers open."""
        x, y = self.rotation[:2, 0]
        return float(np.arctan2(-x, y))

    @property
    def opening(self) -> float:
        """Distance between the fingers in metres, 0 to 0.08."""
        return float(np.abs(self.data.qpos[self._finger_qpos]).sum())

    @property
    def at_rest(self) -> bool:
        """Whether the fingers have stopped relative to the hand."""
        return bool(np.abs(self.data.qvel[self._finger_qvel]).sum() < _AT_REST)

    def origin(self, name: str) -> np.ndarray:
        """Position [3] of the origin of an object's or a piece of furniture's root body."""
        return self.data.xpos[self.bodies[name]].copy()

    def site(self, name: str) -> np.ndarray:
        """Position [3] of a site, e.g. the centre of a region of the task."""
        return self.data.site(name).xpos.copy()

    def angle(self, joint: str) -> float:
        """Position of a hinge in radians, or of a slide in metres."""
        return float(self.data.qpos[self.model.joint(joint).qposadr[0]])

    def points(self, name: str) -> np.ndarray:
        """Points [n, 3] on the collision geoms of an object or a piece of furniture."""
        found = [
            self.data.xpos[body] + points @ self.data.xmat[body].reshape(3, 3).T
            for body, points in self._shapes[name].items()
        ]
        return np.concatenate(found) if found else np.zeros((0, 3))

    def box(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner of the axis-aligned box around an object."""
        points = self.points(name)
        return points.min(0), points.max(0)

    def centre(self, name: str) -> np.ndarray:
        """Centre [3] of `box`."""
        low, high = self.box(name)
        return (low + high) / 2

    def clutter(self, without: Collection[str], near: np.ndarray, radius: float) -> np.ndarray:
        """Points [n, 3] on everything except `without` in a vertical cylinder around `near`."""
        points = np.concatenate([self.points(name) for name in self.bodies if name not in without])
        return points[np.linalg.norm(points[:, :2] - near[:2], axis=1) < radius]

    def covered(self, name: str, radius: float) -> bool:
        """Whether something is above an object, within `radius` of its centre."""
        return bool((self.clutter([name], self.centre(name), radius)[:, 2] > self.box(name)[1][2]).any())

    def geom_points(self, geom: int) -> np.ndarray:
        """Points [n, 3] on one collision geom."""
        ((body, points),) = self._shape([geom]).items()
        return self.data.xpos[body] + points @ self.data.xmat[body].reshape(3, 3).T

    def geoms(self, body: str) -> list[int]:
        """The collision geoms of a body and its children."""
        return self._geoms(self.model.body(body).id)

    def touching(self, geoms: Collection[int]) -> int:
        """Number of fingers, 0 to 2, that touch one of `geoms`."""
        pairs = self.data.contact.geom.tolist()
        touched = {a if b in geoms else b for a, b in pairs if (a in geoms) != (b in geoms)}
        return sum(not touched.isdisjoint(finger) for finger in self._fingers)

    def gripped(self, geoms: Collection[int]) -> bool:
        """Whether both fingers touch one of `geoms` and have stopped closing."""
        return self.at_rest and self.touching(geoms) == 2

    def held(self, name: str) -> bool:
        """Whether an object is gripped."""
        return self.gripped(self._solids[name])

    def touched(self, name: str) -> bool:
        """Whether a finger touches an object."""
        return self.touching(self._solids[name]) > 0

    def _geoms(self, root: int) -> list[int]:
        """The collision geoms of the body `root` and its children."""
        model, found = self.model, []
        for geom in range(model.ngeom):
            body = model.geom_bodyid[geom]
            while body not in (0, root):
                body = model.body_parentid[body]
            if body == root and (model.geom_contype[geom] or model.geom_conaffinity[geom]):
                found.append(geom)
        return found

    def _shape(self, geoms: Collection[int]) -> dict[int, np.ndarray]:
        """Body -> points [n, 3] on its geoms in its frame."""
        model = self.model
        found: dict[int, list[np.ndarray]] = {}
        for geom in geoms:
            rotation = np.zeros(9)
            mujoco.mju_quat2Mat(rotation, model.geom_quat[geom])
            points = model.geom_pos[geom] + _surface(model, geom) @ rotation.reshape(3, 3).T
            found.setdefault(int(model.geom_bodyid[geom]), []).append(points)
        return {body: np.concatenate(parts) for body, parts in found.items()}


def _surface(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Points [n, 3] on the surface of a geom in its frame. Shapes other than boxes and cylinders are treated as
    boxes."""
    size = model.geom_size[geom]
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CYLINDER:
        angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        circle = size[0] * np.stack([np.cos(angles), np.sin(angles)], 1)
        return np.concatenate([np.column_stack([circle, np.full(16, end * size[1])]) for end in (-1, 1)])
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_SPHERE:
        size = np.repeat(size[:1], 3)
    axes = [np.linspace(-half, half, max(2, int(np.ceil(2 * half / _SPACING)) + 1)) for half in size]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return grid[np.isclose(np.abs(grid), size).any(1)]
