"""RobotSpec: what a robot sees, feels and is told.

Owns: the names and conventions of one robot (cameras, state and action entries, gripper polarity, control rate, hold
command) and the checks of an observation or an action against them. It does not know how actions become tokens, where
observations come from, or which policy uses them.

An *observation* is everywhere the Gymnasium convention
`{"pixels": {camera: uint8 [height, width, 3] RGB}, "agent_pos": float32 [S]}`; `agent_pos` is absent when S = 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla.errors import SpecError, unknown

Observation = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """The contract between a robot and everything that controls it.

    Attributes:
        cameras: camera names, in the order in which a policy sees them.
        state_names: one name per entry of `agent_pos`; empty for a robot without proprioception.
        action_names: one name per entry of an action.
        action_space: what an action means, e.g. "ee_delta" (end-effector deltas) or "joint_position".
        gripper_index: entry of the action that drives the gripper; None without a gripper.
        gripper_open: value of that entry which opens it (polarity is not standard between robots: it is stated).
        gripper_closed: value of that entry which closes it.
        control_hz: actions per second.
        hold: the command that keeps the robot where it is: a number per entry, or None to repeat that entry of the
            last command. Empty: positions are repeated; of deltas and velocities only the gripper's is, the rest is 0.
    """

    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_space: str = "unspecified"
    gripper_index: int | None = None
    gripper_open: float = 1.0
    gripper_closed: float = -1.0
    control_hz: float = 10.0
    hold: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for field in ("cameras", "state_names", "action_names", "hold"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.action_names:
            raise SpecError("a robot needs at least one action entry; action_names is empty.")
        if not self.control_hz > 0:
            raise SpecError(f"control_hz must be positive, got {self.control_hz}.")
        if self.hold and len(self.hold) != self.action_dim:
            raise SpecError(f"hold has {len(self.hold)} entries for {self.action_dim} action entries.")
        if self.gripper_index is not None and not -self.action_dim <= self.gripper_index < self.action_dim:
            raise SpecError(f"gripper_index {self.gripper_index} is outside an action of {self.action_dim} entries.")

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RobotSpec:
        """Inverse of `to_dict`; unknown keys are an error (SpecError)."""
        valid = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in valid:
                raise SpecError(unknown("robot property", key, valid))
        missing = {"cameras", "state_names", "action_names"} - set(values)
        if missing:
            raise SpecError(f"a robot description needs {', '.join(sorted(missing))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def moves(self) -> bool:
        """Whether actions say how far or how fast to move (deltas, velocities), not where to be."""
        return self.action_space.endswith(("delta", "velocity"))

    def hold_action(self, last: np.ndarray | None, state: np.ndarray | None = None) -> np.ndarray:
        """The hold command, float32 [D].

        Args:
            last: the last command. Before the first one, what is to be repeated is the state's entry of the same name
                where actions are positions; the gripper is open, and the rest 0.
            state: `agent_pos` [S].
        """
        if last is None:
            repeat = np.zeros(self.action_dim, np.float32)
            if self.gripper_index is not None:
                repeat[self.gripper_index] = self.gripper_open
            if state is not None and not self.moves:
                for index, name in enumerate(self.action_names):
                    if name in self.state_names:
                        repeat[index] = state[self.state_names.index(name)]
        else:
            repeat = np.asarray(last, np.float32)
        rest = 0.0 if self.moves else None
        hold: Sequence[float | None] = self.hold or [rest] * self.action_dim
        if not self.hold and self.gripper_index is not None:
            hold = [*hold]
            hold[self.gripper_index] = None
        return np.array([repeat[i] if value is None else value for i, value in enumerate(hold)], np.float32)

    def check_observation(self, observation: Observation) -> None:
        """Raise SpecError unless `observation` has every camera as uint8 HWC RGB and a finite state of its size."""
        if not isinstance(observation, Mapping) or "pixels" not in observation:
            keys = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
            raise SpecError(f'an observation is {{"pixels": {{camera: image}}, "agent_pos": state}}; got {keys}.')
        pixels = observation["pixels"]
        if not isinstance(pixels, Mapping):
            raise SpecError(
                f'observation["pixels"] must be {{camera: image}}, got {type(pixels).__name__}; for one camera write '
                f'{{"pixels": {{"{self.cameras[0] if self.cameras else "camera"}": image}}}}.'
            )
        for camera in self.cameras:
            if camera not in pixels:
                raise SpecError(
                    unknown("camera", camera, pixels, "The policy needs it: map it in the adapter's `images`.")
                    if pixels
                    else f"the observation has no camera image; {camera!r} is needed."
                )
            check_image(pixels[camera], camera)
        if self.state_dim:
            state = observation.get("agent_pos")
            if state is None:
                raise SpecError(f'the observation has no "agent_pos"; {self.state_dim} entries are expected.')
            check_vector(state, self.state_names, "state")

    def check_action(self, action: np.ndarray) -> None:
        """Raise SpecError unless `action` is a finite vector of `action_dim` entries."""
        check_vector(action, self.action_names, "action")


def check_image(image: Any, camera: str) -> None:
    """Raise SpecError unless `image` is uint8 [height, width, 3]; says what to do where the mistake can be told."""
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or len(shape) != 3:
        raise SpecError(f"camera {camera!r}: expected an image [height, width, 3], got shape {shape}.")
    if shape[-1] != 3:
        fix = "It looks channels-first: transpose it with image.transpose(1, 2, 0)." if shape[0] == 3 else ""
        fix = "It has an alpha channel: drop it with image[..., :3]." if shape[-1] == 4 else fix
        raise SpecError(f"camera {camera!r}: expected 3 colour channels last, got shape {tuple(shape)}. {fix}".rstrip())
    if str(dtype) not in ("uint8", "torch.uint8"):
        raise SpecError(f"camera {camera!r}: expected uint8 in 0..255, got {dtype}. Scale and convert it first.")
    if min(shape[:2]) < 8:
        raise SpecError(f"camera {camera!r}: an image of {shape[0]} x {shape[1]} is too small to be a camera's.")


def check_vector(vector: Any, names: Sequence[str], what: str) -> None:
    """Raise SpecError unless `vector` is one finite number per name."""
    values = np.asarray(vector)
    if values.shape != (len(names),):
        raise SpecError(f"{what}: expected {len(names)} entries ({', '.join(names)}), got shape {values.shape}.")
    if not np.isfinite(values).all():
        bad = [f"{name}={value}" for name, value in zip(names, values, strict=True) if not np.isfinite(value)]
        raise SpecError(f"{what}: not finite: {', '.join(bad)}.")
