"""Example wire protocols; importing this module registers them (`--plugin tests.toy_protocol`)."""

from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from vla.serving import wire
from vla.serving.protocols import PROTOCOLS, WireProtocol


@PROTOCOLS.register("plain")
class Plain(WireProtocol):
    """`POST /plain` with plain JSON -> {"actions": [[...], ...]}, and the same as text messages on `/talk`."""

    def routes(self):
        return [Route("/plain", self.post, methods=["POST"]), WebSocketRoute("/talk", self.talk)]

    async def post(self, request):
        try:
            values = wire.from_json(await self.app.body(request))
            answer = await self.app.answer(values, request.receive)
        except Exception as error:
            status, reason = self.app.failed("plain", error, request)
            return JSONResponse({"detail": reason}, status)
        self.app.metrics.answered("plain", answer.seconds, answer.seconds)
        return JSONResponse({"actions": answer.prediction.chunks[0].tolist()})

    async def talk(self, socket):
        await socket.accept()
        while True:
            answer = await self.app.answer(wire.from_json(await socket.receive_text()), socket.receive)
            await socket.send_json({"actions": answer.prediction.chunks[0].tolist()})
