"""Buffer of actions, indexed by tick (control step).

Owns: the action for each tick, and the chunk transition, which determines how a new chunk replaces the last one.
Actions that arrive after their tick are dropped. It does not know clocks or how chunks are decoded.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from vla.transforms.chunks import ensemble

Transition = Literal["switch", "ensemble", "prefix"]
TRANSITIONS: tuple[Transition, ...] = get_args(Transition)
_COEFFICIENT = 0.01  # of temporal ensembling, as in ACT


class ChunkBuffer:
    """Chunks and the ticks of their actions.

    Args:
        transition: "switch" and "prefix" execute the newest chunk that covers a tick. "ensemble" averages all chunks
            that cover it (temporal ensembling); the gripper command is always that of the newest chunk.
        gripper: index of the gripper command in an action; None without a gripper.

    Attributes:
        late: number of actions that arrived after their tick.
    """

    def __init__(self, transition: Transition = "switch", gripper: int | None = None) -> None:
        self.transition, self._gripper = transition, gripper
        self._chunks: list[tuple[int, int, np.ndarray]] = []  # task, first tick, actions [H, D]; oldest first
        self._task = 0  # number of the current task
        self._begun = 0  # number of actions of a chunk that is still being decoded; 0: no such chunk
        self.late = 0

    def put(self, chunk: np.ndarray, first: int, now: int, more: bool = False) -> None:
        """Add a chunk [H, D] whose action i is for tick first + i; `now` is the next tick to execute.

        With `more`, the chunk is still being decoded, and the next call passes the same chunk with more actions. Until
        then, the previous chunk provides the remaining actions."""
        known = self._begun
        self.late += int(np.clip(now - first - known, 0, len(chunk) - known))
        past = self._chunks[:-1] if known else self._chunks
        if self.transition != "ensemble" and not more:
            past = []
        self._chunks = [old for old in past if old[1] + len(old[2]) > now] + [(self._task, first, chunk)]
        self._begun = len(chunk) if more else 0

    def new_task(self) -> None:
        """Begin another task. Chunks of earlier tasks are used only at ticks that no chunk of the new task covers."""
        self._task += 1

    def complete(self) -> None:
        """Mark the newest chunk as complete."""
        self._begun = 0

    def at(self, tick: int) -> np.ndarray | None:
        """The action for `tick`, float32 [D]; None if no chunk covers it (an underrun)."""
        covering = [
            (task, chunk[tick - first]) for task, first, chunk in self._chunks if 0 <= tick - first < len(chunk)
        ]
        if not covering:
            return None
        votes = [action for task, action in covering if task == covering[-1][0]]
        if self.transition != "ensemble":
            return votes[-1]
        action = ensemble(votes, _COEFFICIENT)
        if self._gripper is not None:
            action[self._gripper] = votes[-1][self._gripper]
        return action

    def ahead(self, tick: int) -> int:
        """Number of consecutive ticks from `tick` on that have an action."""
        return max((first + len(chunk) - tick for _, first, chunk in self._chunks), default=0)

    def clear(self) -> None:
        self._chunks, self._begun = [], 0
