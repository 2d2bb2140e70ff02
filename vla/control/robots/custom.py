"""Your own robot: `vla deploy --robot module:callable` (docs/robots.md).

Owns: its creation, and the check of its interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla.control.robot import EpisodicRobot, Robot, is_episodic
from vla.errors import ConfigError
from vla.spec import RobotSpec
from vla.support import plugins


def make(source: str, arguments: Mapping[str, Any]) -> Robot | EpisodicRobot:
    """Call "module:callable" with `arguments`. ConfigError if that fails or does not return a `Robot`."""
    try:
        maker = plugins.load(source)
    except Exception as error:
        raise ConfigError(
            f"cannot load robot {source!r}: {error}. Pass 'module:callable' with an installed module, or a module in "
            "the working directory."
        ) from error
    try:
        robot = maker(**arguments)
    except Exception as error:
        raise ConfigError(f"robot {source!r} failed to start: {type(error).__name__}: {error}") from error
    needed = ["spec", "observe", "command", "close", *(("instruction", "episodes") if is_episodic(robot) else ())]
    if missing := [name for name in needed if not hasattr(robot, name)]:
        raise ConfigError(
            f"robot {source!r} is {type(robot).__name__}, which lacks {', '.join(missing)}. A robot needs `spec`, "
            "`observe()`, `command(action)` and `close()`; a robot with `reset(episode)` also needs `instruction` and "
            "`episodes` (vla.control.robot)."
        )
    if not isinstance(robot.spec, RobotSpec):
        raise ConfigError(f"robot {source!r}: spec must be a vla.spec.RobotSpec, got {type(robot.spec).__name__}.")
    return robot
