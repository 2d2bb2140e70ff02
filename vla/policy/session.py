"""What one episode carries from chunk to chunk.

Owns: the draft of the next chunk (what the last one still says, the last action held), and temporal ensembling: several
chunks that speak about the same moment, averaged. It does not know how chunks are decoded or executed; whoever executes
actions says how many (`advance`).
"""

from __future__ import annotations

import numpy as np

from vla.transforms.chunks import remainder


class Memory:
    """One per episode; pass it to `Policy.predict` and call `advance` as actions are executed.

    Attributes:
        draft: guess of the next chunk, float32 [H, D] in the robot's units; None at the start of an episode.
        committed: so many first actions of `draft` will be executed whatever comes (they are, while the next chunk is
            decoded): the next chunk begins with them and continues them,
        trust: as long as the network gives their tokens at least this share of its best token's probability.
    """

    def __init__(self) -> None:
        self.draft: np.ndarray | None = None
        self.committed, self.trust = 0, 0.0
        self._past: list[
            np.ndarray
        ] = []  # per earlier chunk, oldest first: probabilities [actions ahead, entries, rows]

    def advance(self, executed: int) -> None:
        """So many actions of the last chunk were executed. What was committed of the next one is a matter of then."""
        self.committed = 0
        if self.draft is not None and executed:
            self.draft = remainder(self.draft, min(executed, len(self.draft)))
        self._past = [chunk[executed:] for chunk in self._past if len(chunk) > executed]

    def commit(self, actions: np.ndarray, trust: float = 0.0) -> None:
        """`actions` [n, D] are executed whatever comes; the draft must be that of a chunk already."""
        assert self.draft is not None and len(actions) < len(self.draft)
        self.draft = np.concatenate([actions, self.draft[len(actions) :]])
        self.committed, self.trust = len(actions), trust

    def remember(self, chunk: np.ndarray) -> None:
        """Take `chunk` [H, D] as the last one; nothing of it is committed yet."""
        self.draft, self.committed = chunk, 0

    def ensemble(self, probabilities: np.ndarray, coefficient: float) -> np.ndarray:
        """Average the distributions of a new chunk with those of earlier chunks about the same moments.

        Weights are exp(-coefficient * i), i = 0 for the oldest chunk that speaks about a moment (temporal ensembling,
        Zhao et al. 2023, ACT; there of actions, here of distributions over bins): positive trusts the old, 0 trusts
        all alike, negative trusts the new.

        Args:
            probabilities: [actions, entries, rows] of the new chunk; kept for the chunks to come.
        Returns:
            The averages, of the same shape.
        """
        self._past.append(probabilities)
        averaged = np.empty_like(probabilities)
        for moment in range(len(probabilities)):
            votes = np.stack([chunk[moment] for chunk in self._past if moment < len(chunk)])
            weights = np.exp(-coefficient * np.arange(len(votes)))
            averaged[moment] = np.tensordot(weights / weights.sum(), votes, axes=1)
        return averaged
