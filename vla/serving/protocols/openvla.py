"""OpenVLA's and OpenVLA-OFT's REST protocol (Kim et al., 2024 and 2025: `vla-scripts/deploy.py`).

`POST /act` with a JSON object whose arrays are encoded by json-numpy:

* Request: any keys of `vla.serving.requests`. OpenVLA's clients send {"image", "instruction", "unnorm_key"?} and
  OpenVLA-OFT's clients {"full_image", "wrist_image"?, "state"?, "instruction"}. Clients that do not patch their JSON
  library wrap the request in a string: {"encoded": "<JSON>"}.
* Reply: one action, float64 [D], if the request has "image"; otherwise, the chunk as a list of actions. The reply to an
  encoded request is a JSON string that contains JSON.
* Error: status 200 and the text "error", as stock clients expect. With `?errors=plain` in the URL, status 400 or 500
  and {"error": message}. An overloaded server replies with 503 in both cases.
"""

from __future__ import annotations

import time

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vla.serving import wire
from vla.serving.protocols.base import PROTOCOLS, WireProtocol, decode, json_response


@PROTOCOLS.register("openvla")
class OpenVLA(WireProtocol):
    """`POST /act`."""

    def routes(self) -> list[Route]:
        return [Route("/act", self._act, methods=["POST"])]

    async def _act(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            body = await self.app.body(request)
            values = await decode(wire.from_json, body)
            encoded = isinstance(values, dict) and set(values) == {"encoded"}
            if encoded:
                values = await decode(wire.from_json, values["encoded"])
            answer = await self.app.answer(values, request.receive, size=len(body))
        except Exception as error:
            status, message = self.app.failed("openvla", error, request)
            if status == 503:
                return json_response({"error": message}, status, {"Retry-After": "1"})
            if request.query_params.get("errors") == "plain":
                return json_response({"error": message}, status)
            return json_response("error")
        chunk = np.asarray(answer.prediction.chunks[0], np.float64)  # float64, as from OpenVLA's server
        reply = wire.to_json(chunk[0] if "image" in values else list(chunk))
        self.app.metrics.answered("openvla", time.perf_counter() - start, answer.seconds)
        return Response(wire.to_json(reply) if encoded else reply, media_type="application/json")
