"""Policy: observations in, actions out.

Owns: the run-time object that every job uses: it holds a network and its processor, decodes action chunks for a batch
of observations, and hands out one action at a time through the only action queue there is. It does not know
environments, clocks or robots' drivers.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from vla import checkpoint
from vla.actions.chunks import remainder
from vla.decoding.engine import Engine
from vla.decoding.greedy import greedy
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.spec import Observation, RobotSpec


class ActionQueue:
    """Actions of a chunk that are still to be executed, in order."""

    def __init__(self) -> None:
        self._actions: deque[np.ndarray] = deque()

    def push(self, chunk: np.ndarray) -> None:
        """Replace what is left by the actions of `chunk` [n, D]."""
        self._actions = deque(chunk)

    def pop(self) -> np.ndarray:
        return self._actions.popleft()

    def clear(self) -> None:
        self._actions.clear()

    def __len__(self) -> int:
        return len(self._actions)


class Policy:
    """An action-token policy.

    >>> policy = Policy.from_pretrained("nano")
    >>> policy.reset("pick up the red cube")
    >>> action = policy.act(observation)          # float32 [D], in the robot's units

    Attributes:
        robot: the RobotSpec that it was trained for.
        horizon: actions per chunk, H.
        n_action_steps: actions of a chunk that `act` executes before it predicts the next.
        unnorm_key: whose statistics un-normalise the actions.
    """

    def __init__(
        self,
        network: VLAForActionPrediction,
        processor: VLAProcessor,
        device: str = "auto",
        unnorm_key: str | None = None,
        n_action_steps: int | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.network = network.to(self.device).eval()
        self.processor = processor
        self.robot: RobotSpec = processor.robot
        self.horizon: int = network.config.horizon
        self.n_action_steps = n_action_steps or network.config.n_action_steps
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ConfigError(f"n_action_steps must be between 1 and the horizon {self.horizon}, got {n_action_steps}.")
        self.unnorm_key = network.config.unnorm_key(unnorm_key)
        self._queue = ActionQueue()
        self._instruction: str | None = None
        self._chunk: np.ndarray | None = None  # the last one that `act` predicted
        self._engine: Engine | None = None
        try:
            self._engine = Engine(self.network)
        except ConfigError as error:
            warnings.warn(f"decoding through transformers' own layers, several times slower: {error}", stacklevel=2)

    @classmethod
    def from_pretrained(cls, name: str, device: str = "auto", unnorm_key: str | None = None, **kwargs) -> Policy:
        """Load by "nano", run folder, checkpoint folder or hub id.

        Raises:
            CheckpointError: not found, incomplete, or several unnorm_keys and none chosen.
        """
        network, processor = checkpoint.load(str(name))
        network.requires_grad_(False)
        return cls(network, processor, device, unnorm_key, **kwargs)

    def reset(self, instruction: str) -> None:
        """Start an episode: forget queued actions, take the instruction."""
        self._queue.clear()
        self._instruction, self._chunk = instruction, None

    def act(self, observation: Observation) -> np.ndarray:
        """The next action, float32 [D]; predicts a new chunk when the executed part of the last one is used up."""
        if self._instruction is None:
            raise ConfigError("call policy.reset(instruction) before policy.act(observation).")
        if not len(self._queue):
            drafts = None if self._chunk is None else [remainder(self._chunk, self.n_action_steps)]
            self._chunk = self.predict_chunks([observation], [self._instruction], drafts)[0]
            self._queue.push(self._chunk[: self.n_action_steps])
        return self._queue.pop()

    def predict_chunk(self, observation: Observation, instruction: str | None = None) -> np.ndarray:
        """The chunk for one observation, float32 [H, D]."""
        instruction = self._instruction if instruction is None else instruction
        if instruction is None:
            raise ConfigError("give an instruction, or call policy.reset(instruction) first.")
        return self.predict_chunks([observation], [instruction])[0]

    def predict_chunks(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        drafts: Sequence[np.ndarray | None] | None = None,
    ) -> np.ndarray:
        """Chunks for a batch of observations in one forward, float32 [B, H, D], un-normalised.

        Args:
            drafts: a guess of each chunk [H, D], such as the `remainder` of the last one. It makes decoding faster
                the better it is, and never changes the result.
        Raises:
            SpecError: an observation does not fit the robot.
        """
        batch = self.processor.observe(observations, instructions, self.unnorm_key)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if self._engine is None:
            ids = greedy(self.network, batch)
        else:
            ids = self._engine.parallel(batch, self._draft(drafts or [None] * len(observations))).ids
        return self.processor.decode_actions(ids.cpu().numpy(), self.unnorm_key)

    def _draft(self, chunks: Sequence[np.ndarray | None]) -> torch.Tensor:
        """Ids [B, T] of the drafts; the middle action row where there is none."""
        config, tokenizer = self.network.config, self.processor.action_tokenizer
        ids = np.full((len(chunks), tokenizer.n_tokens), config.action_token_begin + tokenizer.vocab_size // 2)
        for row, chunk in enumerate(chunks):
            if chunk is not None:
                ids[row] = self.processor.encode_actions(chunk, self.unnorm_key)
        return torch.from_numpy(ids).to(self.device)


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. ConfigError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} is not available here ({reason}); try 'auto' or 'cpu'.") from None
    return device
