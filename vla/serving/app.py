"""The two protocols, health and metrics, as one ASGI application.

Owns: what stock clients of OpenVLA (`POST /act`) and openpi (websocket, msgpack) see, errors included, and who may ask
what: keys and sizes. It does not know how an answer is found (`batcher`) or what keys mean (`requests`).

Errors. OpenVLA's clients look for the text "error" with status 200, openpi's for a text message before the connection
closes with 1011; both get that. A client that adds `?errors=plain` to the address gets a status code and {"error":
message} instead, and on a websocket {"error": message} with the connection left open. What was wrong with a request is
always said; a traceback only where the server was started with `--tracebacks`. Requests that are too large, too slow,
without the key or too many are refused by status code in any case: no stock server knows them. Whatever the client
sees, the log has a line of it (`refusals`).
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from vla.config import ServeConfig
from vla.errors import ServerError, VLAError
from vla.policy.session import Draft
from vla.serving import requests, wire
from vla.serving.batcher import Answer, Batcher
from vla.serving.metrics import Metrics
from vla.serving.refusals import Refusals

log = logging.getLogger("vla.serve")

_LARGE = 2**20  # bytes that take longer to decode than a thread takes to start
_TOO_LARGE = 1009  # a websocket's code for it
_OPENPI_REASON = "Internal server error. Traceback included in previous frame."


class PolicyApp:
    """Serves `batcher`'s policy. `asgi` is the application; `drain` lets what is being answered end."""

    def __init__(self, batcher: Batcher, config: ServeConfig, metadata: dict[str, Any], key: str | None = None) -> None:
        self._batcher, self._config, self._key = batcher, config, key
        self._hello = wire.to_msgpack(metadata)
        self.metrics = Metrics(waiting=lambda: batcher.waiting)
        self._refusals = Refusals()
        self._active, self.draining = 0, False
        self.asgi = Starlette(
            routes=[
                Route("/act", self._act, methods=["POST"]),
                Route("/healthz", self._health),
                Route("/metrics", self._scrape),
                WebSocketRoute("/{path:path}", self._converse),
            ],
            exception_handlers={HTTPException: self._unknown},
        )

    async def drain(self, patience_s: float = 30.0) -> None:
        """Refuse what comes, and wait for what is being answered."""
        self.draining = True
        deadline = time.monotonic() + patience_s
        while self._active and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._refusals.flush()

    async def _unknown(self, request: HTTPRequest, error: Exception) -> Response:
        """An address or a method that this server does not have."""
        assert isinstance(error, HTTPException)
        message = f"{error.detail}; POST /act, GET /healthz, GET /metrics and websockets are served here."
        return self._refuse(request, error.status_code, message, error.headers)

    def _refuse(
        self, connection: HTTPConnection, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """The answer to a request that is refused by its status; the log hears of it."""
        self._tell(connection, message)
        return _json({"error": message}, status, headers)

    def _tell(self, connection: HTTPConnection, message: str) -> bool:
        """Have the log hear of a refusal, unless it has heard enough of the kind."""
        who = connection.client.host if connection.client else "an unknown client"
        protocol = connection.scope.get("method", "websocket")
        return self._refusals.tell(who, f"{protocol} {connection.url.path}", message)

    async def _health(self, request: HTTPRequest) -> Response:
        return PlainTextResponse("OK\n", 503 if self.draining else 200)

    async def _scrape(self, request: HTTPRequest) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _act(self, request: HTTPRequest) -> Response:
        """OpenVLA's protocol: one action for {"image", ...}, a list of actions for {"full_image", ...} and the rest."""
        if (refused := self._refused(request)) is not None:
            return refused
        plain = request.query_params.get("errors") == "plain"
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._config.patience_s):
                body = await self._body(request)
        except TimeoutError:
            return self._refuse(request, 408, f"the request did not arrive within {self._config.patience_s:g} s.")
        if body is None:
            return self._refuse(request, 413, f"the request is larger than {self._config.max_request_mb:g} MB.")
        try:
            values = await _decode(wire.from_json, body)
            encoded = isinstance(values, dict) and set(values) == {"encoded"}
            if encoded:
                values = await _decode(wire.from_json, values["encoded"])
            answer = await _unless_left(self._answer(values, None, len(body)), request.receive)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            self.metrics.count("openvla", error)
            status, message = self._explain(error, request)
            if plain or status == 503:
                return _json({"error": message}, status, {"Retry-After": "1"} if status == 503 else None)
            return _json("error", 200)
        chunk = np.asarray(answer.prediction.chunks[0], np.float64)  # as OpenVLA's server sends them
        reply = wire.to_json(chunk[0] if "image" in values else list(chunk))
        self.metrics.answered("openvla", time.perf_counter() - begun, answer.seconds)
        return Response(wire.to_json(reply) if encoded else reply, media_type="application/json")

    async def _body(self, request: HTTPRequest) -> bytes | None:
        """The body; None as soon as it is known to be too large."""
        limit, body = self._config.max_request_mb * 2**20, bytearray()
        if int(request.headers.get("content-length") or 0) > limit:
            return None
        async for part in request.stream():
            body += part
            if len(body) > limit:
                return None
        return bytes(body)

    async def _converse(self, socket: WebSocket) -> None:
        """openpi's protocol: the server says who it is, then every binary message is answered by one."""
        if self._refused(socket) is not None:
            await socket.close()  # before it is accepted: status 403
            return
        if self.draining:
            await socket.send_denial_response(self._refuse(socket, 503, "the server is going down."))
            return
        await socket.accept()
        self.metrics.connections.inc()
        try:
            await socket.send_bytes(self._hello)
            await self._requests(socket)
        except (WebSocketDisconnect, ClientDisconnect, RuntimeError):  # the client left, maybe while it was answered
            pass
        finally:
            self.metrics.connections.dec()

    async def _requests(self, socket: WebSocket) -> None:
        plain = socket.query_params.get("errors") == "plain"
        draft: Draft | None = None
        total_ms = None
        mail = _Mail(socket)
        while True:
            message = await mail.receive()
            if message["type"] == "websocket.disconnect":
                if message.get("code") == _TOO_LARGE:
                    self._tell(socket, f"the request is larger than {self._config.max_request_mb:g} MB.")
                return
            begun = time.perf_counter()
            try:
                if message.get("bytes") is None:
                    raise wire.WireError("a request is a binary message (msgpack), got text.")
                values = await _decode(wire.from_msgpack, message["bytes"])
                answer = await _unless_left(self._answer(values, draft, len(message["bytes"])), mail.peek)
            except ClientDisconnect:
                return
            except Exception as error:
                self.metrics.count("openpi", error)
                _, text = self._explain(error, socket)
                if plain:
                    await socket.send_bytes(wire.to_msgpack({"error": text}))
                    continue
                await socket.send_text(text)
                await socket.close(1011, _OPENPI_REASON)
                return
            # Stock clients do not send how many actions they execute; this is the likely number.
            draft = answer.prediction.next_draft[0].after(self._batcher.policy.n_action_steps)
            reply = _openpi_reply(answer, values.get("vla/details") is True)
            reply["server_timing"] = {"infer_ms": 1e3 * (time.perf_counter() - begun)}
            if total_ms is not None:
                reply["server_timing"]["prev_total_ms"] = total_ms
            await socket.send_bytes(wire.to_msgpack(reply))
            total_ms = 1e3 * (time.perf_counter() - begun)
            self.metrics.answered("openpi", total_ms / 1e3, answer.seconds)
            if self.draining:
                await socket.close(1001, "the server is going down.")
                return

    async def _answer(self, values: Any, draft: Draft | None, size: int) -> Answer:
        """The answer to a request of `size` bytes; `draft` is the connection's, unless the request has its own."""
        policy = self._batcher.policy
        if self.draining:
            raise ServerError("the server is going down.")
        read = functools.partial(requests.read, values, policy.robot, policy.horizon, self._config.keys, draft)
        request = await asyncio.to_thread(read) if size > _LARGE else read()
        self._active += 1
        try:
            return await self._batcher.answer(request)
        finally:
            self._active -= 1

    def _explain(self, error: Exception, connection: HTTPConnection) -> tuple[int, str]:
        """Status code and text for a client; a line for the log, or all of it when it is not the client's error."""
        if self._config.tracebacks:
            text = "".join(traceback.format_exception(error))
        elif isinstance(error, VLAError):
            text = str(error)
        else:
            text = "the policy failed; the server's log says why."
        if not isinstance(error, VLAError):
            if self._tell(connection, f"the policy failed: {type(error).__name__}: {error}"):
                log.error("the policy failed", exc_info=error)
            return 500, text
        self._tell(connection, str(error))
        return 503 if isinstance(error, ServerError) else 400, text

    def _refused(self, connection: HTTPConnection) -> Response | None:
        """The answer to one who may not ask: without the key; or, where there is none, a web site that a browser on
        this machine shows (only browsers say an origin)."""
        headers = connection.headers
        if self._key is None:
            origin = headers.get("origin")
            foreign = origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()
            return self._refuse(connection, 403, "other web sites may not use this server.") if foreign else None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        allowed = scheme.lower() in ("api-key", "bearer") and hmac.compare_digest(key.encode(), self._key.encode())
        return None if allowed else self._refuse(connection, 401, "the API key is missing or wrong.")


class _Mail:
    """A websocket's messages, of which the next may be looked at before it is due."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._next: Message | None = None

    async def peek(self) -> Message:
        if self._next is None:
            self._next = await self._socket.receive()
        return self._next

    async def receive(self) -> Message:
        message, self._next = await self.peek(), None
        return message


async def _unless_left(answer: Coroutine[Any, Any, Answer], receive: Callable[[], Awaitable[Message]]) -> Answer:
    """`answer`, which is given up when the client leaves meanwhile (ClientDisconnect): nobody waits for it, and others
    do."""
    answering, hearing = asyncio.create_task(answer), asyncio.ensure_future(receive())
    try:
        await asyncio.wait({answering, hearing}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and hearing.result()["type"].endswith("disconnect"):
            raise ClientDisconnect
        return await answering
    finally:
        hearing.cancel()
        answering.cancel()


async def _decode(decode: Callable[[Any], Any], data: Any) -> Any:
    """Decode where nobody waits for it: a large message would hold up all the others."""
    if isinstance(data, str | bytes) and len(data) > _LARGE:
        return await asyncio.to_thread(decode, data)
    return decode(data)


def _openpi_reply(answer: Answer, details: bool) -> dict[str, Any]:
    """Arrays only where openpi has them: its chunk broker cuts every array of a reply into steps."""
    prediction = answer.prediction
    reply: dict[str, Any] = {"actions": prediction.chunks[0], "policy_timing": {"infer_ms": 1e3 * answer.seconds}}
    if details:
        reply["vla"] = {
            "ids": prediction.ids[0],
            "log_probs": prediction.log_probs[0],
            "entropy": prediction.entropy[0],
            "forwards": prediction.forwards,
        }
    return reply


def _json(value: Any, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(wire.to_json(value), status, headers, media_type="application/json")
