"""A policy server in a thread of the test process."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vla.config import ServeConfig
from vla.support.sockets import listen

if TYPE_CHECKING:
    from vla.policy import Policy
    from vla.serving.app import PolicyApp


@dataclasses.dataclass
class Served:
    """A running server: its policy, app and port."""

    policy: Policy
    app: PolicyApp
    port: int

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}"


@pytest.fixture
def policy(tiny):
    from vla.policy import Policy

    return Policy(*tiny)


@pytest.fixture
def serving(policy):
    """`with serving(config values...) as served`: serve a tiny random policy."""
    import uvicorn

    from vla.serving import server as serving
    from vla.serving.app import PolicyApp
    from vla.serving.batcher import Batcher

    @contextlib.contextmanager
    def start(key: str | None = None, port: int = 0, policy: Policy = policy, **values):
        config = ServeConfig(**values)
        batcher = Batcher(policy, config.max_batch, config.max_queue)
        app = PolicyApp(batcher, config, serving.describe(policy), key)
        listener = listen("127.0.0.1", port)
        server = uvicorn.Server(serving.settings(app, config))
        server.install_signal_handlers = lambda: None  # signals can only be handled in the main thread
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Served(policy, app, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            listener.close()
            batcher.close()
            assert not thread.is_alive()

    return start
