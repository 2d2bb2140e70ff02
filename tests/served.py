"""A real server in a thread of the test's process."""

import contextlib
import dataclasses
import threading
import time

import pytest
import uvicorn

from vla.config import ServeConfig
from vla.policy import Policy
from vla.serving.app import PolicyApp
from vla.serving.batcher import Batcher
from vla.serving.server import describe, settings
from vla.support.sockets import listen


@dataclasses.dataclass
class Served:
    """A running server: the policy behind it, its app, and where it listens."""

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
def policy(nano):
    return Policy(*nano)


@pytest.fixture
def serving(policy):
    """`with serving(config values...) as served`: serve the random nano policy for a while."""

    @contextlib.contextmanager
    def start(key: str | None = None, port: int = 0, policy: Policy = policy, **values):
        config = ServeConfig(**values)
        app = None
        batcher = Batcher(policy, config.max_batch, config.max_queue, lambda size: app and app.metrics.batch(size))
        app = PolicyApp(batcher, config, describe(policy), key)
        listener = listen("127.0.0.1", port)
        server = uvicorn.Server(settings(app, config))
        server.install_signal_handlers = lambda: None  # not the main thread
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
