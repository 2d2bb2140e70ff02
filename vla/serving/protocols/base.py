"""The interface of wire protocols.

Owns: the interface between a protocol and the application (`vla.serving.app`), and the registry. A protocol defines its
routes, the envelope of its messages, and the format of replies and errors. The application handles API keys, limits,
draining and the log for all protocols.

To add a protocol, decorate it with `@PROTOCOLS.register("my-protocol")`, and run `vla --plugin my_module serve`.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket

from vla.serving import wire
from vla.support.registry import Registry

if TYPE_CHECKING:
    from vla.serving.app import PolicyApp

LARGE = 2**20  # bytes; larger messages are decoded in a thread
_TOO_LARGE = 1009  # websocket close code: message too large


class WireProtocol(abc.ABC):
    """A wire protocol.

    Attributes:
        app: the application. Protocols use its `body`, `answer` and `failed`.
    """

    def __init__(self, app: PolicyApp) -> None:
        self.app = app

    @abc.abstractmethod
    def routes(self) -> Sequence[Route | WebSocketRoute]:
        """The Starlette routes of this protocol. The application checks the API key before it calls them."""


PROTOCOLS: Registry[type[WireProtocol]] = Registry("wire protocol")


class Inbox:
    """The messages of a websocket client."""

    def __init__(self, socket: WebSocket, app: PolicyApp) -> None:
        self._socket, self._app = socket, app
        self._next: Message | None = None

    async def peek(self) -> Message:
        """Wait for the next message, which may be a disconnect, without removing it."""
        if self._next is None:
            self._next = await self._socket.receive()
        return self._next

    async def receive(self) -> bytes | str | None:
        """The next binary or text message; None if the client has disconnected."""
        message, self._next = await self.peek(), None
        if message["type"] == "websocket.disconnect":
            if message.get("code") == _TOO_LARGE:
                self._app.log_refusal(self._socket, self._app.too_large)
            return None
        return message["text"] if message.get("bytes") is None else message["bytes"]


async def decode(decoder: Callable[[Any], Any], data: Any) -> Any:
    """`decoder(data)`, in a thread if `data` is large, so that other requests are not delayed."""
    if isinstance(data, str | bytes) and len(data) > LARGE:
        return await asyncio.to_thread(decoder, data)
    return decoder(data)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as JSON, with arrays encoded by json-numpy."""
    return Response(wire.to_json(value), status, headers, media_type="application/json")
