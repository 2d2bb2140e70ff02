"""The safety filter between a policy and a robot.

Owns: the limits of a command, the emergency stop, and the count of interventions by reason. Commands are finite, and
the policy's actions are clipped to the range and the configured limits; after a fault, the command is the hold command.
A hold or a limit may keep a position-controlled robot outside the range of the policy's actions. It does not know where
actions come from, or how faults of observations are detected (`observation_monitor`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from vla.config import SafetyConfig
from vla.errors import ConfigError, unknown
from vla.spec import RobotSpec


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, float32 [D], and the reasons why it differs from the policy's action (empty if it does not)."""

    action: np.ndarray
    reasons: tuple[str, ...] = ()


class SafetyFilter:
    """Turns the policy's actions into safe commands.

    For position actions, velocity is the change between two commands.

    Args:
        low, high: range of each command dimension, float [D], in the robot's units.
        hz: commands per second; None: `spec.control_hz`.
    Attributes:
        interventions: reason -> count.
        stopped: whether the emergency stop is pressed.
    """

    def __init__(
        self, spec: RobotSpec, config: SafetyConfig, low: np.ndarray, high: np.ndarray, hz: float | None = None
    ) -> None:
        if np.shape(low) != (spec.action_dim,) or np.shape(high) != (spec.action_dim,) or not (low <= high).all():
            raise ConfigError(f"safety needs limits low <= high for each of {', '.join(spec.action_names)}.")
        _check_hold(spec)
        self._spec, self._config = spec, config
        self._low, self._high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        period = 1 / (hz or spec.control_hz)
        self._max_motion = period * self._per_entry("max_velocity", config.max_velocity)
        self._max_motion_change = period**2 * self._per_entry("max_acceleration", config.max_acceleration)
        self._walls = self._check_workspace(config.workspace)
        self._last: np.ndarray | None = None
        self._reference: np.ndarray | None = None  # position to hold until the first command
        self._motion = np.zeros(spec.action_dim, np.float32)  # motion of the last command, per period
        self.interventions: Counter[str] = Counter()
        self.stopped = False

    def emergency_stop(self) -> None:
        """Press the emergency stop: the robot holds from the next command on, until `release`."""
        self.stopped = True

    def release(self) -> None:
        """Release the emergency stop."""
        self.stopped = False

    def forget(self) -> None:
        """Forget the last command, because the robot was moved (a simulation was reset)."""
        self._last = None

    def begin(self, state: np.ndarray | None = None, reference: np.ndarray | None = None) -> None:
        """Start from the robot's current position instead of its last command. The gripper keeps its last command,
        because it may hold an object.

        Args:
            state: finite state [S].
            reference: `Robot.hold_reference`, [D]; None: use the position in `state`.
        """
        self._reference = reference
        place, gripper = self._spec.hold_action(reference, state), self._spec.gripper_index
        if self._last is not None and gripper is not None:
            place[gripper] = self._last[gripper]
        if self._last is not None or not self._spec.action_space.relative:
            self._last = place
        self._motion = np.zeros(self._spec.action_dim, np.float32)

    def check(
        self,
        action: np.ndarray | None,
        fault: str | None = None,
        state: np.ndarray | None = None,
        entropy: float = 0.0,
        missing: str = "underrun",
    ) -> Command:
        """The command for this control step.

        Args:
            action: the policy's action [D]; None if no action is available for this step.
            fault: name of the latest observation's fault; None without a fault.
            state: the robot's state [S], for the workspace limits.
            entropy: mean entropy of the chunk's tokens, in nats.
            missing: the reason for the hold if `action` is None.
        """
        hold = "emergency stop" if self.stopped else fault or self._why_hold(action, entropy, missing)
        if hold is not None:
            command = Command(self.hold().action, (hold,))
        else:
            assert action is not None
            command = self._limited(np.asarray(action, np.float32), state)
        self.interventions.update(command.reasons)
        self._motion = self._moved(command.action)
        self._last = command.action
        return command

    def hold(self) -> Command:
        """The hold command, which also ends a run."""
        return Command(self._spec.hold_action(self._reference if self._last is None else self._last))

    def _why_hold(self, action: np.ndarray | None, entropy: float, missing: str) -> str | None:
        if action is None:
            return missing
        if np.shape(action) != (self._spec.action_dim,) or not np.isfinite(action).all():
            return "not finite"
        if self._config.max_entropy is not None and entropy > self._config.max_entropy:
            return "not confident"
        return None

    def _limited(self, action: np.ndarray, state: np.ndarray | None) -> Command:
        """Clip the action to the range, then apply the other limits, which move the command towards the last command, a
        standstill or the workspace."""
        reasons = []
        for reason, limit in (
            ("range", lambda command: np.clip(command, self._low, self._high)),
            ("jump", self._without_jump),
            ("velocity", self._slow),
            ("acceleration", self._smooth),
            ("workspace", lambda command: self._inside(command, state)),
        ):
            limited = limit(action)
            if (limited != action).any():
                reasons.append(reason)
            action = limited
        return Command(action, tuple(reasons))

    def _without_jump(self, command: np.ndarray) -> np.ndarray:
        """Limit the change from the last command to `max_change` times the range of each dimension, except for the
        gripper, which opens and closes in one step."""
        if self._last is None or self._config.max_change is None:
            return command
        step = self._config.max_change * (self._high - self._low)
        if self._spec.gripper_index is not None:
            step[self._spec.gripper_index] = np.inf
        return np.clip(command, self._last - step, self._last + step)

    def _slow(self, command: np.ndarray) -> np.ndarray:
        return self._with_motion(command, -self._max_motion, self._max_motion)

    def _smooth(self, command: np.ndarray) -> np.ndarray:
        change = self._max_motion_change
        return self._with_motion(command, self._motion - change, self._motion + change)

    def _with_motion(self, command: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Clip the motion per period of `command`. Entries that are not clipped keep their exact values."""
        motion = self._moved(command)
        clipped = np.clip(motion, low, high)
        origin = np.zeros_like(command) if self._spec.action_space.relative or self._last is None else self._last
        return np.where(clipped == motion, command, origin + clipped).astype(np.float32)

    def _moved(self, command: np.ndarray) -> np.ndarray:
        if self._spec.action_space.relative:
            return command
        return np.zeros_like(command) if self._last is None else command - self._last

    def _inside(self, command: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Keep the robot in its workspace: outward deltas at a boundary become zero, positions are clipped."""
        command = command.copy()
        for entry, place, low, high in self._walls:
            if not self._spec.action_space.relative:
                command[entry] = np.clip(command[entry], low, high)
            elif state is not None:
                outward = (state[place] <= low and command[entry] < 0) or (state[place] >= high and command[entry] > 0)
                command[entry] = 0.0 if outward else command[entry]
        return command

    def _per_entry(self, name: str, limits: dict[str, float]) -> np.ndarray:
        """Limits of all action dimensions, float [D]; infinite by default."""
        found = np.full(self._spec.action_dim, np.inf, np.float32)
        for entry, limit in limits.items():
            found[self._entry(name, entry)] = limit
            if not limit > 0:
                raise ConfigError(f"safety.{name}: {entry} must be positive, got {limit}.")
        return found

    def _entry(self, name: str, entry: str) -> int:
        if entry not in self._spec.action_names:
            raise ConfigError(f"safety.{name}: {unknown('action entry', entry, self._spec.action_names)}")
        return self._spec.action_names.index(entry)

    def _check_workspace(self, workspace: dict[str, tuple[str, float, float]]) -> list[tuple[int, int, float, float]]:
        """(index in the action, index in the state, lowest, highest) of each workspace limit."""
        walls = []
        for entry, (name, low, high) in workspace.items():
            if name not in self._spec.state_names:
                raise ConfigError(f"safety.workspace: {unknown('state entry', name, self._spec.state_names)}")
            if not low < high:
                raise ConfigError(f"safety.workspace: {entry} must have low < high, got {low} and {high}.")
            walls.append((self._entry("workspace", entry), self._spec.state_names.index(name), low, high))
        return walls


def _check_hold(spec: RobotSpec) -> None:
    """Raise ConfigError if the robot's hold command is unknown or would move it."""
    if spec.action_space == "unspecified" and not spec.hold:
        raise ConfigError(
            "the robot's action_space is unspecified and it has no hold command, so it cannot be stopped. Set its "
            'action_space ("joint_position", "ee_delta", ...) or hold command; for an environment, in adapter.robot.'
        )
    gripper = None if spec.gripper_index is None else spec.action_names[spec.gripper_index]
    moving = [n for n, v in zip(spec.action_names, spec.hold, strict=False) if v != 0 and n != gripper]
    if spec.action_space.relative and moving:
        raise ConfigError(
            f"the robot's actions are {spec.action_space}, so its hold command would keep it moving: "
            f"{', '.join(moving)} must be 0 in the hold command."
        )
