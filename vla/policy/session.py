"""The state of a policy within one episode.

Owns: `Draft`, which one chunk passes to the next, and `Session`, which holds the draft, the instruction and the action
queue of an episode. It does not know how chunks are decoded.
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
    from vla.policy.interface import ChunkPolicy, Prediction


@dataclasses.dataclass(frozen=True)
class LatentDraw:
    """The latent of the next chunk, for a policy that has one (`vla.model.free_transformer`).

    Attributes:
        seed: seed of the episode. Episodes with the same seed have the same latents.
        chunk: index of the chunk in its episode; ignored by a policy with one latent per episode.
        codes: codes to use instead of random ones; one for all tokens of a chunk, or one per token.
    """

    seed: int = 0
    chunk: int = 0
    codes: tuple[int, ...] = ()

    @property
    def following(self) -> LatentDraw:
        """The draw for the chunk after this one."""
        return dataclasses.replace(self, chunk=self.chunk + 1)


@dataclasses.dataclass(frozen=True)
class Draft:
    """State that one chunk passes to the next chunk of its episode.

    Attributes:
        steps: guess of the next chunk, one row per action. The rows are tokens, int64 [n, tokens_per_action], ids of
            the model's vocabulary; or actions, float32 [n, D] in the robot's units, if no tokenizer is available (in a
            client) or tokens span several actions.
        prefix: action prefix for prefix conditioning, float32 [k, D] in the robot's units: the first k actions of the
            next chunk, which execute while that chunk is decoded; None: no prefix.
        threshold: acceptance threshold of the prefix. The prefix ends before the first token whose probability is below
            this fraction of the most likely token's.
        past: distributions of earlier chunks for temporal ensembling, oldest first, each [remaining actions,
            tokens_per_action, rows].
        latent: the latent of the next chunk.
    """

    steps: np.ndarray
    prefix: np.ndarray | None = None
    threshold: float = 0.0
    past: tuple[np.ndarray, ...] = ()
    latent: LatentDraw = LatentDraw()

    def __len__(self) -> int:
        return len(self.steps)

    def after(self, executed: int) -> Draft:
        """The draft after `executed` more actions, padded by repeating its last action."""
        steps = remainder(self.steps, min(executed, len(self)))
        past = tuple(chunk[executed:] for chunk in self.past if len(chunk) > executed)
        return Draft(steps, past=past, latent=self.latent)

    def given(self, prefix: np.ndarray, threshold: float = 0.0) -> Draft:
        """A copy of the draft with an action prefix [k, D], k < n."""
        assert len(prefix) < len(self)
        return dataclasses.replace(self, prefix=prefix, threshold=threshold)


class Session:
    """The state of one episode.

    Args:
        latent: seed or codes of the episode's latents, for a policy with a latent.
    Attributes:
        instruction: the task; None before it is set.
        draft: draft of the next chunk; empty at the start of an episode.
    """

    def __init__(self, instruction: str | None = None, latent: LatentDraw = LatentDraw()) -> None:
        self.instruction = instruction
        self.draft = Draft(np.empty((0, 0), np.int64), latent=latent)
        self._queue: deque[np.ndarray] = deque()

    def advance(self, executed: int) -> None:
        """Shift the draft by `executed` actions."""
        self.draft = self.draft.after(executed)

    def act(self, policy: ChunkPolicy, observation: Observation) -> np.ndarray:
        """The next action, float32 [D]. Predicts a new chunk if the queue is empty."""
        if self.needs_chunk:
            self.put(predict(policy, [self], [observation]), policy.n_action_steps)
        return self.take()

    @property
    def needs_chunk(self) -> bool:
        """Whether the queue is empty."""
        return not self._queue

    def put(self, prediction: Prediction, n_action_steps: int) -> None:
        """Queue the first `n_action_steps` actions of a prediction, a batch of one."""
        self._queue.extend(prediction.chunks[0][:n_action_steps])
        self.draft = prediction.next_draft[0]

    def take(self) -> np.ndarray:
        """Remove and return the next action of the queue, float32 [D]."""
        self.advance(1)
        return self._queue.popleft()


def predict(policy: ChunkPolicy, sessions: Sequence[Session], observations: Sequence[Observation]) -> Prediction:
    """Predict the next chunk of several episodes as one batch, and store the new draft in each session."""
    instructions = [session.instruction or "" for session in sessions]
    prediction = policy.predict(observations, instructions, [session.draft for session in sessions])
    for session, draft in zip(sessions, prediction.next_draft, strict=True):
        session.draft = draft
    return prediction
