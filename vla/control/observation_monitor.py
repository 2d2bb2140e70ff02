"""Whether a reading is fit to act upon.

Owns: what can be wrong with what a robot says (stale, a camera missing, dark, of another size or frozen, a state that
is not finite), each with the name under which it is counted. It does not know policies or commands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vla.config import SafetyConfig
from vla.control.robot import Reading
from vla.errors import SpecError
from vla.spec import RobotSpec, check_image

_DARK = 8  # of 255: no pixel of a working camera's picture of a lit room stays below it


def state_of(reading: Reading, spec: RobotSpec) -> np.ndarray | None:
    """The state that a robot says it is in, float64 [S]; None when that is no finite state of its size."""
    try:
        state = np.asarray(reading.observation.get("agent_pos", ()), np.float64)
    except (TypeError, ValueError):  # a driver that says something else
        return None
    return state if state.shape == (spec.state_dim,) and np.isfinite(state).all() else None


class Watch:
    """Judges readings in the order in which they come; the first one says how large each camera's picture is."""

    def __init__(self, spec: RobotSpec, config: SafetyConfig) -> None:
        self._spec, self._config = spec, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._changed: dict[str, tuple[np.ndarray, float]] = {}  # camera -> its last new picture, and when
        self._judged: tuple[Reading, str | None] | None = None

    def fault(self, reading: Reading, now: float) -> str | None:
        """The name of what is wrong with `reading` at the time `now` (of `time.monotonic`); None: nothing is."""
        if now - reading.time > self._config.max_age_s:
            return "stale observation"
        if self._judged is None or self._judged[0] is not reading:
            self._judged = reading, self._examine(reading)
        return self._judged[1]

    def _examine(self, reading: Reading) -> str | None:
        pixels = reading.observation.get("pixels")
        for camera in self._spec.cameras:
            image = pixels.get(camera) if isinstance(pixels, Mapping) else None
            if image is None:
                return "missing camera"
            try:
                check_image(image, camera)
            except SpecError:
                return "malformed picture"
            if image.shape != self._shapes.setdefault(camera, image.shape):
                return "picture of another size"
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
