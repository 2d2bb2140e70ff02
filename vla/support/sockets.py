"""Listening sockets."""

from __future__ import annotations

import socket

from vla.errors import ConfigError

BACKLOG = 1024


def listen(host: str, port: int, fix: str = "Choose another --host or --port (0: any free port).") -> socket.socket:
    """A socket that listens on `host:port`. ConfigError (with the remedy `fix`) if the address is not available."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"port must be between 0 and 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror or error}). {fix}") from None
