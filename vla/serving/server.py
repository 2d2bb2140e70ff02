"""The HTTP server of a policy: uvicorn's settings, an orderly stop, and the metadata that clients receive.

It does not know the protocols (`vla.serving.app`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vla import __version__
from vla.config import ServeConfig
from vla.policy import Policy
from vla.serving.app import PolicyApp
from vla.support.sockets import BACKLOG


def describe(policy: Policy) -> dict[str, Any]:
    """What a client has to know of a policy: the metadata that a websocket begins with."""
    tokenizer = policy.processor.action_tokenizer.to_dict()
    keys = sorted(policy.network.config.statistics)
    return {
        "vla_version": __version__,
        "robot": policy.robot.to_dict(),
        "horizon": policy.horizon,
        "n_action_steps": policy.n_action_steps,
        "unnorm_keys": keys,
        "unnorm_key": policy.unnorm_key,
        "action_limits": {key: list(policy.for_key(key).action_limits) for key in keys},
        "tokenizer": tokenizer["name"],
        "tokenizer_sha256": hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest(),
        "image_size": policy.network.config.image_size,
        "weights": _fingerprint(policy.network),
    }


def _fingerprint(network: torch.nn.Module) -> str:
    """Tells other weights from these by a few numbers of every tensor: all of a large network's would take minutes."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        few = tensor.flatten()[:: max(1, tensor.numel() // 64)]
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def settings(app: PolicyApp, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn serves `app`: messages of openpi's size, no compression, patience of `config`."""
    return uvicorn.Config(
        app.asgi,
        http=_hurried(config.patience_s),
        ws="websockets-sansio",
        ws_max_size=int(config.max_request_mb * 2**20),
        ws_per_message_deflate=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(max(1, config.patience_s)),
        timeout_graceful_shutdown=5,
        ssl_certfile=config.certificate,
        ssl_keyfile=config.private_key,
        log_level="warning",
        access_log=False,
    )


class Server(uvicorn.Server):
    """Answers pending requests before it closes connections."""

    def __init__(self, config: uvicorn.Config, app: PolicyApp) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        print("stopping: requests that wait are still answered", file=sys.stderr, flush=True)
        await self._app.drain()
        await asyncio.sleep(0.05)  # the last replies are on their way
        await super().shutdown(sockets)


def _hurried(patience_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP for which a client that does not finish the headers of a request in time is gone: uvicorn itself
    would wait for ever (the attack called slowloris)."""

    class Hurried(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(patience_s, self._hurry, None)

        def on_response_complete(self) -> None:
            self.loop.call_later(patience_s, self._hurry, self.cycle)
            super().on_response_complete()  # which may begin the next request

        def _hurry(self, last: Any) -> None:
            """Since the request `last` no other has begun. A websocket has another protocol by then."""
            if self.cycle is last and not self.transport.is_closing() and self.transport.get_protocol() is self:
                self.transport.close()

    return Hurried
