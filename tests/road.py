"""A simulated bad network: a TCP proxy with delay, loss and disconnections.

Loss is simulated as clients see it: all later data wait for the retransmission (200 ms on Linux).
"""

import contextlib
import queue
import random
import socket
import threading
import time

RETRANSMISSION_S = 0.2


class Road:
    """Forwards connections from `self.port` to `port` on this machine; `cut` breaks all open connections."""

    def __init__(self, port: int, delay_s: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        self._target, self._delay, self._loss, self._random = port, delay_s, loss, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Road":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._lane(near, far)
                self._lane(far, near)

    def _lane(self, source: socket.socket, sink: socket.socket) -> None:
        """Forward one direction with two threads, one for receiving and one for sending at the due time."""
        waiting: queue.SimpleQueue = queue.SimpleQueue()

        def take() -> None:
            due = 0.0
            with contextlib.suppress(OSError):
                while part := source.recv(2**16):
                    lost = RETRANSMISSION_S if self._random.random() < self._loss else 0.0
                    due = max(due, time.monotonic() + self._delay + lost)  # TCP preserves the order
                    waiting.put((due, part))
            waiting.put((0.0, b""))

        def give() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, part = waiting.get()
                    if not part:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    time.sleep(max(0.0, due - time.monotonic()))
                    sink.sendall(part)

        for work in (take, give):
            threading.Thread(target=work, daemon=True).start()
