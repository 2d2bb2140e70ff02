"""The client of `vla serve`.

Owns: the client side of openpi's websocket protocol, with the interface of `Policy`, a timeout for every call, and
reconnection.
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

from vla.config import GREEDY, DecodingConfig, Dtype
from vla.errors import ConfigError, ServerError, unknown
from vla.policy import ChunkPolicy, Policy, Prediction
from vla.policy.session import Draft, LatentDraw
from vla.serving import wire
from vla.spec import Observation, RobotSpec
from vla.transforms.chunks import completed

_RETRY_S = 0.05
#: Metadata that must not change between connections, so that an episode never continues with another policy.
_IDENTITY = ("robot", "horizon", "image_size", "tokenizer_sha256", "unnorm_keys", "action_limits", "weights")
_UNAVAILABLE = 503  # the server is shutting down; it may be restarted, so retry


def load(
    name: str,
    device: str = "auto",
    unnorm_key: str | None = None,
    n_action_steps: int | None = None,
    decoding: DecodingConfig = GREEDY,
    dtype: Dtype = "float32",
    connect_s: float = 30.0,
) -> ChunkPolicy:
    """Load the policy `name`, or connect to a server if `name` is an address ("ws://host:8000").

    Args:
        device, unnorm_key, n_action_steps, decoding, dtype: as in `Policy.from_pretrained`.
        connect_s: timeout for the connection, in seconds.
    """
    if name.startswith(("ws://", "wss://")):
        if decoding != GREEDY:
            raise ConfigError(
                "decoding options of a served policy are set on the server: `vla serve --temperature ...`."
            )
        if dtype != "float32":
            raise ConfigError(f"the dtype of a served policy is set on the server: `vla serve --dtype {dtype}`.")
        print(f"connecting to {name}", file=sys.stderr, flush=True)
        return RemotePolicy(
            name, patience_s=connect_s, unnorm_key=unnorm_key, n_action_steps=n_action_steps, on_wait=_print_reason
        )
    return Policy.from_pretrained(name, device, unnorm_key, n_action_steps, decoding, dtype)


def _print_reason(reason: str, remaining: float) -> None:
    print(f"{reason} Retrying for {remaining:.0f} s; press Ctrl-C to stop.", file=sys.stderr, flush=True)


class RemotePolicy(ChunkPolicy):
    """A policy served by `vla serve`.

    Args:
        address: "ws://host:port", or "wss://..." with TLS.
        deadline_s: timeout of every call, including reconnections, in seconds.
        patience_s: timeout of the first connection in seconds.
        api_key: None: the environment variable VLA_API_KEY.
        on_wait: called once, with the reason and the remaining seconds, if the first attempt to connect fails.
    Raises (also all methods):
        ServerError: the server cannot be reached in time, rejects the request or replies with an error.
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
        self._leave = contextlib.ExitStack()  # closes the websocket
        self.metadata: dict[str, Any] = {}
        self._connect(time.monotonic() + patience_s, on_wait)
        metadata = self.metadata
        self.robot = RobotSpec.from_dict(metadata["robot"])
        self.horizon, self.image_size = metadata["horizon"], metadata["image_size"]
        self.n_action_steps = n_action_steps or metadata["n_action_steps"]
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ConfigError(f"n_action_steps must be between 1 and the horizon {self.horizon}, got {n_action_steps}.")
        self.unnorm_key = unnorm_key or metadata["unnorm_key"]
        if self.unnorm_key not in metadata["unnorm_keys"]:
            raise ConfigError(unknown("unnorm_key", self.unnorm_key, metadata["unnorm_keys"]))

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
        """Send one request per observation, in sequence. The server batches requests of different clients."""
        if on_action is not None:
            raise ConfigError("actions of a served policy cannot be streamed: the server replies with whole chunks.")
        drafts = [None] * len(observations) if drafts is None else drafts
        latents = [(LatentDraw() if draft is None else draft.latent).following for draft in drafts]
        answers = [self._ask(*request) for request in zip(observations, instructions, drafts, strict=True)]
        chunks = np.stack([answer["actions"] for answer in answers])
        details = [answer["vla"] for answer in answers]
        ids, log_probs, entropy = (
            np.stack([part[name] for part in details]) for name in ("ids", "log_probs", "entropy")
        )
        forwards = max(part["forwards"] for part in details)
        following = tuple(Draft(chunk, latent=latent) for chunk, latent in zip(chunks, latents, strict=True))
        return Prediction(chunks, ids, log_probs, entropy, forwards, following)

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(Exception):  # the connection may be in any state
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
        if draft is not None and draft.latent != LatentDraw():
            request["vla/latent"] = [draft.latent.seed, draft.latent.chunk, *draft.latent.codes]
        if draft is not None and len(draft):
            prefix = np.empty((0, self.robot.action_dim), np.float32) if draft.prefix is None else draft.prefix
            steps = np.concatenate([prefix, completed(draft.steps, self.horizon)[len(prefix) :]])
            # "vla/committed" is the length of the action prefix, "vla/trust" its acceptance threshold.
            request |= {"vla/draft": steps, "vla/committed": len(prefix), "vla/trust": float(draft.threshold)}
        answer = self._exchange(wire.to_msgpack(request))
        if "error" in answer:
            raise ServerError(f"{self._address} replied with an error: {answer['error']}")
        return answer

    def _exchange(self, request: bytes) -> dict[str, Any]:
        """Send a request and wait for the reply; reconnect and resend until the deadline. Requests are idempotent."""
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
                self.close()  # otherwise, a late reply would be mistaken for the reply to the next request
                if time.monotonic() >= deadline:
                    raise ServerError(f"{self._address} did not reply within {self._deadline_s:g} s.") from None
                time.sleep(_RETRY_S)

    def _connect(self, deadline: float, on_wait: Callable[[str, float], None] | None = None) -> None:
        """Connect and read the server's metadata; retry until the deadline."""
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
                            close_timeout=_RETRY_S,  # do not wait for a server that does not respond
                        )
                    )
                    self._identify(_map(connection.recv(timeout=max(0.01, deadline - time.monotonic()))))
                    self._socket, self._leave = connection, leave.pop_all()
            except websockets.InvalidURI:
                raise ConfigError(f"invalid address {self._address!r}; expected ws://host:port.") from None
            except (OSError, websockets.WebSocketException) as error:
                status = error.response.status_code if isinstance(error, websockets.InvalidStatus) else None
                if status is not None and status != _UNAVAILABLE:
                    hint = " Check VLA_API_KEY." if status in (401, 403) else ""
                    raise ServerError(f"{self._address} rejected the connection with status {status}.{hint}") from None
                reason = f"{self._address} cannot be reached: {error or type(error).__name__}."
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise ServerError(f"{reason} Check that `vla serve` is running at this address.") from None
                if on_wait is not None:
                    on_wait(reason, remaining)
                    on_wait = None
                time.sleep(_RETRY_S)

    def _identify(self, metadata: dict[str, Any]) -> None:
        """Store the server's metadata. ServerError if its policy differs from that of the first connection."""
        for name in _IDENTITY:
            if name not in metadata:
                raise ServerError(f"{self._address} is not a `vla serve` server: its metadata has no {name!r}.")
            if self.metadata and wire.to_msgpack(metadata[name]) != wire.to_msgpack(self.metadata[name]):
                raise ServerError(f"{self._address} now serves another policy: its {name!r} has changed.")
        self.metadata = metadata


@contextlib.contextmanager
def _cut_at(deadline: float, connection: ClientConnection) -> Iterator[None]:
    """Shut down `connection` if the block does not end by the deadline, because `send` has no timeout."""

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
        raise ServerError(f"the server sent {str(message)[:200]!r}; expected a msgpack map.")
    return dict(values)
