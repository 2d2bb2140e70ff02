"""One episode of a policy, from instruction to instruction.

Owns: the `Draft` that one chunk leaves for the next, and the `Session` that carries it through an episode together with
the instruction and the queue of actions still to execute. It does not know how chunks are decoded.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vla.spec import Observation
from vla.transforms.chunks import remainder

if TYPE_CHECKING:
    from vla.policy.policy import ChunkPolicy, Prediction


@dataclasses.dataclass(frozen=True)
class Draft:
    """What one chunk leaves for the next chunk of its episode.

    Attributes:
        steps: guess of the next chunk, one row per action: its tokens, int64 [n, tokens_per_action], ids of the model's
            vocabulary; or the action itself, float32 [n, D] in the robot's units, where no tokenizer is at hand (a
            client) or tokens span several actions.
        prefix: prefix conditioning, float32 [k, D] in the robot's units: actions that execute while the next chunk is
            decoded, which therefore begins with them and continues them; None: nothing is given.
        threshold: acceptance threshold: the chunk follows `prefix` while the network gives each of its tokens at least
            this share of the best token's probability.
        past: temporal ensembling: distributions of earlier chunks, oldest first, [actions ahead, tokens_per_action,
            rows] each.
    """

    steps: np.ndarray
    prefix: np.ndarray | None = None
    threshold: float = 0.0
    past: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, executed: int) -> Draft:
        """The draft once `executed` more actions have run; its last action is repeated."""
        steps = remainder(self.steps, min(executed, len(self)))
        return Draft(steps, past=tuple(chunk[executed:] for chunk in self.past if len(chunk) > executed))

    def given(self, prefix: np.ndarray, threshold: float = 0.0) -> Draft:
        """The same draft, conditioned on a prefix of actions [k, D], k < n."""
        assert len(prefix) < len(self)
        return dataclasses.replace(self, prefix=prefix, threshold=threshold)


class Session:
    """The state of one episode.

    Attributes:
        instruction: the task; None before the first.
        draft: of the next chunk; None at the start of an episode.
    """

    def __init__(self, instruction: str | None = None) -> None:
        self.instruction = instruction
        self.draft: Draft | None = None
        self._queue: deque[np.ndarray] = deque()

    def advance(self, executed: int) -> None:
        """Shift the draft by `executed` actions."""
        self.draft = None if self.draft is None else self.draft.after(executed)

    def act(self, policy: ChunkPolicy, observation: Observation) -> np.ndarray:
        """The next action, float32 [D]; predicts a chunk whenever `n_action_steps` actions of the last one have run."""
        if not self._queue:
            self._queue.extend(predict(policy, [self], [observation]).chunks[0][: policy.n_action_steps])
        self.advance(1)
        return self._queue.popleft()


def predict(policy: ChunkPolicy, sessions: Sequence[Session], observations: Sequence[Observation]) -> Prediction:
    """One chunk for each of several episodes, as one batch; every session takes its next draft."""
    instructions = [session.instruction or "" for session in sessions]
    prediction = policy.predict(observations, instructions, [session.draft for session in sessions])
    for session, draft in zip(sessions, prediction.next_draft, strict=True):
        session.draft = draft
    return prediction
