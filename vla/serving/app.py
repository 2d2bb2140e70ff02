"""The application of `vla serve`: all wire protocols on one port, health and metrics.

Owns: the common parts of all protocols: API keys and origins, size and time limits, draining, the log, and error texts
for clients. It does not know the messages of a protocol (`vla.serving.protocols`), how a batch is decoded
(`vla.serving.batcher`) or the keys of a request (`vla.serving.requests`).

HTTP requests that are too large, too slow or unauthorised are rejected by status in every protocol. Rejections are
logged (`vla.serving.refusals`). Clients receive tracebacks only with `--tracebacks`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from vla.config import ServeConfig
from vla.errors import ServerError, VLAError
from vla.policy import Policy
from vla.policy.session import Draft
from vla.serving import requests
from vla.serving.batcher import Answer, Batcher
from vla.serving.metrics import Metrics
from vla.serving.protocols import PROTOCOLS
from vla.serving.protocols.base import LARGE, json_response
from vla.serving.refusals import Refusals

log = logging.getLogger("vla.serve")


class PolicyApp:
    """The ASGI application `asgi`, which serves the batcher's policy in all registered protocols.

    Attributes:
        config: the limits, and the names of request keys.
        policy: the policy.
        metadata: the description of the policy for clients.
        metrics: the metrics at `/metrics`.
        draining: whether the server is shutting down and rejects new requests.
    """

    def __init__(self, batcher: Batcher, config: ServeConfig, metadata: dict[str, Any], key: str | None = None) -> None:
        self._batcher, self._key = batcher, key
        self.config = config
        self.policy: Policy = batcher.policy
        self.metadata = metadata
        self.metrics = Metrics(waiting=lambda: batcher.waiting)
        batcher.on_batch = self.metrics.batch
        self.draining = False
        self._refusals = Refusals()
        self._active = 0
        routes = [route for name in PROTOCOLS for route in PROTOCOLS.get(name)(self).routes()]
        metrics = Route("/metrics", self._scrape)
        for route in (*routes, metrics):
            route.app = self._guarded(route.app)
        routes += [Route("/healthz", self._health), metrics]
        routes.sort(key=lambda route: "{path:path}" in route.path)  # a route for any path comes last
        self._offer = _offer(routes)
        self.asgi = Starlette(
            routes=routes, exception_handlers={HTTPException: self._refused, ClientDisconnect: _disconnected}
        )

    async def drain(self, patience_s: float = 30.0) -> None:
        """Reject new requests, and wait up to `patience_s` seconds for the replies to pending requests."""
        self.draining = True
        deadline = time.monotonic() + patience_s
        while self._active and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._refusals.flush()

    # Used by protocols.

    @property
    def too_large(self) -> str:
        """The error text for a request that exceeds the maximum size."""
        return f"the request is larger than {self.config.max_request_mb:g} MB."

    async def body(self, request: Request) -> bytes:
        """The body of an HTTP request. HTTPException if it is too large or does not arrive in time."""
        limit, body = self.config.max_request_mb * 2**20, bytearray()
        if int(request.headers.get("content-length") or 0) > limit:
            raise HTTPException(413, self.too_large)
        try:
            async with asyncio.timeout(self.config.patience_s):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise HTTPException(413, self.too_large)
        except TimeoutError:
            message = f"the request did not arrive within {self.config.patience_s:g} s."
            raise HTTPException(408, message) from None
        return bytes(body)

    async def answer(
        self, values: Any, receive: Callable[[], Awaitable[Message]], draft: Draft | None = None, size: int = 0
    ) -> Answer:
        """Answer a decoded request.

        Args:
            values: the request, as in `vla.serving.requests`.
            receive: waits for the client's next message. If it is a disconnect, the request is cancelled.
            draft: draft of the chunk, if the request has none.
            size: bytes of the request; large requests are read in a thread.
        Raises:
            ServerError: the request queue is full, or the server is shutting down.
            ClientDisconnect: the client disconnected.
            VLAError: the request is invalid.
        """
        if self.draining:
            raise ServerError("the server is shutting down.")
        read = functools.partial(requests.read, values, self.policy.robot, self.policy.horizon, self.config.keys, draft)
        return await _unless_disconnected(self._answer(read, size), receive)

    def failed(self, protocol: str, error: Exception, connection: HTTPConnection) -> tuple[int, str]:
        """Count and log an error. Returns the HTTP status and the error text for the client.

        ClientDisconnect and HTTPException are re-raised: the application handles them in the same way for all
        protocols.
        """
        if isinstance(error, ClientDisconnect | HTTPException):
            raise error
        self.metrics.count(protocol, error)
        if self.config.tracebacks:
            text = "".join(traceback.format_exception(error))
        elif isinstance(error, VLAError):
            text = str(error)
        else:
            text = "the policy failed; the server's log has the error."
        if not isinstance(error, VLAError):
            if self.log_refusal(connection, f"the policy failed: {type(error).__name__}: {error}"):
                log.error("the policy failed", exc_info=error)
            return 500, text
        self.log_refusal(connection, str(error))
        return 503 if isinstance(error, ServerError) else 400, text

    def log_refusal(self, connection: HTTPConnection, message: str) -> bool:
        """Log a rejected request. Returns False if the line was suppressed (`Refusals`)."""
        client = connection.client.host if connection.client else "an unknown client"
        method = connection.scope.get("method", "websocket")
        return self._refusals.log(client, f"{method} {connection.url.path}", message)

    # Not used by protocols.

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """`app`, restricted to authorised clients."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            connection = HTTPConnection(scope)
            refusal = self._authorise(connection)
            if scope["type"] == "http":
                response = app if refusal is None else self._refuse(connection, *refusal)
                await response(scope, receive, send)
                return
            socket = WebSocket(scope, receive, send)
            if refusal is not None:
                self.log_refusal(connection, refusal[1])
                await socket.close()  # before it is accepted: status 403
            elif self.draining:
                await socket.send_denial_response(self._refuse(connection, 503, "the server is shutting down."))
            else:
                # The client may disconnect at any time; sending to it then raises RuntimeError.
                disconnected = contextlib.suppress(WebSocketDisconnect, RuntimeError)
                with self.metrics.connections.track_inprogress(), disconnected:
                    await app(scope, receive, send)

        return guarded

    def _authorise(self, connection: HTTPConnection) -> tuple[int, str] | None:
        """Status and error text if the client is not authorised, else None. With an API key, the request must have it.
        Without one, requests from pages of other web sites (recognised by their origin) are rejected."""
        headers = connection.headers
        if self._key is None:
            origin = headers.get("origin")
            foreign = origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()
            return (403, "requests from pages of other web sites are not allowed.") if foreign else None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":  # for clients that can send a key only as a password in the URL
            key = _password(key)
        known = scheme.lower() in ("api-key", "bearer", "basic")
        allowed = known and hmac.compare_digest(key.encode(), self._key.encode())
        return None if allowed else (401, "the API key is missing or wrong.")

    async def _answer(self, read: Callable[[], requests.Request], size: int) -> Answer:
        request = await asyncio.to_thread(read) if size > LARGE else read()
        self._active += 1
        try:
            return await self._batcher.answer(request)
        finally:
            self._active -= 1

    async def _refused(self, request: Request, error: Exception) -> Response:
        """The reply to an HTTPException from `body`, or from Starlette for an unknown address or method."""
        assert isinstance(error, HTTPException)
        offer = f"; this server has {self._offer}." if error.status_code in (404, 405) else ""
        return self._refuse(request, error.status_code, error.detail + offer, error.headers)

    def _refuse(
        self, connection: HTTPConnection, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        self.log_refusal(connection, message)
        return json_response({"error": message}, status, headers)

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("OK\n", 503 if self.draining else 200)

    async def _scrape(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _password(credentials: str) -> str:
    """The password in the credentials of the Authorization scheme Basic; "" if they are invalid."""
    with contextlib.suppress(ValueError):
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    return ""


def _offer(routes: list[Route | WebSocketRoute]) -> str:
    """The served addresses, for error texts: "POST /act, GET /healthz and websockets"."""
    addresses = [
        f"{'/'.join(sorted((route.methods or set()) - {'HEAD'}))} {route.path}"
        for route in routes
        if isinstance(route, Route)
    ]
    return f"{', '.join(addresses)} and websockets"


async def _disconnected(connection: Any, error: Exception) -> Any:
    """The response after a disconnect: status 499; None on a websocket."""
    return Response(status_code=499) if connection.scope["type"] == "http" else None


async def _unless_disconnected(
    answer: Coroutine[Any, Any, Answer], receive: Callable[[], Awaitable[Message]]
) -> Answer:
    """Await `answer`; cancel it and raise ClientDisconnect if the client disconnects first."""
    answering, listening = asyncio.create_task(answer), asyncio.ensure_future(receive())
    try:
        await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and listening.result()["type"].endswith("disconnect"):
            raise ClientDisconnect
        return await answering
    finally:
        listening.cancel()
        answering.cancel()
