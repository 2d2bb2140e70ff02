"""openpi's websocket protocol (Physical Intelligence: `openpi-client`, `websocket_client_policy.py`).

Binary messages of msgpack with numpy arrays, on any path:

* On connection, the server sends its metadata (`vla.serving.server.describe`).
* Request: a flat map with the keys of LIBERO, DROID or ALOHA, or {"pixels", "agent_pos", "prompt"}
  (`vla.serving.requests`).
* Reply: {"actions": float32 [H, D], "policy_timing", "server_timing"}. It has no other arrays, because openpi's chunk
  broker slices every array of a reply.
* Error: a text message; then the connection is closed with code 1011, and stock clients raise RuntimeError. With
  `?errors=plain` in the URL, the reply is {"error": message}, and the connection stays open.

`vla.serving.client.RemotePolicy` also sends the draft of the chunk (`vla.serving.requests`), and "vla/details" to
receive tokens and log-likelihoods: {"vla": {"ids", "log_probs", "entropy", "forwards"}}.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from vla.policy.session import Draft
from vla.serving import wire
from vla.serving.batcher import Answer
from vla.serving.protocols.base import PROTOCOLS, Inbox, WireProtocol, decode

_REASON = "Internal server error. Traceback included in previous frame."  # identical to openpi's server


@PROTOCOLS.register("openpi")
class OpenPI(WireProtocol):
    """Requests and replies on a websocket."""

    def routes(self) -> list[WebSocketRoute]:
        return [WebSocketRoute("/{path:path}", self._converse)]

    async def _converse(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_bytes(wire.to_msgpack(self.app.metadata))
        plain = socket.query_params.get("errors") == "plain"
        draft: Draft | None = None
        total_ms = None
        inbox = Inbox(socket, self.app)
        while (message := await inbox.receive()) is not None:
            start = time.perf_counter()
            try:
                if isinstance(message, str):
                    raise wire.WireError("a request is a binary message (msgpack), got text.")
                values = await decode(wire.from_msgpack, message)
                if isinstance(values, dict) and values.get("type") == "hello":
                    raise wire.WireError("this is vla-eval's protocol; its address ends with /vla-eval.")
                answer = await self.app.answer(values, inbox.peek, draft, len(message))
            except Exception as error:
                _, text = self.app.failed("openpi", error, socket)
                if plain:
                    await socket.send_bytes(wire.to_msgpack({"error": text}))
                    continue
                await socket.send_text(text)
                await socket.close(1011, _REASON)
                return
            # Stock clients do not report how many actions they execute, so assume n_action_steps.
            draft = answer.prediction.next_draft[0].after(self.app.policy.n_action_steps)
            reply = _reply(answer, values.get("vla/details") is True)
            reply["server_timing"] = {"infer_ms": 1e3 * (time.perf_counter() - start)}
            if total_ms is not None:
                reply["server_timing"]["prev_total_ms"] = total_ms
            await socket.send_bytes(wire.to_msgpack(reply))
            total_ms = 1e3 * (time.perf_counter() - start)
            self.app.metrics.answered("openpi", total_ms / 1e3, answer.seconds)
            if self.app.draining:
                await socket.close(1001, "the server is shutting down.")
                return


def _reply(answer: Answer, details: bool) -> dict[str, Any]:
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
