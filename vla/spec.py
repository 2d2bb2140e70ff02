"""RobotSpec: the observations, actions and conventions of a robot.

Owns: the names and conventions of a robot (cameras, state and action entries, gripper polarity, control rate, hold
command), validation of observations and actions, and the compatibility check of two robots. It does not know action
tokens, policies or the source of observations.

An observation is `{"pixels": {camera: uint8 [height, width, 3] RGB}, "agent_pos": float32 [S]}`, without `agent_pos` if
S = 0.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vla.errors import SpecError, unknown

Observation = Mapping[str, Any]


class ActionSpace(enum.StrEnum):
    """The meaning of an action's entries.

    Unambiguous names of other packages are accepted (`_SPELLINGS`): `ActionSpace("delta_ee")` is `EE_DELTA`. All other
    names raise SpecError, because a wrong guess would be dangerous: repeating a command holds a robot in a position
    space, but keeps it moving in a relative space.
    """

    JOINT_POSITION = "joint_position"
    JOINT_DELTA = "joint_delta"
    JOINT_VELOCITY = "joint_velocity"
    EE_POSITION = "ee_position"  # end-effector position, optionally with orientation
    EE_DELTA = "ee_delta"
    EE_VELOCITY = "ee_velocity"
    UNSPECIFIED = "unspecified"  # the robot must define its hold command

    @property
    def relative(self) -> bool:
        """Whether actions are deltas or velocities (0 holds the robot) instead of positions (repeating the last command
        holds it)."""
        return self in (self.JOINT_DELTA, self.JOINT_VELOCITY, self.EE_DELTA, self.EE_VELOCITY)

    @classmethod
    def _missing_(cls, value: object) -> ActionSpace:
        for member, spellings in _SPELLINGS.items():
            if value in spellings:
                return cls(member)
        fix = 'If none of these applies, use "unspecified", and define the robot\'s `hold` command.'
        raise SpecError(unknown("action space", value, cls, fix))


#: Names in other packages. Ambiguous names are omitted: "eef_pos" (deltas in Open X-Embodiment, positions elsewhere),
#: and names that do not distinguish delta from position ("ee", "joint", "osc_pose").
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "joint_position": ("joint_positions", "joint_pos", "pd_joint_pos", "absolute_joint_position"),
    "joint_delta": (
        "delta_joint",
        "joint_delta_position",
        "joint_position_delta",
        "delta_joint_position",
        "relative_joint_position",
        "pd_joint_delta_pos",
    ),
    "joint_velocity": ("joint_velocities", "joint_vel", "pd_joint_vel"),
    "ee_position": ("ee_pose", "eef_pose", "eef_position", "cartesian_position", "pd_ee_pose", "absolute_ee_pose"),
    "ee_delta": (
        "delta_ee",
        "ee_delta_pose",
        "ee_delta_position",
        "ee_pose_delta",
        "ee_position_delta",
        "delta_ee_pose",
        "delta_ee_position",
        "relative_ee_pose",
        "relative_ee_position",
        "eef_delta",
        "delta_eef",
        "eef_delta_pose",
        "delta_eef_pose",
        "cartesian_delta",
        "delta_cartesian",
        "pd_ee_delta_pos",
        "pd_ee_delta_pose",
    ),
    "ee_velocity": ("ee_vel", "ee_twist", "twist", "eef_velocity", "eef_vel", "cartesian_velocity"),
}


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """The observations, actions and conventions of a robot.

    Attributes:
        cameras: camera names, in the order of the policy's inputs.
        state_names: one name per entry of `agent_pos`; empty without a state.
        action_names: one name per entry of an action.
        action_space: meaning of an action: "ee_delta" (end-effector deltas), "joint_position", ...; see `ActionSpace`.
        gripper_index: index of the gripper command in an action; None without a gripper.
        gripper_open: gripper command that opens the gripper.
        gripper_closed: gripper command that closes the gripper.
        control_hz: actions per second.
        hold: the command that keeps the robot in place, one value per entry; None repeats the entry of the last
            command. Empty: in a position space, repeat the last command; in a relative space, 0, but repeat the gripper
            command.
    """

    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_space: ActionSpace = ActionSpace.UNSPECIFIED
    gripper_index: int | None = None
    gripper_open: float = 1.0
    gripper_closed: float = -1.0
    control_hz: float = 10.0
    hold: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for field in ("cameras", "state_names", "action_names", "hold"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "action_space", ActionSpace(self.action_space))
        if not self.action_names:
            raise SpecError("action_names is empty; a robot needs at least one action entry.")
        if not 0 < self.control_hz < math.inf:
            raise SpecError(f"control_hz must be positive, got {self.control_hz}.")
        if self.hold and len(self.hold) != self.action_dim:
            raise SpecError(f"hold must have one entry per action entry ({self.action_dim}), got {len(self.hold)}.")
        if not all(value is None or math.isfinite(value) for value in self.hold):
            raise SpecError(f"hold entries must be finite, or None to repeat the last one, got {list(self.hold)}.")
        if self.gripper_index is not None and not -self.action_dim <= self.gripper_index < self.action_dim:
            raise SpecError(f"gripper_index {self.gripper_index} is out of range for {self.action_dim} action entries.")

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RobotSpec:
        """Inverse of `to_dict`. SpecError if keys are unknown or missing."""
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
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return values | {"action_space": self.action_space.value}

    def check_fits(
        self,
        robot: RobotSpec,
        name: str = "the robot",
        ours: str = "the policy",
        tolerated: Collection[str] = (),
    ) -> None:
        """Raise SpecError if actions or observations have another meaning on `robot`.

        Args:
            robot: RobotSpec of a robot, environment or recording.
            name: name of `robot` in messages.
            ours: name of this RobotSpec's owner in messages.
            tolerated: differences that only cause a warning: "names" (entries are matched by position), "rate".
        """
        for kind, message in self._differences(robot, name, ours):
            if kind not in tolerated:
                raise SpecError(message)
            warnings.warn(message, stacklevel=2)

    def _differences(self, robot: RobotSpec, name: str, ours: str) -> Iterator[tuple[str, str]]:
        """Incompatibilities as (kind, message), the most severe first."""
        if missing := [camera for camera in self.cameras if camera not in robot.cameras]:
            yield (
                "cameras",
                f"{ours} needs camera {', '.join(map(repr, missing))}, {name} has "
                f"{', '.join(map(repr, robot.cameras)) or 'none'}. Map it in the adapter's "
                f"`images: {{{missing[0]}: <path>}}`, or give it that name in the robot's driver.",
            )
        fix = "Correct the names in the robot's RobotSpec (for an environment: adapter.robot)."
        for what in ("action", "state"):
            mine, its = getattr(self, f"{what}_names"), getattr(robot, f"{what}_names")
            if mine == its or (what == "state" and not mine):
                continue
            said = f"{ours}'s {what} has {len(mine)} entries ({', '.join(mine)}), {name} has {len(its)}"
            said += f" ({', '.join(its)})."
            if len(mine) != len(its):
                yield "size", f"{said} They are different robots."
            elif sorted(mine) == sorted(its):
                yield "order", f"{said} The order differs, but entries are matched by position. {fix}"
            else:
                yield "names", f"{said} The names differ; entries are matched by position. {fix}"
        spaces = self.action_space, robot.action_space
        if ActionSpace.UNSPECIFIED not in spaces and spaces[0] != spaces[1]:
            yield (
                "action space",
                f"{ours}'s actions are {spaces[0]}, those of {name} are {spaces[1]}. Correct action_space in the "
                "robot's RobotSpec (for an environment: adapter.robot).",
            )
        if self.gripper_index is not None and robot.gripper_index is not None:
            yield from self._gripper_differences(robot, name, ours)
        if not math.isclose(self.control_hz, robot.control_hz, rel_tol=0.01):  # 29.97 is 30
            yield (
                "rate",
                f"{ours} runs at {self.control_hz:g} actions per second, {name} at {robot.control_hz:g}, so an action "
                f"may cause a different motion. Correct control_hz in the robot's RobotSpec (for an environment: "
                f"adapter.robot), or run the control loop at {self.control_hz:g} Hz (`vla deploy --hz "
                f"{self.control_hz:g}`).",
            )

    def _gripper_differences(self, robot: RobotSpec, name: str, ours: str) -> Iterator[tuple[str, str]]:
        fix = "Correct them in the adapter's `robot` or in the driver's RobotSpec."
        entries = [(spec.gripper_index or 0) % spec.action_dim for spec in (self, robot)]
        mine, its = ((spec.gripper_open, spec.gripper_closed) for spec in (self, robot))
        if entries[0] != entries[1]:
            yield "gripper", f"{ours}'s gripper is action entry {entries[0]}, {name}'s is entry {entries[1]}. {fix}"
        if mine != its:
            yield (
                "gripper",
                f"{ours} opens its gripper with {mine[0]:g} and closes it with {mine[1]:g}, {name} with {its[0]:g} and "
                f"{its[1]:g}. {fix}",
            )

    def hold_action(self, last: np.ndarray | None, state: np.ndarray | None = None) -> np.ndarray:
        """The hold command, float32 [D].

        Args:
            last: the last command [D]. None: instead of repeating its entries, use the state entries with the same
                names in a position space, otherwise an open gripper and 0.
            state: `agent_pos` [S].
        """
        if last is None:
            repeat = np.zeros(self.action_dim, np.float32)
            if self.gripper_index is not None:
                repeat[self.gripper_index] = self.gripper_open
            if state is not None and not self.action_space.relative:
                for index, name in enumerate(self.action_names):
                    if name in self.state_names:
                        repeat[index] = state[self.state_names.index(name)]
        else:
            repeat = np.asarray(last, np.float32)
        rest = 0.0 if self.action_space.relative else None
        hold: Sequence[float | None] = self.hold or [rest] * self.action_dim
        if not self.hold and self.gripper_index is not None:
            hold = [*hold]
            hold[self.gripper_index] = None
        return np.array([repeat[i] if value is None else value for i, value in enumerate(hold)], np.float32)

    def check_observation(self, observation: Observation) -> None:
        """Raise SpecError if `observation` lacks a camera (uint8 RGB [H, W, 3]) or a finite state [S]."""
        if not isinstance(observation, Mapping) or "pixels" not in observation:
            keys = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
            raise SpecError(f'an observation must be {{"pixels": {{camera: image}}, "agent_pos": state}}, got {keys}.')
        pixels = observation["pixels"]
        if not isinstance(pixels, Mapping):
            raise SpecError(
                f'observation["pixels"] must be {{camera: image}}, got {type(pixels).__name__}; for one camera use '
                f'{{"pixels": {{"{self.cameras[0] if self.cameras else "camera"}": image}}}}.'
            )
        for camera in self.cameras:
            if camera not in pixels:
                raise SpecError(
                    unknown("camera", camera, pixels, "The policy needs it; map it in the adapter's `images`.")
                    if pixels
                    else f"the observation has no camera images; {camera!r} is required."
                )
            check_image(pixels[camera], camera)
        if self.state_dim:
            state = observation.get("agent_pos")
            if state is None:
                raise SpecError(f'the observation has no "agent_pos"; {self.state_dim} entries are expected.')
            check_vector(state, self.state_names, "state")

    def check_action(self, action: np.ndarray) -> None:
        """Raise SpecError if `action` is not a finite vector of `action_dim` entries."""
        check_vector(action, self.action_names, "action")


def check_image(image: Any, camera: str) -> None:
    """Raise SpecError if `image` is not uint8 [height, width, 3] with at least 8 x 8 pixels."""
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or len(shape) != 3:
        raise SpecError(f"camera {camera!r}: expected an image [height, width, 3], got shape {shape}.")
    if shape[-1] != 3:
        fix = "It looks channels-first: transpose it with image.transpose(1, 2, 0)." if shape[0] == 3 else ""
        fix = "It has an alpha channel: drop it with image[..., :3]." if shape[-1] == 4 else fix
        raise SpecError(f"camera {camera!r}: expected 3 colour channels last, got shape {tuple(shape)}. {fix}".rstrip())
    if str(dtype) not in ("uint8", "torch.uint8"):
        raise SpecError(f"camera {camera!r}: expected uint8 in 0..255, got {dtype}. Rescale and convert it first.")
    if min(shape[:2]) < 8:
        raise SpecError(f"camera {camera!r}: an image of {shape[0]} x {shape[1]} is too small; the minimum is 8 x 8.")


def check_vector(vector: Any, names: Sequence[str], what: str) -> None:
    """Raise SpecError if `vector` does not have one finite number per name."""
    values = np.asarray(vector)
    if values.shape != (len(names),):
        raise SpecError(f"{what}: expected {len(names)} entries ({', '.join(names)}), got shape {values.shape}.")
    if not np.isfinite(values).all():
        bad = [f"{name}={value}" for name, value in zip(names, values, strict=True) if not np.isfinite(value)]
        raise SpecError(f"{what}: not finite: {', '.join(bad)}.")
