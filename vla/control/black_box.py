"""The black box: the last seconds before something went wrong.

Owns: what is kept of every tick, and the file that it becomes after a fault: a zip of `ticks.jsonl` (one line per tick:
times, command, reasons, state, and the decodings that came in) and `<camera>/<number>.jpg`, to which those lines refer.
Pictures are encoded and files are written in a thread of its own; the control loop only hands over.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import queue
import re
import threading
import time
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vla.control.robot import Reading

_AFTERMATH_S = 1.0  # what follows a fault belongs to it
_WAITING = 100  # moments; more of them hold too many pictures
#: Reasons to hold that are no faults.
_EXPECTED = frozenset({"no chunk yet", "on hold"})
#: Reasons for which a command is changed, not replaced: they are counted, but are no faults either.
_LIMITS = frozenset({"range", "jump", "velocity", "acceleration", "workspace"})


@dataclasses.dataclass(frozen=True)
class Moment:
    """One tick.

    Attributes:
        tick: its number in the run.
        lateness_s: from its deadline to its command.
        reading: what the robot last said.
        command: what it was told, float32 [D]; `reasons` says why that is not what the policy wanted.
        decoding: the chunk that was complete at this tick: {asked, ms, ids, entropy} or {asked, ms, error}; else None.
            Its first actions may have been executed since the tick that is `asked`.
    """

    tick: int
    lateness_s: float
    reading: Reading
    command: np.ndarray
    reasons: tuple[str, ...]
    decoding: dict[str, Any] | None

    @property
    def fault(self) -> str | None:
        """What went wrong in this tick, in a word; None: nothing did."""
        if self.decoding is not None and "error" in self.decoding:
            return "policy error"
        return next((reason for reason in self.reasons if reason not in _EXPECTED | _LIMITS), None)


class BlackBox:
    """Keeps the last `seconds` and writes them to `folder` after a fault, at most once per `seconds` and at the end.

    Attributes:
        files: what it has written.
        problem: why it could not keep or write something, the first time; None: it could.
    """

    def __init__(self, folder: Path, seconds: float, hz: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._length = max(1, round(seconds * hz))
        # What is said of a tick, and its pictures by their names; ticks without a new reading share them.
        self._ticks: collections.deque[tuple[dict[str, Any], dict[str, bytes]]] = collections.deque(maxlen=self._length)
        self._last_reading: tuple[Reading, dict[str, str], dict[str, bytes]] | None = None
        self._queue: queue.Queue[Moment | None] = queue.Queue(maxsize=max(self._length, _WAITING))
        self._number, self._closed = 0, False
        self.files: list[Path] = []
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-black-box")
        self._thread.start()

    def add(self, moment: Moment) -> None:
        try:
            self._queue.put_nowait(moment)
        except queue.Full:
            self.problem = self.problem or "moments came faster than they could be kept"

    def end(self) -> None:
        """The run is over: what is still to be written is written now (in the background)."""
        self._queue.put(None)

    def close(self) -> None:
        self._closed = True
        self.end()
        self._thread.join(timeout=30)

    def _serve(self) -> None:
        fault, since, written = None, 0.0, -float("inf")
        while True:
            moment, now = self._queue.get(), time.monotonic()
            if moment is not None:
                self._guarded(self._keep, moment)
                if fault is None and moment.fault is not None:
                    fault, since = moment.fault, now
            due = now - since >= _AFTERMATH_S and now - written >= self._seconds
            if fault is not None and (due or moment is None):
                self._guarded(self._write, fault)
                fault, written = None, now
            if moment is None and self._closed:
                return

    def _guarded(self, job: Callable[[Any], None], about: Any) -> None:
        """A full disk or a strange picture costs what it is about, and nothing that comes after it."""
        try:
            job(about)
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    def _keep(self, moment: Moment) -> None:
        reading = moment.reading
        if self._last_reading is None or self._last_reading[0] is not reading:
            self._last_reading = reading, *self._encode(reading)
        _, names, pictures = self._last_reading
        tick = {
            "tick": moment.tick,
            "lateness_ms": round(1e3 * moment.lateness_s, 3),
            "observed": round(reading.time, 4),
            "state": _plain(reading.observation.get("agent_pos")),
            "pictures": names,
            "command": [float(value) for value in moment.command],
            "reasons": moment.reasons,
            "decoding": moment.decoding,
        }
        self._ticks.append((tick, pictures))

    def _encode(self, reading: Reading) -> tuple[dict[str, str], dict[str, bytes]]:
        """The names of a reading's pictures by camera, and the pictures by name."""
        names, pictures = {}, {}
        pixels = reading.observation.get("pixels")
        for camera, image in pixels.items() if isinstance(pixels, dict) else ():
            if getattr(image, "ndim", 0) != 3 or image.dtype != np.uint8 or image.shape[-1] != 3 or not image.size:
                continue  # a faulty driver's picture; the reason tells
            names[camera] = f"{camera}/{self._number:06d}.jpg"
            pictures[names[camera]] = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
        self._number += 1
        return names, pictures

    def _write(self, fault: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
        path = self._folder / f"{stamp}-{re.sub('[^a-z]+', '-', fault.lower())}.zip"
        scratch = path.with_suffix(".partial")
        with zipfile.ZipFile(scratch, "w") as box:
            box.writestr("ticks.jsonl", "".join(json.dumps(tick) + "\n" for tick, _ in self._ticks))
            for name, data in {name: data for _, pictures in self._ticks for name, data in pictures.items()}.items():
                box.writestr(name, data)
        scratch.replace(path)
        self.files.append(path)


def _plain(state: Any) -> Any:
    """A state for JSON; as text what is none."""
    try:
        return None if state is None else [float(value) for value in np.ravel(state)]
    except (TypeError, ValueError):
        return repr(state)[:200]
