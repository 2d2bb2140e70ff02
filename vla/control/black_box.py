"""The black box: a recording of the last seconds before a fault.

Owns: the record of recent control steps, and the file written after a fault. This is a zip of `ticks.jsonl` (one line
per step: times, command, reasons, state, completed decodings) and the images of these steps, `<camera>/<number>.jpg`.
A background thread encodes images and writes files, so that the control loop is not delayed.
"""

from __future__ import annotations

import collections
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

from vla.control.events import StepEvent
from vla.control.robot import Reading

_AFTERMATH_S = 1.0  # length of the recording after a fault
_WAITING = 100  # minimum capacity of the queue, in events


class BlackBox:
    """Keeps the last `seconds` in memory, and writes them to `folder` after a fault, at most once per `seconds`.

    Attributes:
        files: paths of the files written so far.
        problem: the first error in recording or writing; None without an error.
    """

    def __init__(self, folder: Path, seconds: float, hz: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._length = max(1, round(seconds * hz))
        # Each step's record, and its images by file name. Steps without a new reading share the images.
        self._ticks: collections.deque[tuple[dict[str, Any], dict[str, bytes]]] = collections.deque(maxlen=self._length)
        self._last_reading: tuple[Reading, dict[str, str], dict[str, bytes]] | None = None
        self._queue: queue.Queue[StepEvent | None] = queue.Queue(maxsize=max(self._length, _WAITING))
        self._number, self._closed = 0, False
        self.files: list[Path] = []
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-black-box")
        self._thread.start()

    def add(self, event: StepEvent) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.problem = self.problem or "recording was too slow, so some control steps are missing"

    def end(self) -> None:
        """End a run: write a pending recording now, in the background."""
        self._queue.put(None)

    def close(self) -> None:
        self._closed = True
        self.end()
        self._thread.join(timeout=30)

    def _serve(self) -> None:
        fault, since, written = None, 0.0, -float("inf")
        while True:
            event, now = self._queue.get(), time.monotonic()
            if event is not None:
                self._guarded(self._keep, event)
                if fault is None and event.fault is not None:
                    fault, since = event.fault, now
            due = now - since >= _AFTERMATH_S and now - written >= self._seconds
            if fault is not None and (due or event is None):
                self._guarded(self._write, fault)
                fault, written = None, now
            if event is None and self._closed:
                return

    def _guarded(self, job: Callable[[Any], None], about: Any) -> None:
        """Run `job(about)`. An error (a full disk, a malformed image) is stored in `problem`."""
        try:
            job(about)
        except Exception as error:
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    def _keep(self, event: StepEvent) -> None:
        reading = event.reading
        if self._last_reading is None or self._last_reading[0] is not reading:
            self._last_reading = reading, *self._encode(reading)
        _, names, images = self._last_reading
        tick = {
            "tick": event.tick,
            "lateness_ms": round(1e3 * event.lateness_s, 3),
            "observed": round(reading.time, 4),
            "state": _plain(reading.observation.get("agent_pos")),
            "images": names,
            "command": [float(value) for value in event.command],
            "reasons": event.reasons,
            "decoding": event.decoding,
        }
        self._ticks.append((tick, images))

    def _encode(self, reading: Reading) -> tuple[dict[str, str], dict[str, bytes]]:
        """The file names of a reading's images by camera, and the JPEG data by file name."""
        names, images = {}, {}
        pixels = reading.observation.get("pixels")
        for camera, image in pixels.items() if isinstance(pixels, dict) else ():
            if getattr(image, "ndim", 0) != 3 or image.dtype != np.uint8 or image.shape[-1] != 3 or not image.size:
                continue  # malformed; the step's reasons report it
            names[camera] = f"{camera}/{self._number:06d}.jpg"
            images[names[camera]] = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
        self._number += 1
        return names, images

    def _write(self, fault: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
        path = self._folder / f"{stamp}-{re.sub('[^a-z]+', '-', fault.lower())}.zip"
        scratch = path.with_suffix(".partial")
        with zipfile.ZipFile(scratch, "w") as box:
            box.writestr("ticks.jsonl", "".join(json.dumps(tick) + "\n" for tick, _ in self._ticks))
            for name, data in {name: data for _, images in self._ticks for name, data in images.items()}.items():
                box.writestr(name, data)
        scratch.replace(path)
        self.files.append(path)


def _plain(state: Any) -> Any:
    """A state as JSON values; its `repr` if it is not numeric."""
    try:
        return None if state is None else [float(value) for value in np.ravel(state)]
    except (TypeError, ValueError):
        return repr(state)[:200]
