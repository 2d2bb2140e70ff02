"""The live page: an `OperatorConsole` in a browser.

Owns: the page (`GET /`), its live connection (websocket `/live`), the emergency stop (`POST /stop`, also for `curl`),
the messages, and access control: every client that reaches the port has access, except pages of other web sites. It
does not know robots or policies.

Messages to the browser: `{"robot": ...}` once, `{"status": ...}` ten times per second, `{"error": ...}` if an operator
command is rejected, and every new image as the camera's index (one byte) followed by a JPEG. Messages from the browser:
`{"do": command}`, where the command is "start", "hold", "stop" (the emergency stop), "release" or "new_scene"; and
`{"do": "instruct", "text": ...}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketClose, WebSocketDisconnect

from vla.control.console import OperatorConsole
from vla.errors import ConfigError, VLAError, unknown
from vla.support.pages import templates
from vla.support.sockets import listen

_PERIOD_S = 0.05  # between checks for new images
_STATUS_EVERY = 2  # number of checks between status messages
_LARGEST_COMMAND = 2**16  # bytes
#: The page loads nothing from other servers, and no other page may embed it (clickjacking).
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self' ws: wss:; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


def page(console: OperatorConsole, host: str = "127.0.0.1") -> Starlette:
    """The web application. Browsers may address it by `host`, an IP address, or the name of this machine."""
    html = templates().get_template("live.html").render()

    async def home(_: Request) -> Response:
        return HTMLResponse(html, headers=_HEADERS)

    async def stop(_: Request) -> Response:
        console.emergency_stop()
        return PlainTextResponse("The emergency stop is pressed.\n")

    async def live(connection: WebSocket) -> None:
        await connection.accept()
        tasks = [asyncio.create_task(job(console, connection)) for job in (_show, _obey)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(WebSocketDisconnect):
                [task.result() for task in done]
        finally:
            [task.cancel() for task in tasks]

    routes = [Route("/", home), Route("/stop", stop, methods=["POST"]), WebSocketRoute("/live", live)]
    return Starlette(routes=routes, middleware=[Middleware(_OurPagesOnly, host=host)])


@contextlib.contextmanager
def serve_in_thread(app: ASGIApp, host: str, port: int) -> Iterator[str]:
    """Serve `app` in a thread, without changing signal handlers. Yields the URL to open.

    Args:
        port: 0: any free port.
    Raises:
        ConfigError: the address or port is not available.
    """
    listener = listen(host, port, "Choose another --port (0: any free port), or deploy with --no-ui.")
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        ws_max_size=_LARGEST_COMMAND,
        ws_per_message_deflate=False,  # most messages are JPEGs
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="vla-page")
    thread.start()
    try:
        yield f"http://{_reachable(host)}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=5)
        listener.close()


async def _show(console: OperatorConsole, connection: WebSocket) -> None:
    """Send status and images until cancelled. On a slow connection, some are skipped."""
    await connection.send_text(_message("robot", console.describe()))
    shown: dict[str, bytes] = {}
    number = check = 0
    while True:
        for index, camera in enumerate(console.cameras):
            jpeg = console.jpeg(camera)
            if jpeg is not None and shown.get(camera) is not jpeg:
                shown[camera] = jpeg
                await connection.send_bytes(bytes([index]) + jpeg)
        if check % _STATUS_EVERY == 0:
            status = console.status(since=number)
            number = max((tick["n"] for tick in status["ticks"]), default=number)
            await connection.send_text(_message("status", status))
        check += 1
        await asyncio.sleep(_PERIOD_S)


async def _obey(console: OperatorConsole, connection: WebSocket) -> None:
    """Execute the operator's commands until the connection is closed."""
    while (message := await connection.receive())["type"] != "websocket.disconnect":
        try:
            _execute(console, message.get("text"))
        except VLAError as error:
            await connection.send_text(_message("error", str(error)))


def _execute(console: OperatorConsole, text: str | None) -> None:
    try:
        command = json.loads(text or "")
    except (ValueError, RecursionError):
        raise ConfigError("an operator command must be a JSON object.") from None
    if not isinstance(command, dict) or not isinstance(command.get("do"), str):
        raise ConfigError('an operator command must have the form {"do": "hold"}.')
    commands: dict[str, Callable[[], None]] = {
        "start": console.start,
        "hold": console.hold,
        "stop": console.emergency_stop,
        "release": console.release,
        "new_scene": console.new_scene,
        "instruct": lambda: console.instruct(str(command.get("text", ""))),
    }
    if command["do"] not in commands:
        raise ConfigError(unknown("operator command", command["do"], commands))
    commands[command["do"]]()


def _message(kind: str, content: object) -> str:
    return json.dumps({kind: content}, default=str, separators=(",", ":"))


class _OurPagesOnly:
    """Rejects requests of other web sites.

    A request's Origin must equal its Host, against cross-site requests. Its Host must be an IP address or a name of
    this machine, against DNS rebinding (another site's name that resolves to this machine).
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        name = socket.gethostname().lower()
        self._app, self._names = app, {"localhost", host.lower(), name, f"{name}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(code=1008, reason=refusal)(scope, receive, send)
        else:
            await PlainTextResponse(refusal + "\n", 403)(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        except ValueError:
            return "the Host or Origin header is invalid."
        if name not in self._names and not _is_address(name):
            return f"{name!r} is not a name of this machine: use its IP address, or deploy with --host {name}."
        return "requests from pages of other web sites are not allowed." if foreign else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _reachable(host: str) -> str:
    """`host` for a URL. For all interfaces, the address of the interface with the default route."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; only selects the interface
            host = probe.getsockname()[0]
    return f"[{host}]" if ":" in host else host
