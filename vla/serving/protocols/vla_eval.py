"""vla-eval's websocket protocol (Allen AI's evaluation harness: `vla_eval/protocol`, version 1 in vla-eval 0.8).

The address is `ws://host:8000/vla-eval`. The client sends the first message. Every message is binary: a msgpack map
{"type", "payload", "seq", "timestamp"}.

* "hello" is answered by a "hello" with the policy's action and observation specs. A client with another protocol
  version is disconnected. The reason is in the close frame, because the stock client shows nothing else.
* "episode_start" and "episode_end" have no answer.
* "observation" {"images", "states"?, "task_description"} is answered by one "action" {"actions": float32 [D]} with the
  same `seq`. A chunk is decoded for every `n_action_steps`-th observation of an episode; images of other observations
  are not read. `vla.serving.requests` reads the observation.
* Errors are sent as "error" {"error": message} with the `seq` of the message; 0 if it cannot be read.

An array is a map {"__ndarray__", "data", "dtype", "shape"}, an image a map {"__image__", "format", "data", "shape",
"dtype"?} with PNG, JPEG or raw data. `GET /health` and `GET /config` are as in vla-eval's own server, except that
`/config` does not change options.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from vla import __version__
from vla.policy.session import Session
from vla.serving import wire
from vla.serving.protocols.base import PROTOCOLS, Inbox, WireProtocol, decode, json_response
from vla.serving.requests import of_hand
from vla.spec import ActionSpace, RobotSpec
from vla.transforms.prompt import text

VERSION = 1
_PROTOCOL_ERROR, _GOING_AWAY = 1002, 1001  # websocket close codes
_LONGEST_REASON = 123  # bytes of a close frame's reason
_ENVELOPE = {"type": str, "payload": Mapping, "seq": int}
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}  # by Pillow's mode
_JOINTS = {
    ActionSpace.JOINT_POSITION: "joint_positions",
    ActionSpace.JOINT_DELTA: "joint_delta_pos",
    ActionSpace.JOINT_VELOCITY: "joint_velocity",
}
_POSITIONS = {ActionSpace.EE_DELTA: "delta_xyz", ActionSpace.EE_POSITION: "absolute_xyz"}
_LIBERO_STATE = "eef_pos3_axisangle3_gripper2"
_GRIPPERS: dict[tuple[float, float], str] = {  # by the values that open and close it
    (-1, 1): "binary_close_positive",
    (1, -1): "binary_close_negative",
    (0, 1): "binary_close_01",
    (1, 0): "continuous_01",
}


@PROTOCOLS.register("vla-eval")
class VLAEval(WireProtocol):
    """Episodes on a websocket, `GET /health` and `GET /config`."""

    def routes(self) -> list[Route | WebSocketRoute]:
        return [
            WebSocketRoute("/vla-eval", self._converse),
            Route("/health", self._health),
            Route("/config", self._config),
        ]

    async def _health(self, request: Request) -> Response:
        if self.app.draining:
            return json_response({"status": "shutting down"}, 503)
        return json_response({"status": "ok"})

    async def _config(self, request: Request) -> Response:
        if request.query_params:
            message = "options of a running server cannot be changed; start it with `vla serve --max-batch N`."
            return json_response({"errors": [f"{name}: {message}" for name in request.query_params]}, 422)
        return json_response({"applied": {}, "config": {"max_batch_size": self.app.config.max_batch}})

    async def _converse(self, socket: WebSocket) -> None:
        await socket.accept()
        inbox, session, greeted = Inbox(socket, self.app), Session(), False
        while (frame := await inbox.receive()) is not None:
            start, seq, reply = time.perf_counter(), 0, None
            try:
                message = await decode(_unpack, frame)
                seq, kind, payload = message["seq"], message["type"], message["payload"]
                if kind == "hello":
                    _check_version(payload)
                    greeted, reply = True, ("hello", self._hello())
                elif not greeted:
                    raise wire.WireError(f"the first message must be a hello, got {kind!r:.40}.")
                elif kind in ("episode_start", "episode_end"):
                    session = Session()
                elif kind == "observation":
                    if (instruction := text(payload.get("task_description"))) != session.instruction:
                        session = Session(instruction)  # the queue is for the previous task
                    seconds = await self._predict(session, payload, inbox, len(frame))
                    reply = "action", {"actions": _encode(session.take())}
                    self.app.metrics.answered("vla-eval", time.perf_counter() - start, seconds)
                elif kind == "error":
                    self.app.log_refusal(socket, f"the client reports an error: {payload.get('error')}")
                else:
                    raise wire.WireError(f"unknown message type {kind!r:.40}.")
            except Exception as error:
                _, reason = self.app.failed("vla-eval", error, socket)
                if not greeted:
                    await socket.close(_PROTOCOL_ERROR, reason.encode()[:_LONGEST_REASON].decode(errors="ignore"))
                    return
                reply = "error", {"error": reason}
            if reply is not None:
                await socket.send_bytes(pack(*reply, seq))
            if self.app.draining:
                await socket.close(_GOING_AWAY, "the server is shutting down.")
                return

    async def _predict(self, session: Session, payload: Mapping[str, Any], inbox: Inbox, size: int) -> float | None:
        """Decode a chunk if the session needs one. Returns the decoding time of its batch in seconds."""
        if not session.needs_chunk:
            return None
        values = await asyncio.to_thread(_with_pixels, payload, self.app.config.max_request_mb)
        answer = await self.app.answer(values, inbox.peek, session.draft, size)
        session.put(answer.prediction, self.app.policy.n_action_steps)
        return answer.seconds

    def _hello(self) -> dict[str, Any]:
        robot = self.app.policy.robot
        # If configured, the client's camera names: vla-eval warns about names that its benchmark does not have.
        keys = self.app.config.keys.images
        cameras = [keys.get(camera, camera).rpartition("/")[2] for camera in robot.cameras]
        return {
            "harness_version": f"vla {__version__}",
            "protocol_version": VERSION,
            "model_server": "vla serve",
            "capabilities": {},
            "observation_params": _observation_params(robot),
            "action_spec": {part["name"]: part for part in _action_spec(robot)},
            "observation_spec": {part["name"]: part for part in _observation_spec(robot, cameras)},
        }


def pack(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    """A message in vla-eval's envelope."""
    return wire.to_msgpack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


def _unpack(frame: bytes | str) -> dict[str, Any]:
    """Decode a message, except for its images. WireError if the envelope is incomplete."""
    if isinstance(frame, str):
        raise wire.WireError("a message is binary (msgpack), got text.")
    message = wire.from_msgpack(frame, _decode)
    if not isinstance(message, dict):
        raise wire.WireError(f"a message must be a map, got {type(message).__name__}.")
    for name, kind in _ENVELOPE.items():
        if not isinstance(message.get(name), kind) or isinstance(message[name], bool):
            raise wire.WireError(f"a message needs {name!r} as {kind.__name__.lower()}, got {message.get(name)!r:.40}.")
    return message


def _check_version(hello: Mapping[str, Any]) -> None:
    version = hello.get("protocol_version")
    if version != VERSION:
        raise wire.WireError(f"protocol_version {version!r:.20} is not supported, only {VERSION}. Use vla-eval 0.8.")


def _encode(array: np.ndarray) -> dict[str, Any]:
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}


def _decode(entry: dict[Any, Any]) -> Any:
    if "__image__" in entry:
        return _EncodedImage(entry.get("format"), entry.get("data"), entry.get("shape"), entry.get("dtype"))
    if "__ndarray__" in entry:
        return wire.to_array(entry.get("data"), entry.get("dtype"), entry.get("shape"))
    return entry


@dataclasses.dataclass(frozen=True)
class _EncodedImage:
    """An image as sent, not validated."""

    format: Any
    data: Any
    shape: Any
    dtype: Any

    def size(self, name: str) -> int:
        """Bytes of the decoded image. WireError if the shape is not that of an image."""
        sides = self.shape if isinstance(self.shape, list) else []
        if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise wire.WireError(
                f"image {name!r}: its shape must be [height, width, channels], got {self.shape!r:.60}."
            )
        return math.prod(sides)

    def pixels(self, name: str) -> np.ndarray:
        """The decoded image, uint8 of the declared shape. WireError if the data do not match."""
        if self.format == "raw":
            return wire.to_array(self.data, self.dtype, self.shape)
        if self.format not in ("png", "jpeg"):
            raise wire.WireError(f"image {name!r}: the format must be png, jpeg or raw, got {self.format!r:.40}.")
        try:
            with Image.open(io.BytesIO(self.data), formats=[self.format]) as image:
                found = [image.height, image.width, _CHANNELS.get(image.mode, image.mode)]
                if found != self.shape:  # before its pixels are decompressed
                    raise wire.WireError(f"image {name!r}: its shape is declared as {self.shape}, but it is {found}.")
                return np.asarray(image).reshape(self.shape)
        except wire.WireError:
            raise
        except Exception as error:  # Pillow raises many types
            raise wire.WireError(f"image {name!r} is not a valid {self.format} file: {error}") from None


def _with_pixels(payload: Mapping[str, Any], limit_mb: float) -> dict[str, Any]:
    """`payload` with decoded images. WireError if their pixels exceed the size limit of a request."""
    size = sum(image.size(name) for name, image in _images(payload))
    if size > limit_mb * 2**20:
        raise wire.WireError(f"the images have {size / 2**20:.1f} MB of pixels; the limit is {limit_mb:g} MB.")
    decoded = {name: image.pixels(name) for name, image in _images(payload)}
    return {
        key: {inner: decoded.get(f"{key}/{inner}", entry) for inner, entry in value.items()}
        if isinstance(value, dict)
        else decoded.get(key, value)
        for key, value in payload.items()
    }


def _images(payload: Mapping[str, Any]) -> Iterator[tuple[str, _EncodedImage]]:
    for key, value in payload.items():
        if isinstance(value, _EncodedImage):
            yield key, value
        elif isinstance(value, dict):
            yield from ((f"{key}/{inner}", entry) for inner, entry in value.items() if isinstance(entry, _EncodedImage))


def _action_spec(robot: RobotSpec) -> Iterator[dict[str, Any]]:
    """The parts of an action in vla-eval's terms (`vla_eval/specs.py`); a single "raw" part if it has no such terms."""
    space, size = robot.action_space, robot.action_dim
    arm = size if robot.gripper_index is None else size - 1
    gripper_last = robot.gripper_index is None or robot.gripper_index % size == arm
    if gripper_last and space in _JOINTS:
        yield _part("joints", arm, _JOINTS[space])
    elif gripper_last and space in _POSITIONS and arm in (3, 6):
        yield _part("position", 3, _POSITIONS[space])
        if arm == 6:
            euler = any(word in name for name in robot.action_names[3:6] for word in ("roll", "pitch", "yaw"))
            yield _part("rotation", 3, "euler_xyz" if euler else "axis_angle")
    else:
        yield _part("actions", size, "raw")
        return
    if robot.gripper_index is not None:
        ends = robot.gripper_open, robot.gripper_closed
        yield _part("gripper", 1, _GRIPPERS.get(ends, "raw")) | {"range": sorted(map(float, ends))}


def _observation_params(robot: RobotSpec) -> dict[str, bool]:
    """Options of vla-eval's benchmarks, so that they send all inputs of the policy."""
    wanted = {
        "send_wrist_image": any(map(of_hand, robot.cameras)),
        "send_state": robot.state_dim > 0,
        # Do not flip the sign of rotations beyond 180 degrees, as in LIBERO's demonstrations.
        "quat_no_antipodal": _state_format(robot) == _LIBERO_STATE,
    }
    return {name: True for name, needed in wanted.items() if needed}


def _observation_spec(robot: RobotSpec, cameras: list[str]) -> Iterator[dict[str, Any]]:
    for camera in cameras:
        yield _part(camera, 0, "rgb_hwc_uint8")
    if robot.state_dim:
        yield _part("state", robot.state_dim, _state_format(robot))
    yield _part("language", 0, "language")


def _state_format(robot: RobotSpec) -> str:
    fingers = ["gripper" in name or "finger" in name for name in robot.state_names]
    return _LIBERO_STATE if fingers == [False] * 6 + [True] * 2 else "raw"


def _part(name: str, dims: int, form: str) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": form}
