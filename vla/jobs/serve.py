"""`vla serve`: serve a policy to robot clients."""

from __future__ import annotations

import logging
import os

from vla.config import ServeConfig, check
from vla.errors import ConfigError
from vla.policy import Policy
from vla.serving.app import PolicyApp
from vla.serving.batcher import Batcher
from vla.serving.server import Server, describe, settings
from vla.support.sockets import listen


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM. Pending requests are answered before the server stops.

    Raises:
        ConfigError: the address is not available, a TLS file is missing, or temporal ensembling is configured.
        VLAError: the policy cannot be loaded.
    """
    check(config)
    for path in (config.certificate, config.private_key):
        if path is not None and not path.is_file():
            raise ConfigError(f"the file {path} does not exist.")
    logging.basicConfig(format="%(asctime)s %(message)s")
    policy = Policy.from_pretrained(
        config.policy, config.device, config.unnorm_key, config.n_action_steps, config.decoding, config.dtype
    )
    listener = listen(config.host, config.port)
    policy.warm_up()
    batcher = Batcher(policy, config.max_batch, config.max_queue)
    app = PolicyApp(batcher, config, describe(policy), os.environ.get("VLA_API_KEY") or None)
    secure = "s" if config.certificate else ""
    host, port = listener.getsockname()[:2]
    http, ws = f"http{secure}://{host}:{port}", f"ws{secure}://{host}:{port}"
    print(f"serving {config.policy!r} at {http}/act and {ws}; for vla-eval at {ws}/vla-eval", flush=True)
    server = Server(settings(app, config), app)
    try:
        server.run([listener])
    finally:
        batcher.close()
