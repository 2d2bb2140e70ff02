"""The HTTP server of `vla serve`: uvicorn's settings, a graceful stop, and the policy's metadata for clients."""

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

#: Timeout for a client's answer to a ping. With uvicorn's default of 20 s, episodes of vla-eval would end: its client
#: does not answer while it resets a simulator, which takes a minute on a slow machine.
PING_TIMEOUT_S = 600.0


def describe(policy: Policy) -> dict[str, Any]:
    """The metadata of a policy that clients receive when they connect."""
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
    """sha256 over about 64 numbers of every tensor, which is fast and detects other weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        few = tensor.flatten()[:: max(1, tensor.numel() // 64)]
        digest.update(name.encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def settings(app: PolicyApp, config: ServeConfig) -> uvicorn.Config:
    """uvicorn's settings."""
    return uvicorn.Config(
        app.asgi,
        http=_with_header_timeout(config.patience_s),
        ws="websockets-sansio",
        ws_max_size=int(config.max_request_mb * 2**20),
        ws_per_message_deflate=False,
        ws_ping_timeout=PING_TIMEOUT_S,
        backlog=BACKLOG,
        timeout_keep_alive=int(max(1, config.patience_s)),
        timeout_graceful_shutdown=5,
        ssl_certfile=config.certificate,
        ssl_keyfile=config.private_key,
        log_level="warning",
        access_log=False,
    )


class Server(uvicorn.Server):
    """A uvicorn server that answers pending requests before it closes connections. uvicorn closes websockets first."""

    def __init__(self, config: uvicorn.Config, app: PolicyApp) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        print("stopping after the pending requests are answered", file=sys.stderr, flush=True)
        await self._app.drain()
        await asyncio.sleep(0.05)  # until the last replies are sent
        await super().shutdown(sockets)


def _with_header_timeout(patience_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with a timeout for request headers, against slowloris attacks. uvicorn has no setting or
    hook for it."""

    class WithHeaderTimeout(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(patience_s, self._close_if_idle, None)

        def on_response_complete(self) -> None:
            self.loop.call_later(patience_s, self._close_if_idle, self.cycle)
            super().on_response_complete()  # may begin the next request

        def _close_if_idle(self, last: Any) -> None:
            """Close the connection if no request has begun since `last`. Websockets have another protocol object by
            then and stay open."""
            if self.cycle is last and not self.transport.is_closing() and self.transport.get_protocol() is self:
                self.transport.close()

    return WithHeaderTimeout
