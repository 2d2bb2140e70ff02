"""The simulated world: a MuJoCo model and its state, which Cartesian actions control.

Owns physics stepping, the hand's commanded pose, contacts and snapshots. Does not know tasks, instructions, rewards,
images or Gymnasium.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np

from envs.arm import ELBOW_UP, FINGER_TRAVEL, FINGERS, KV_OVER_KP, TCP, add_arm
from envs.ik import ArmIK, matrix_to_rpy
from envs.scene import HALF, HAND_BOX, SUBSTEPS, TIMESTEP, add_objects, add_table, base_spec, dress

TRANSLATION = 0.025  # metres per control step at an action of 1
ROTATION = 0.15  # radians per control step at an action of 1
RPY_LIMIT = np.array([0.5, 0.5, 1.5])  # radians
# Maximum difference between the commanded and the actual pose (metres, radians) before an action is added to the
# command. It is enough to press and push, but limits how far the command runs ahead of a blocked hand.
_LEASH = np.array([0.012, 0.012, 0.012, 0.08, 0.08, 0.08])
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


class World:
    """The base scene with `n_objects` objects, and the furniture that `furnish(spec)` adds."""

    def __init__(self, n_objects: int, furnish: Callable[[mujoco.MjSpec], None]) -> None:
        spec = base_spec()
        add_arm(spec)
        add_table(spec)
        add_objects(spec, n_objects)
        furnish(spec)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.n_objects = n_objects
        self._ik = ArmIK()
        self._tcp = self.model.site(TCP).id
        self._fingers = tuple(self.model.geom(name).id for name in FINGERS)
        self._objects = [self.model.body(f"object{i}").id for i in range(n_objects)]
        self._target = np.zeros(6)  # commanded hand pose: x, y, z, roll, pitch, yaw
        self._q = ELBOW_UP.copy()  # joint angles of the commanded pose

    # State ------------------------------------------------------------------------------------------------------

    @property
    def hand(self) -> np.ndarray:
        """Position [3] of the tool centre point in metres (a view; copy it to keep it)."""
        return self.data.site_xpos[self._tcp]

    @property
    def rpy(self) -> np.ndarray:
        """Roll, pitch, yaw [3] of the hand in radians; zero if it points straight down."""
        return matrix_to_rpy(self.data.site_xmat[self._tcp].reshape(3, 3))

    @property
    def opening(self) -> float:
        """Gripper opening: 1 open, 0 closed."""
        return float(np.clip(self.data.qpos[6:8].mean() / FINGER_TRAVEL, 0.0, 1.0))

    @property
    def hand_speed(self) -> float:
        """Speed of the hand in the world frame in m/s."""
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(self.model, self.data, mujoco.mjtObj.mjOBJ_SITE, self._tcp, velocity, 0)
        return float(np.linalg.norm(velocity[3:]))

    def object_pos(self, i: int) -> np.ndarray:
        """Position [3] of the centre of object `i` in metres (a view)."""
        return self.data.xpos[self._objects[i]]

    def object_speed(self, i: int) -> float:
        """Speed of object `i` in m/s."""
        start = self.model.joint(f"object{i}").dofadr[0]
        return float(np.linalg.norm(self.data.qvel[start : start + 3]))

    def gripped(self, geom: str) -> bool:
        """Whether both fingers touch the geom called `geom`."""
        return len(self._touching(geom)) == 2

    def touched(self, geom: str) -> bool:
        """Whether a finger touches the geom called `geom`."""
        return len(self._touching(geom)) > 0

    def _touching(self, geom: str) -> set[int]:
        pairs = self.data.contact.geom
        it = self.model.geom(geom).id
        return {int(a if b == it else b) for a, b in pairs if it in (a, b)} & set(self._fingers)

    # Change -----------------------------------------------------------------------------------------------------

    def clear(self, hand: np.ndarray) -> None:
        """Reset all bodies to their compiled poses, with an open gripper and the hand at `hand` [3], pointing down."""
        mujoco.mj_resetData(self.model, self.data)
        self._target = np.concatenate([hand, np.zeros(3)])
        # The initial guess turns the base towards the hand. With it, the solver always finds the elbow-up branch.
        start = ELBOW_UP.copy()
        start[0] = np.arctan2(hand[1], hand[0])
        start[5] = -start[0]
        self._q = self._ik.solve(self._target[:3], self._target[3:], start, iterations=60)
        self.data.qpos[:6] = self._q
        self.data.qpos[6:8] = FINGER_TRAVEL
        self.data.ctrl[:6] = self._q
        self.data.ctrl[6] = FINGER_TRAVEL

    def put_object(self, i: int, color: str, shape: str, xy: np.ndarray, yaw: float) -> None:
        """Place object `i` on the table at `xy` [2] metres, rotated by `yaw` radians."""
        dress(self.model, i, color, shape)
        joint = self.data.joint(f"object{i}")
        joint.qpos[:] = (xy[0], xy[1], HALF, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))

    def settle(self, steps: int = 5) -> None:
        """Let contacts settle, then update all quantities derived from the state."""
        mujoco.mj_step(self.model, self.data, steps)
        mujoco.mj_forward(self.model, self.data)

    def move(self, action: np.ndarray) -> None:
        """Execute one action [7] in [-1, 1] for one control period (50 ms)."""
        pose = np.concatenate([self.hand, self.rpy])
        target = np.clip(self._target, pose - _LEASH, pose + _LEASH)
        target[:3] = np.clip(target[:3] + TRANSLATION * action[:3], *HAND_BOX)
        target[3:] = np.clip(target[3:] + ROTATION * action[3:6], -RPY_LIMIT, RPY_LIMIT)
        self._target = target
        before, self._q = self._q, self._ik.solve(target[:3], target[3:], self._q)
        velocity = (self._q - before) / (SUBSTEPS * TIMESTEP)
        ctrl = self.data.ctrl
        ctrl[6] = FINGER_TRAVEL if action[6] >= 0 else 0.0
        for i in range(1, SUBSTEPS + 1):
            # Linear interpolation in joint space. The velocity term cancels the servo's damping and therefore its lag.
            ctrl[:6] = before + (self._q - before) * (i / SUBSTEPS) + KV_OVER_KP * velocity
            mujoco.mj_step(self.model, self.data)
        ctrl[:6] = self._q
        mujoco.mj_forward(self.model, self.data)  # without this call, the kinematics lag one substep behind the state

    # Snapshots --------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, np.ndarray]:
        """A snapshot of the simulation state, without shapes, colours, furniture and light: the model has these."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, physics, _STATE)
        return {"physics": physics, "target": self._target.copy(), "q": self._q.copy()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Restore a snapshot of `get_state`."""
        physics = np.asarray(state["physics"], dtype=np.float64)
        self._target, self._q = np.array(state["target"]), np.array(state["q"])
        mujoco.mj_setState(self.model, self.data, physics, _STATE)
        mujoco.mj_forward(self.model, self.data)
        # mj_forward changed the solver's warm start. Restore it, so that the simulation is reproducible bit for bit.
        mujoco.mj_setState(self.model, self.data, physics, _STATE)
