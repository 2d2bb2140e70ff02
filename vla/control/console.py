"""The operator console: status and commands for the operator of a deployment.

Owns: the last seconds of a deployment as plain values (state, scene, commands, timings, safety events), the latest
image of each camera, the outcomes of scenes, and the operator's commands. A scene is one episode of a deployment; the
job calls `begin` and `end`. It does not know how the operator is connected (`vla.control.page`).

The control loop only stores events (`listen`); the thread that reads the status does the slow work. The threads share
deques of a fixed length. Appending to a deque and copying it are atomic in CPython, so no lock can delay the loop.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from typing import Any, NamedTuple

import cv2
import numpy as np

from vla.control.controller import Controller
from vla.control.events import StepEvent
from vla.control.robot import Reading
from vla.errors import VLAError
from vla.policy import ChunkPolicy
from vla.spec import RobotSpec, check_image
from vla.support.statistics import percentiles

_PLOTTED_S = 10.0
_TIMED_S = 60.0  # window of the reported lateness
_DECODINGS = 300
_EVENTS = 40
_SAME_EVENT_S = 1.0  # repetitions of a reason within this time count as one event
_SHOWN_S = 1.5  # how long a success is shown before the next scene begins
_USUAL = "no chunk yet"  # not an event, because every scene begins with it
_LONGEST = 200  # maximum length of an instruction, in characters
_WIDEST = 640  # maximum width of images, in pixels
#: Chroma subsampling would be visible in small images.
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


class Refused(VLAError):
    """A command of the operator that cannot be executed; the message gives the reason."""


@dataclasses.dataclass
class _Scene:
    number: int
    seed: int
    instruction: str  # the scene's own, which defines success; the operator may give the policy another one
    begun: float
    ticks: int = 0
    orders: list[str] = dataclasses.field(default_factory=list)  # commands of the operator
    ended: float | None = None
    success: bool = False


class _Tick(NamedTuple):
    number: int
    time: float
    command: np.ndarray
    reasons: tuple[str, ...]
    decoded: bool  # a chunk was completed


@dataclasses.dataclass
class _Event:
    reason: str
    first: float
    last: float
    count: int = 0
    detail: str = ""


class OperatorConsole:
    """The console of a `controller`. Add `listen` to the controller's listeners. Methods can be called from any thread.

    Args:
        spec: the robot's RobotSpec.
        policy: the controller's policy.
        title: names of policy and robot, for display.
    Attributes:
        cameras: names of the cameras.
    """

    def __init__(self, controller: Controller, spec: RobotSpec, policy: ChunkPolicy, title: str = "") -> None:
        self._controller, self._spec, self._policy, self._title = controller, spec, policy, title
        self.cameras = tuple(spec.cameras)
        self._start, self._wall = time.monotonic(), time.time()
        self._held = self._next = False
        self._scene: _Scene | None = None
        self._last: _Scene | None = None  # the last completed scene
        self._outcomes: collections.deque[str] = collections.deque(maxlen=30)
        self._tally: collections.Counter[str] = collections.Counter()
        self._instructed: collections.deque[str] = collections.deque(maxlen=3)
        self._reading: Reading | None = None
        self._jpegs: dict[str, tuple[Reading, bytes | None]] = {}
        self._number, self._tick, self._due, self._missed = 0, -1, 0, 0
        self._ticks: collections.deque[_Tick] = collections.deque(maxlen=math.ceil(_PLOTTED_S * controller.hz))
        self._lateness: collections.deque[float] = collections.deque(maxlen=math.ceil(_TIMED_S * controller.hz))
        self._decodings: collections.deque[float] = collections.deque(maxlen=_DECODINGS)
        self._events: collections.deque[_Event] = collections.deque(maxlen=_EVENTS)
        self._latest: dict[str, _Event] = {}  # by reason

    # From the control loop ----------------------------------------------------------------------------------------

    def listen(self, step: StepEvent) -> None:
        """Record the event of a control step. It is called in the control loop and must be fast."""
        now, decoding = time.monotonic(), step.decoding or {}
        self._number += 1
        self._reading = step.reading
        # Do not keep the event itself, because it contains images.
        self._ticks.append(_Tick(self._number, now, step.command, step.reasons, "ids" in decoding))
        self._lateness.append(step.lateness_s)
        self._due += step.tick - self._tick
        self._missed += step.tick - self._tick - 1 + (step.lateness_s * self._controller.hz > 1)
        self._tick = step.tick
        for reason in step.reasons:
            if reason != _USUAL:
                self._note(reason, now)
        if "error" in decoding:
            self._note("policy error", now, str(decoding["error"]))
        elif decoding:
            self._decodings.append(decoding["ms"])
        if self._scene is not None:
            self._scene.ticks += 1

    def _note(self, reason: str, now: float, detail: str = "") -> None:
        event = self._latest.get(reason)
        if event is None or now - event.last > _SAME_EVENT_S:
            event = self._latest[reason] = _Event(reason, now, now)
            self._events.append(event)
        event.last, event.detail = now, detail
        event.count += 1

    def begin(self, seed: int, instruction: str) -> None:
        """Begin a scene."""
        number = self._scene.number + 1 if self._scene else 1
        self._tick, self._next = -1, False
        self._reading = None  # the last reading is of the previous scene
        self._scene = _Scene(number, seed, instruction, time.monotonic(), orders=["hold"] if self._held else [])

    def end(self, success: bool) -> list[str]:
        """End the scene and return the operator's commands in it. A scene with commands counts as guided."""
        scene = self._scene
        assert scene is not None, "call begin first"
        if not scene.ticks:  # pressing "New scene" just before this scene began has stopped it
            scene.orders.append("new scene")
        scene.success, scene.ended, self._last = success, time.monotonic(), scene
        outcome = "guided" if scene.orders else "success" if success else "failure"
        self._tally[outcome] += 1
        self._outcomes.append(outcome)
        return scene.orders

    def waiting(self) -> bool:
        """Whether the next scene must wait: a success is being shown, or the operator holds the robot."""
        scene = self._scene
        if self._next or scene is None or scene.ended is None:
            return False
        return self._held or (scene.success and time.monotonic() - scene.ended < _SHOWN_S)

    # Commands of the operator -------------------------------------------------------------------------------------

    def instruct(self, text: str) -> None:
        """Change the policy's instruction until the scene ends."""
        text, scene = " ".join(text.split()), self._scene
        if not text or len(text) > _LONGEST or not text.isprintable():
            raise Refused(f"an instruction must have 1 to {_LONGEST} printable characters.")
        if scene is None or scene.ended is not None or not scene.ticks:
            raise Refused("no scene is running. Wait for the next one, or press New scene.")
        if text == self._controller.instruction:
            return
        self._controller.instruction = text
        scene.orders.append(f"instruction: {text}")
        if text != scene.instruction and text not in self._instructed:
            self._instructed.append(text)

    def start(self) -> None:
        """End the hold."""
        if self._controller.safety.stopped:
            raise Refused("the emergency stop is pressed: release it first.")
        self._held = False
        self._controller.resume()

    def hold(self) -> None:
        """Hold until `start`."""
        self._hold("hold")

    def emergency_stop(self) -> None:
        """Hold from the next command on, until `release` and `start`."""
        self._controller.safety.emergency_stop()
        self._hold("emergency stop")

    def release(self) -> None:
        """Release the emergency stop. The robot still holds until `start`."""
        self._controller.safety.release()

    def new_scene(self) -> None:
        """End the current scene, or begin the next one without waiting."""
        self._next, scene = True, self._scene
        if scene is not None and scene.ended is None:
            scene.orders.append("new scene")
            self._controller.stop()

    def _hold(self, order: str) -> None:
        self._held = True
        self._controller.hold()
        scene = self._scene
        if scene is not None and scene.ended is None and order not in scene.orders:
            scene.orders.append(order)

    # What the operator sees ---------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Constant properties: names, rate and limits."""
        low, high = self._policy.action_limits
        return {
            "title": self._title,
            "cameras": list(self.cameras),
            "state_names": list(self._spec.state_names),
            "action_names": list(self._spec.action_names),
            "gripper": self._spec.gripper_index,
            "limits": [[float(a), float(b)] for a, b in zip(low, high, strict=True)],
            "hz": self._controller.hz,
            "plotted_s": _PLOTTED_S,
            "timed_s": _TIMED_S,
            "period_ms": 1e3 / self._controller.hz,
            "chunk_ms": 1e3 * self._policy.n_action_steps / self._controller.hz,
        }

    @property
    def state(self) -> str:
        """ "starting", "running", "holding", "emergency stop" or "scene over"."""
        if self._controller.safety.stopped:
            return "emergency stop"
        if self._scene is None:
            return "starting"
        if self._held:
            return "holding"
        return "running" if self._scene.ended is None else "scene over"

    def status(self, since: int = 0) -> dict[str, Any]:
        """The current status as JSON values, with the control steps after number `since`."""
        # Read the scene before the reading: `begin` sets them in the reverse order, so the reading is never older.
        now, scene, reading = time.monotonic(), self._scene, self._reading
        return {
            "now": round(now - self._start, 3),
            "state": self.state,
            "emergency_stop": self._controller.safety.stopped,
            "held": self._held,
            "scene": None if scene is None else self._scene_row(scene, now),
            "suggestions": self._suggestions(),
            "last": None if self._last is None else _outcome(self._last),
            "tally": {name: self._tally[name] for name in ("success", "failure", "guided")},
            "outcomes": list(self._outcomes),
            "timing": self._timing(),
            "events": self._event_rows(),
            "robot": None if reading is None else self._robot_row(reading, now),
            "ticks": [self._step_row(tick) for tick in self._ticks.copy() if tick.number > since],
        }

    def jpeg(self, camera: str) -> bytes | None:
        """The latest image as JPEG; None without an image. Until a newer image arrives, the same object is returned."""
        reading = self._reading
        if reading is None:
            return None
        known = self._jpegs.get(camera)
        if known is None or known[0] is not reading:
            known = self._jpegs[camera] = reading, _jpeg(reading, camera)
        return known[1]

    def _scene_row(self, scene: _Scene, now: float) -> dict[str, Any]:
        return {
            "number": scene.number,
            "seed": scene.seed,
            "own_instruction": scene.instruction,
            # Before the scene's first step, the controller still has the previous instruction.
            "instruction": self._controller.instruction if scene.ticks else scene.instruction,
            "seconds": round((scene.ended or now) - scene.begun, 1),
            "orders": list(scene.orders),
            "over": scene.ended is not None,
        }

    def _suggestions(self) -> list[str]:
        own = [self._scene.instruction] if self._scene else []
        return own + [text for text in reversed(self._instructed.copy()) if text not in own]

    def _timing(self) -> dict[str, Any]:
        late = [1e3 * seconds for seconds in self._lateness.copy()]
        return {
            "lateness_ms": {name: round(ms, 2) for name, ms in percentiles(late).items()} if late else None,
            "commands": self._due,
            "missed": self._missed,
            "decode_ms": [round(ms, 1) for ms in self._decodings.copy()],
        }

    def _event_rows(self) -> list[dict[str, Any]]:
        wall = self._wall - self._start
        return [
            {
                "reason": event.reason,
                "detail": event.detail[:300],
                "count": event.count,
                "time": round(wall + event.first, 2),
                "seconds": round(event.last - event.first, 2),
            }
            for event in reversed(self._events.copy())
        ]

    def _robot_row(self, reading: Reading, now: float) -> dict[str, Any]:
        try:
            state = np.asarray(reading.observation.get("agent_pos", ()), np.float64).ravel().tolist()
        except (TypeError, ValueError):
            state = []  # malformed data of a faulty driver; a safety event reports it
        return {
            "state": [_plain(value) for value in state],
            "info": {name: _plain(value) for name, value in reading.info.items()},
            "age_s": round(now - reading.time, 3),
        }

    def _step_row(self, tick: _Tick) -> dict[str, Any]:
        return {
            "n": tick.number,
            "t": round(tick.time - self._start, 3),
            "command": [round(value, 4) for value in tick.command.tolist()],
            "reasons": tick.reasons,
            "decoded": tick.decoded,
        }


def _outcome(scene: _Scene) -> dict[str, Any]:
    assert scene.ended is not None
    return {
        "number": scene.number,
        "success": scene.success,
        "seconds": round(scene.ended - scene.begun, 1),
        "instruction": scene.instruction,
        "orders": list(scene.orders),
    }


def _plain(value: Any) -> Any:
    """`value` for JSON: floats are rounded; infinity and NaN become None."""
    return value if not isinstance(value, float) else round(value, 4) if math.isfinite(value) else None


def _jpeg(reading: Reading, camera: str) -> bytes | None:
    try:
        image = reading.observation["pixels"][camera]
        check_image(image, camera)
    except (VLAError, KeyError, TypeError):
        return None  # malformed data of a faulty driver; a safety event reports it
    if image.shape[1] > _WIDEST:
        height = max(1, round(image.shape[0] * _WIDEST / image.shape[1]))
        image = cv2.resize(image, (_WIDEST, height), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image[..., ::-1], _JPEG)[1].tobytes()
