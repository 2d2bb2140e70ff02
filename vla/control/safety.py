"""What stands between a policy and a robot.

Owns: the limits of a command, the emergency stop, and the count of every intervention with its reason. Whatever comes
in, what goes out is finite, in range, no jump, and not the answer to something the robot saw long ago. It does not know
where actions come from.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from vla.config import SafetyConfig
from vla.errors import ConfigError
from vla.spec import RobotSpec


class SafetyFilter:
    """Turns what the policy wants into what the robot is told.

    Args:
        low, high: per entry, float [D], the range of commands in the robot's units.
    Attributes:
        interventions: reason -> count.
        stopped: the emergency stop is pressed; it stays until `reset`.
    """

    def __init__(self, spec: RobotSpec, config: SafetyConfig, low: np.ndarray, high: np.ndarray) -> None:
        if np.shape(low) != (spec.action_dim,) or np.shape(high) != (spec.action_dim,) or not (low <= high).all():
            raise ConfigError(f"safety needs a low and a high limit for each of {', '.join(spec.action_names)}.")
        self._spec, self._config = spec, config
        self._low, self._high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        self._last: np.ndarray | None = None
        self.interventions: Counter[str] = Counter()
        self.stopped = False

    def emergency_stop(self) -> None:
        """From the next command on the robot holds."""
        self.stopped = True

    def reset(self) -> None:
        """Release the emergency stop and forget the last command (not the counts)."""
        self.stopped, self._last = False, None

    def check(
        self, action: np.ndarray | None, age_s: float, entropy: float = 0.0, missing: str = "underrun"
    ) -> np.ndarray:
        """The command for this tick, float32 [D].

        Args:
            action: what the policy wants; None when it has nothing to say.
            age_s: seconds since the observation that the robot last gave.
            entropy: mean entropy of the chunk's tokens, in nats.
            missing: the reason to count where `action` is None.
        """
        reason = self._why_hold(action, age_s, entropy, missing)
        if reason is not None:
            self.interventions[reason] += 1
            command = self._spec.hold_action(self._last)
        else:
            assert action is not None
            command = np.clip(np.asarray(action, np.float32), self._low, self._high)
            if (command != action).any():
                self.interventions["range"] += 1
            command = self._without_jump(command)
        self._last = command
        return command

    def _why_hold(self, action: np.ndarray | None, age_s: float, entropy: float, missing: str) -> str | None:
        if self.stopped:
            return "emergency stop"
        if age_s > self._config.max_age_s:
            return "stale observation"
        if action is None:
            return missing
        if np.shape(action) != (self._spec.action_dim,) or not np.isfinite(action).all():
            return "not finite"
        if self._config.max_entropy is not None and entropy > self._config.max_entropy:
            return "not confident"
        return None

    def _without_jump(self, command: np.ndarray) -> np.ndarray:
        """At most `max_change` of an entry's range away from the last command; grippers open and close at once."""
        if self._last is None or self._config.max_change is None:
            return command
        step = self._config.max_change * (self._high - self._low)
        if self._spec.gripper_index is not None:
            step[self._spec.gripper_index] = np.inf
        limited = np.clip(command, self._last - step, self._last + step)
        if (limited != command).any():
            self.interventions["jump"] += 1
        return limited
