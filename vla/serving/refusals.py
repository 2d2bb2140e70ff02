"""What the log hears of requests that were refused or failed.

Owns: one line per refusal (who, what, why), and a bound on how many: a broken client that asks fifty times a second
fills no disk. It does not know protocols.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("vla.serve")

PERIOD_S = 60.0
MOST = 20  # different refusals that are told per period
_LONGEST = 300  # characters of a reason: it may quote what the client sent


class Refusals:
    """Logs the first of equal refusals in each period; those after it are counted, and the next period says so."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._since = now, now()
        self._told: set[tuple[str, str, str]] = set()
        self._silent = 0

    def tell(self, who: str, what: str, why: str) -> bool:
        """`what` of the client at `who` was refused because of `why`; whether the log has heard of it."""
        if self._now() - self._since >= PERIOD_S:
            self.flush()
        refusal = (who, what, why)
        if refusal in self._told or len(self._told) >= MOST:
            self._silent += 1
            return False
        self._told.add(refusal)
        log.warning("refused: %s from %s: %s", _line(what), who, _line(why))
        return True

    def flush(self) -> None:
        """Say how many refusals were not told, and begin another period."""
        if self._silent:
            log.warning("%d more refusals in the last %.0f s", self._silent, self._now() - self._since)
        self._since, self._silent = self._now(), 0
        self._told.clear()


def _line(text: str) -> str:
    """One printable line of bounded length: clients must not be able to forge lines of a log."""
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
