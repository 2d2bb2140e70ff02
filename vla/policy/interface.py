"""The interface of all policies.

Owns: `ChunkPolicy`, which maps observations and instructions to action chunks, and its result, `Prediction`. Prediction
is stateless: `Prediction.next_draft` holds the state for the next chunk, and `vla.policy.session` keeps it during an
episode. It does not know networks, environments, clocks or robot drivers.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vla.errors import ConfigError
from vla.policy.session import Draft, LatentDraw, Session
from vla.spec import Observation, RobotSpec


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A batch of chunks and their confidence.

    Attributes:
        chunks: float32 [B, H, D], un-normalised; fewer than H actions if decoding was stopped early.
        ids: int64 [B, T], the chosen tokens, ids of the model's vocabulary.
        log_probs: float32 [B, T], the network's log p(a_t | x, a_<t) over the allowed action rows, before temperature,
            penalties, top-k and top-p. 0 after the end of a sequence of variable length.
        entropy: float32 [B, T], entropy of these distributions in nats; 0 after the end of a sequence.
        forwards: number of forward passes of the decoder.
        next_draft: the draft of each episode's next chunk, to be advanced with `Draft.after` by the executed actions.
    """

    chunks: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray
    forwards: int
    next_draft: tuple[Draft, ...]

    @property
    def log_likelihood(self) -> np.ndarray:
        """log p(a_1..a_T | x) of each chunk, float32 [B]."""
        return self.log_probs.sum(-1)

    def row(self, index: int) -> Prediction:
        """The prediction for one observation, as a batch of one."""
        here = slice(index, index + 1)
        return Prediction(
            self.chunks[here],
            self.ids[here],
            self.log_probs[here],
            self.entropy[here],
            self.forwards,
            self.next_draft[here],
        )


class ChunkPolicy(abc.ABC):
    """A policy that predicts chunks, with a network (`Policy`) or through a server (`vla.serving.client.RemotePolicy`).

    Attributes:
        robot: the RobotSpec that the policy was trained for.
        horizon: actions per chunk, H.
        n_action_steps: number of actions of a chunk that `act` executes before it predicts the next chunk.
        unnorm_key: key of the statistics that un-normalise the actions.
        image_size: side of the network's square input image in pixels; observations may have any size.
    """

    robot: RobotSpec
    horizon: int
    n_action_steps: int
    unnorm_key: str
    image_size: int

    _session: Session | None = None  # the episode of `reset` and `act`

    @property
    @abc.abstractmethod
    def action_limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest encodable value of each action dimension, float [D], in the robot's units."""

    @property
    def streams(self) -> bool:
        """Whether streaming actions (`on_action` of `predict`) is possible and saves time."""
        return False

    @abc.abstractmethod
    def predict(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        drafts: Sequence[Draft | None] | None = None,
        on_action: Callable[[int, np.ndarray], None] | None = None,
    ) -> Prediction:
        """Predict one chunk per observation. No state is kept between calls.

        Args:
            drafts: `next_draft` of each episode's last prediction, advanced by the executed actions (`Draft.after`);
                None at the start of an episode.
            on_action: called with (index, action [D], un-normalised) as soon as an action is decoded, while the rest of
                the chunk is still being decoded. The batch must have one observation.
        Raises:
            ConfigError: actions cannot be streamed.
        """

    def reset(self, instruction: str, latent: LatentDraw | None = None) -> None:
        """Start an episode. See `Session` for `latent`."""
        self._session = Session(instruction, latent or LatentDraw())

    def act(self, observation: Observation) -> np.ndarray:
        """The next action of the episode, float32 [D]; predicts a new chunk after every `n_action_steps` actions."""
        if self._session is None:
            raise ConfigError("call policy.reset(instruction) before policy.act(observation).")
        return self._session.act(self, observation)

    def predict_chunk(self, observation: Observation, instruction: str | None = None) -> np.ndarray:
        """The chunk for one observation, float32 [H, D]. The default instruction is that of `reset`."""
        if instruction is None and self._session is not None:
            instruction = self._session.instruction
        if instruction is None:
            raise ConfigError("pass an instruction, or call policy.reset(instruction) first.")
        return self.predict([observation], [instruction]).chunks[0]

    def warm_up(self) -> None:
        """Decode one chunk for a blank observation, so that the first real chunk is not slower than later ones."""
        size, robot = self.image_size, self.robot
        blank = {
            "pixels": {camera: np.zeros((size, size, 3), np.uint8) for camera in robot.cameras},
            "agent_pos": np.zeros(robot.state_dim, np.float32),
        }
        self.predict([blank], ["warm up"])
