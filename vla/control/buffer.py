"""Actions by the tick that they are for.

Owns: what is to be executed when, and how a new chunk takes over from the last one (the seam). Actions that arrive too
late for their tick are dropped. It does not know clocks or how chunks are made.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Seam = Literal["switch", "ensemble", "committed"]
SEAMS: tuple[Seam, ...] = ("switch", "ensemble", "committed")
_OLD = 0.01  # coefficient of temporal ensembling (ACT's)


class ChunkBuffer:
    """Chunks laid on the axis of ticks.

    Args:
        seam: "switch" and "committed" execute the newest chunk that speaks about a tick (for "committed" it was decoded
            as a continuation of the one before); "ensemble" averages all chunks that do, with weights exp(-0.01 i),
            i = 0 for the oldest, except the gripper's entry, whose average is no command: there the newest counts.
    """

    def __init__(self, seam: Seam = "switch", gripper: int | None = None) -> None:
        self.seam, self._gripper = seam, gripper
        self._chunks: list[tuple[int, int, np.ndarray]] = []  # task, first tick, actions [H, D]; oldest first
        self._task = 0  # counts them
        self._begun = 0  # actions of the newest chunk, while more of them are to come
        self.late = 0  # actions that came after their tick

    def put(self, chunk: np.ndarray, first: int, now: int, more: bool = False) -> None:
        """Take a chunk [H, D] whose action i is for tick first + i; `now` is the next tick to be executed.

        Where `more` of it is to come, the next call brings the same chunk with more actions, and the chunk before it
        speaks about the ticks that it does not reach yet."""
        known = self._begun
        self.late += int(np.clip(now - first - known, 0, len(chunk) - known))
        past = self._chunks[:-1] if known else self._chunks
        if self.seam != "ensemble" and not more:
            past = []
        self._chunks = [old for old in past if old[1] + len(old[2]) > now] + [(self._task, first, chunk)]
        self._begun = len(chunk) if more else 0

    def new_task(self) -> None:
        """The chunks to come are for another task: those that are there speak only where none of them does."""
        self._task += 1

    def complete(self) -> None:
        """Nothing more of the newest chunk comes."""
        self._begun = 0

    def at(self, tick: int) -> np.ndarray | None:
        """The action for `tick`, float32 [D]; None when no chunk speaks about it (an underrun)."""
        spoken = [(task, chunk[tick - first]) for task, first, chunk in self._chunks if 0 <= tick - first < len(chunk)]
        if not spoken:
            return None
        votes = [action for task, action in spoken if task == spoken[-1][0]]
        if self.seam != "ensemble":
            return votes[-1]
        weights = np.exp(-_OLD * np.arange(len(votes)))
        action = np.average(votes, axis=0, weights=weights).astype(np.float32)
        if self._gripper is not None:
            action[self._gripper] = votes[-1][self._gripper]
        return action

    def ahead(self, tick: int) -> int:
        """Consecutive ticks from `tick` on that have an action."""
        return max((first + len(chunk) - tick for _, first, chunk in self._chunks), default=0)

    def clear(self) -> None:
        self._chunks, self._begun = [], 0
