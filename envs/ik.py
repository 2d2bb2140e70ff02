"""Inverse kinematics by damped least squares: six joint angles for a hand pose.

Owns a private copy of the arm's kinematics. Does not know the world, the current state or the action space.
"""

from __future__ import annotations

import mujoco
import numpy as np

from envs.arm import ELBOW_UP, TCP, add_arm

_DAMPING = 1e-6 * np.eye(6)
_TOLERANCE = 2e-4  # metres and radians


def rpy_to_matrix(rpy: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of roll, pitch, yaw in radians (about the fixed x, then y, then z axis)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def matrix_to_rpy(matrix: np.ndarray) -> np.ndarray:
    """Inverse of `rpy_to_matrix` for |pitch| < pi/2."""
    pitch = np.arcsin(np.clip(-matrix[2, 0], -1.0, 1.0))
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])])


class ArmIK:
    """Inverse kinematics of the tool centre point of the arm in `arm.py`."""

    def __init__(self) -> None:
        spec = mujoco.MjSpec()
        spec.compiler.degree = False
        add_arm(spec)
        self._model = spec.compile()
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site(TCP).id
        self._jac = np.zeros((6, self._model.nv))

    def solve(self, pos: np.ndarray, rpy: np.ndarray, start: np.ndarray = ELBOW_UP, iterations: int = 6) -> np.ndarray:
        """Joint angles [6] in radians for which the hand is at `pos` [3] metres with orientation `rpy` [3] radians.

        Deterministic: the result depends on the arguments only. The initial guess `start` [6] selects the branch, and
        small steps from it converge quickly.
        """
        model, data, jac = self._model, self._data, self._jac
        goal = rpy_to_matrix(rpy)
        q = np.array(start, dtype=np.float64)
        error = np.empty(6)
        lower, upper = model.jnt_range[:6, 0], model.jnt_range[:6, 1]
        for _ in range(iterations):
            data.qpos[:6] = q
            mujoco.mj_kinematics(model, data)
            now = data.site_xmat[self._site].reshape(3, 3)
            rest = goal @ now.T  # for small angles, its antisymmetric part is the rotation vector
            error[:3] = pos - data.site_xpos[self._site]
            error[3:] = (rest[2, 1] - rest[1, 2], rest[0, 2] - rest[2, 0], rest[1, 0] - rest[0, 1])
            error[3:] /= 2
            if np.abs(error).max() < _TOLERANCE:
                break
            mujoco.mj_comPos(model, data)  # computes the motion axes that the Jacobian needs
            mujoco.mj_jacSite(model, data, jac[:3], jac[3:], self._site)
            j = jac[:, :6]
            q += j.T @ np.linalg.solve(j @ j.T + _DAMPING, error)
            np.clip(q, lower, upper, out=q)
        return q
