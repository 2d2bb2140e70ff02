"""A policy on another machine.

Owns: the client's side of `vla serve`'s websocket, with the interface of `Policy`: a deadline for every call, and a
connection that is made anew when it breaks. It does not know what decodes at the other end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import websockets
from websockets.sync.client import ClientConnection, connect

from vla.config import GREEDY, DecodingConfig
from vla.errors import ConfigError, ServerError, unknown
from vla.policy import ChunkPolicy, Policy, Prediction
from vla.policy.session import Draft
from vla.serving import wire
from vla.spec import Observation, RobotSpec
from vla.transforms.chunks import completed

_RETRY_S = 0.05
#: What must not change when a server comes back: a robot must not go on with another policy.
_IDENTITY = ("robot", "horizon", "image_size", "tokenizer_sha256", "unnorm_keys", "action_limits", "weights")
_BUSY = 503  # the server goes down, and may be back


def load(
    name: str,
    device: str = "auto",
    unnorm_key: str | None = None,
    n_action_steps: int | None = None,
    decoding: DecodingConfig = GREEDY,
    connect_s: float = 30.0,
) -> ChunkPolicy:
    """The policy of that name, here; or, for an address ("ws://host:8000"), the one that is served there, for which
    this waits up to `connect_s` seconds, and says so."""
    if name.startswith(("ws://", "wss://")):
        if decoding != GREEDY:
            raise ConfigError(
                "how a served policy decodes is said where it is served, as in `vla serve --temperature ...`."
            )
        print(f"connecting to {name}", file=sys.stderr, flush=True)
        return RemotePolicy(
            name, patience_s=connect_s, unnorm_key=unnorm_key, n_action_steps=n_action_steps, on_wait=_tell_why
        )
    return Policy.from_pretrained(name, device, unnorm_key, n_action_steps, decoding)


def _tell_why(reason: str, left: float) -> None:
    print(f"{reason} Trying again for {left:.0f} s; Ctrl-C ends it.", file=sys.stderr, flush=True)


class RemotePolicy(ChunkPolicy):
    """The policy of a `vla serve`.

    Args:
        address: "ws://host:port", or "wss://..." with TLS.
        deadline_s: of every call, connecting again included.
        patience_s: how long to wait for the server in the beginning.
        api_key: None takes the environment variable VLA_API_KEY.
        on_wait: is called once, with the reason and the seconds left, when the server cannot be reached at first.
    Raises:
        ServerError: from every call: not reached in time, too busy, or its answer is an error.
    """

    def __init__(
        self,
        address: str,
        deadline_s: float = 2.0,
        patience_s: float = 30.0,
        unnorm_key: str | None = None,
        n_action_steps: int | None = None,
        api_key: str | None = None,
        on_wait: Callable[[str, float], None] | None = None,
    ) -> None:
        key = api_key or os.environ.get("VLA_API_KEY")
        self._headers = {"Authorization": f"Api-Key {key}"} if key else {}
        self._address, self._deadline_s = address, deadline_s
        self._socket: ClientConnection | None = None
        self._leave = contextlib.ExitStack()  # closes it
        self.metadata: dict[str, Any] = {}
        self._connect(time.monotonic() + patience_s, on_wait)
        said = self.metadata
        self.robot = RobotSpec.from_dict(said["robot"])
        self.horizon, self.image_size = said["horizon"], said["image_size"]
        self.n_action_steps = n_action_steps or said["n_action_steps"]
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ConfigError(f"n_action_steps must be between 1 and the horizon {self.horizon}, got {n_action_steps}.")
        self.unnorm_key = unnorm_key or said["unnorm_key"]
        if self.unnorm_key not in said["unnorm_keys"]:
            raise ConfigError(unknown("unnorm_key", self.unnorm_key, said["unnorm_keys"]))

    @property
    def action_limits(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.metadata["action_limits"][self.unnorm_key]
        return low, high

    def predict(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        drafts: Sequence[Draft | None] | None = None,
        on_action: Callable[[int, np.ndarray], None] | None = None,
    ) -> Prediction:
        """One request after the other; the server batches requests of different clients.

        The drafts are actions in the robot's units: a client has no tokenizer."""
        if on_action is not None:
            raise ConfigError("a served chunk arrives as a whole: its actions cannot be streamed.")
        drafts = [None] * len(observations) if drafts is None else drafts
        answers = [self._ask(*request) for request in zip(observations, instructions, drafts, strict=True)]
        chunks = np.stack([answer["actions"] for answer in answers])
        details = [answer["vla"] for answer in answers]
        ids, log_probs, entropy = (
            np.stack([part[name] for part in details]) for name in ("ids", "log_probs", "entropy")
        )
        forwards = max(part["forwards"] for part in details)
        return Prediction(chunks, ids, log_probs, entropy, forwards, tuple(map(Draft, chunks)))

    def close(self) -> None:
        with contextlib.suppress(Exception):  # whatever state it is in
            self._leave.close()
        self._socket = None

    def _ask(self, observation: Observation, instruction: str, draft: Draft | None) -> dict[str, Any]:
        request: dict[str, Any] = {
            "pixels": {camera: np.asarray(observation["pixels"][camera]) for camera in self.robot.cameras},
            "prompt": instruction,
            "unnorm_key": self.unnorm_key,
            "vla/details": True,
        }
        if self.robot.state_dim:
            request["agent_pos"] = np.asarray(observation["agent_pos"])
        if draft is not None:
            given = np.empty((0, self.robot.action_dim), np.float32) if draft.prefix is None else draft.prefix
            steps = np.concatenate([given, completed(draft.steps, self.horizon)[len(given) :]])
            request |= {"vla/draft": steps, "vla/committed": len(given), "vla/trust": float(draft.threshold)}
        answer = self._exchange(wire.to_msgpack(request))
        if "error" in answer:
            raise ServerError(f"{self._address} answered: {answer['error']}")
        return answer

    def _exchange(self, request: bytes) -> dict[str, Any]:
        """Send and wait, through as many connections as it takes until the deadline: asking twice does no harm."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            try:
                if self._socket is None:
                    self._connect(deadline)
                assert self._socket is not None
                with _cut_at(deadline, self._socket):
                    self._socket.send(request)
                return _map(self._socket.recv(timeout=max(0.0, deadline - time.monotonic())))
            except (OSError, websockets.WebSocketException):
                self.close()  # a late answer must not be taken for that of the next question
                if time.monotonic() >= deadline:
                    raise ServerError(f"{self._address} did not answer within {self._deadline_s:g} s.") from None
                time.sleep(_RETRY_S)

    def _connect(self, deadline: float, on_wait: Callable[[str, float], None] | None = None) -> None:
        """Connect and read who the server is; again and again until the deadline."""
        address = self._address + ("&" if "?" in self._address else "?") + "errors=plain"
        while self._socket is None:
            try:
                with contextlib.ExitStack() as leave:
                    connection = leave.enter_context(
                        connect(
                            address,
                            additional_headers=self._headers,
                            compression=None,
                            max_size=None,
                            proxy=None,
                            open_timeout=max(0.01, deadline - time.monotonic()),
                            close_timeout=_RETRY_S,  # a server that no longer answers does not say goodbye either
                        )
                    )
                    self._meet(_map(connection.recv(timeout=max(0.01, deadline - time.monotonic()))))
                    self._socket, self._leave = connection, leave.pop_all()
            except websockets.InvalidURI:
                raise ConfigError(f"{self._address!r} is no address; ws://host:port is one.") from None
            except (OSError, websockets.WebSocketException) as error:
                status = error.response.status_code if isinstance(error, websockets.InvalidStatus) else None
                if status is not None and status != _BUSY:
                    hint = " Is VLA_API_KEY right?" if status in (401, 403) else ""
                    raise ServerError(f"{self._address} refused the connection with status {status}.{hint}") from None
                reason = f"{self._address} cannot be reached: {error or type(error).__name__}."
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ServerError(f"{reason} Is `vla serve` running there?") from None
                if on_wait is not None:
                    on_wait(reason, left)
                    on_wait = None
                time.sleep(_RETRY_S)

    def _meet(self, said: dict[str, Any]) -> None:
        """Take what a server says of itself; ServerError when it is not the one that this policy began with."""
        for name in _IDENTITY:
            if name not in said:
                raise ServerError(f"{self._address} is no `vla serve`: it does not say its {name}.")
            if self.metadata and wire.to_msgpack(said[name]) != wire.to_msgpack(self.metadata[name]):
                raise ServerError(f"{self._address} serves another policy now: its {name} has changed.")
        self.metadata = said


@contextlib.contextmanager
def _cut_at(deadline: float, connection: ClientConnection) -> Iterator[None]:
    """End a connection that still sends at the deadline: by itself it would wait for as long as nobody reads."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _map(message: str | bytes) -> dict[str, Any]:
    values = wire.from_msgpack(message) if isinstance(message, bytes) else None
    if not isinstance(values, Mapping):
        raise ServerError(f"the server sent {str(message)[:200]!r} where a msgpack map was expected.")
    return dict(values)
