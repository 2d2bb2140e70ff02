"""The log of rejected and failed requests.

Owns: one line per rejection (client, requested address, reason), and a limit on the number of lines, so that a faulty
client does not fill the disk. It does not know protocols.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("vla.serve")

PERIOD_S = 60.0
MOST = 20  # maximum number of lines per period
_LONGEST = 300  # maximum number of characters of an address or reason; both may quote the request


class Refusals:
    """Logs each distinct rejection once per period, and then the number of suppressed lines."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._since = now, now()
        self._logged: set[tuple[str, str, str]] = set()
        self._suppressed = 0

    def log(self, client: str, address: str, reason: str) -> bool:
        """Log that a request to `address` was rejected. Returns False if the line was suppressed."""
        if self._now() - self._since >= PERIOD_S:
            self.flush()
        refusal = (client, address, reason)
        if refusal in self._logged or len(self._logged) >= MOST:
            self._suppressed += 1
            return False
        self._logged.add(refusal)
        log.warning("rejected: %s from %s: %s", _line(address), client, _line(reason))
        return True

    def flush(self) -> None:
        """Log the number of suppressed lines, and begin a new period."""
        if self._suppressed:
            log.warning("%d more rejected requests in the last %.0f s", self._suppressed, self._now() - self._since)
        self._since, self._suppressed = self._now(), 0
        self._logged.clear()


def _line(text: str) -> str:
    """`text` as one printable line of limited length, so that clients cannot forge log lines."""
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
