"""Detection of faulty observations.

Owns: the faults of an observation and their names: stale observations; missing, malformed, resized, dark or frozen
images; states that are not finite. It does not know policies or commands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vla.config import SafetyConfig
from vla.control.robot import Reading
from vla.errors import SpecError
from vla.spec import RobotSpec, check_image

_DARK = 8  # of 255; in a lit room, every image has a brighter pixel


def state_of(reading: Reading, spec: RobotSpec) -> np.ndarray | None:
    """The state in `reading`, float64 [S]; None if it is not finite or has a wrong shape."""
    try:
        state = np.asarray(reading.observation.get("agent_pos", ()), np.float64)
    except (TypeError, ValueError):  # not numbers at all
        return None
    return state if state.shape == (spec.state_dim,) and np.isfinite(state).all() else None


class ObservationMonitor:
    """Checks readings in order of arrival. The size of a camera's images must not change after the first one."""

    def __init__(self, spec: RobotSpec, config: SafetyConfig) -> None:
        self._spec, self._config = spec, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._changed: dict[str, tuple[np.ndarray, float]] = {}  # camera -> its last new image, and its time
        self._checked: tuple[Reading, str | None] | None = None  # the last reading, and its fault

    def fault(self, reading: Reading, now: float) -> str | None:
        """The fault of `reading` at time `now`; None without a fault."""
        if now - reading.time > self._config.max_age_s:
            return "stale observation"
        if self._checked is None or self._checked[0] is not reading:
            self._checked = reading, self._check(reading)
        return self._checked[1]

    def _check(self, reading: Reading) -> str | None:
        pixels = reading.observation.get("pixels")
        for camera in self._spec.cameras:
            image = pixels.get(camera) if isinstance(pixels, Mapping) else None
            if image is None:
                return "missing camera"
            try:
                check_image(image, camera)
            except SpecError:
                return "malformed image"
            if image.shape != self._shapes.setdefault(camera, image.shape):
                return "image of another size"
            if image.max() < _DARK:
                return "dark camera"
            if self._frozen(camera, image, reading.time):
                return "frozen camera"
        return "state not finite" if self._spec.state_dim and state_of(reading, self._spec) is None else None

    def _frozen(self, camera: str, image: np.ndarray, time: float) -> bool:
        if self._config.max_frozen_s is None:
            return False
        last, since = self._changed.get(camera, (None, time))
        if last is None or not np.array_equal(last, image):
            self._changed[camera] = image, time
            return False
        return time - since > self._config.max_frozen_s
