"""`vla serve`: a policy behind a socket.

Owns: the process: load, listen, stop in good order. The protocols are `app`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import socket
import sys
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vla import __version__
from vla.config import ServeConfig, check
from vla.errors import ConfigError
from vla.policy import Policy
from vla.serving.app import PolicyApp
from vla.serving.batcher import Batcher
from vla.support.sockets import BACKLOG, listen


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; requests that are being answered then still are.

    Raises:
        ConfigError: the address cannot be listened on, half of a TLS pair is missing, or chunks are to be averaged.
        VLAError: the policy cannot be loaded.
    """
    check(config)
    for path in (config.certificate, config.private_key):
        if path is not None and not path.is_file():
            raise ConfigError(f"there is no file {path}.")
    logging.basicConfig(format="%(asctime)s %(message)s")
    policy = Policy.from_pretrained(
        config.policy, config.device, config.unnorm_key, config.n_action_steps, config.decoding
    )
    listener = listen(config.host, config.port)
    policy.warm_up()
    app = None
    batcher = Batcher(policy, config.max_batch, config.max_queue, lambda size: app.metrics.batch(size) if app else None)
    app = PolicyApp(batcher, config, describe(policy), os.environ.get("VLA_API_KEY") or None)
    secure = "s" if config.certificate else ""
    host, port = listener.getsockname()[:2]
    print(f"serving {config.policy!r} at http{secure}://{host}:{port}/act and ws{secure}://{host}:{port}", flush=True)
    server = _Server(settings(app, config), app)
    try:
        server.run([listener])
    finally:
        batcher.close()


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


class _Server(uvicorn.Server):
    """Answers what has been asked before it closes connections; a signal then has the exit status that it should."""

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
