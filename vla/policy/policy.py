"""Policy: observations in, actions out.

Owns: the run-time object that every job uses: it holds a network and its processor, decodes action chunks for a batch
of observations as its `DecodingConfig` says, can tell how sure it was, and hands out one action at a time through the
only action queue there is. It does not know environments, clocks or robots' drivers.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import StoppingCriteriaList

from vla.config import GREEDY, DecodingConfig, check
from vla.decoding import strategies
from vla.decoding.commitment import Commitment
from vla.decoding.engine import Engine
from vla.decoding.result import Decoded
from vla.decoding.streaming import ActionStreamer
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.policy import checkpoint
from vla.policy.session import Memory
from vla.spec import Observation, RobotSpec
from vla.transforms.chunks import completed


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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A batch of chunks, and how sure the policy was of them.

    Attributes:
        chunks: float32 [B, H, D], un-normalised; fewer than H actions when decoding was stopped early.
        ids: int64 [B, T], the chosen tokens, ids of the model's vocabulary.
        log_probs: float32 [B, T], log p(a_t | x, a_<t) over the action rows, by the network itself: before temperature,
            penalties and cuts.
        entropy: float32 [B, T], of the same distributions, in nats.
        forwards: passes through the decoder that it took.
    """

    chunks: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray
    forwards: int

    @property
    def log_likelihood(self) -> np.ndarray:
        """log p(a_1..a_T | x) of each chunk, float32 [B]."""
        return self.log_probs.sum(-1)


class ChunkPolicy(abc.ABC):
    """Whatever predicts chunks: a network here (`Policy`) or one behind a server (`vla.serving.client.RemotePolicy`).

    Attributes:
        robot: the RobotSpec that it was trained for.
        horizon: actions per chunk, H.
        n_action_steps: actions of a chunk that `act` executes before it predicts the next.
        unnorm_key: whose statistics un-normalise the actions.
        image_size: side of the square picture that the network sees, in pixels; observations may have any size.
    """

    robot: RobotSpec
    horizon: int
    n_action_steps: int
    unnorm_key: str
    image_size: int

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Be between episodes."""
        self._queue, self._memory = ActionQueue(), Memory()
        self._instruction: str | None = None

    @property
    @abc.abstractmethod
    def action_limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of each action entry that a token can say, float [D], in the robot's units."""

    @property
    def streams(self) -> bool:
        """Whether `predict` can hand over a chunk's actions one by one, and gains time by it."""
        return False

    @abc.abstractmethod
    def predict(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        memories: Sequence[Memory] | None = None,
        on_action: Callable[[int, np.ndarray], None] | None = None,
    ) -> Prediction:
        """Chunks for a batch of observations, and how sure the policy was of them.

        Args:
            memories: one per episode, which this call updates; the caller tells them what is executed
                (`Memory.advance`).
            on_action: is called with (index, action [D], un-normalised) as soon as an action is decoded, while the rest
                of the chunk is still to come; for one observation.
        Raises:
            ConfigError: actions cannot be streamed.
        """

    def reset(self, instruction: str) -> None:
        """Start an episode: forget queued actions, take the instruction."""
        self._forget()
        self._instruction = instruction

    def act(self, observation: Observation) -> np.ndarray:
        """The next action, float32 [D]; predicts a new chunk when the executed part of the last one is used up."""
        if self._instruction is None:
            raise ConfigError("call policy.reset(instruction) before policy.act(observation).")
        if not len(self._queue):
            chunk = self.predict_chunks([observation], [self._instruction], [self._memory])[0]
            self._queue.push(chunk[: self.n_action_steps])
        self._memory.advance(1)
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
        memories: Sequence[Memory] | None = None,
    ) -> np.ndarray:
        """`predict` for whom the actions are enough: float32 [B, H, D], un-normalised."""
        return self.predict(observations, instructions, memories).chunks

    def warm_up(self, batch_size: int = 1, instruction: str = "warm up") -> None:
        """Decode one chunk of a blank observation, so that the first real one is as fast as the others."""
        size, robot = self.image_size, self.robot
        blank = {
            "pixels": {camera: np.zeros((size, size, 3), np.uint8) for camera in robot.cameras},
            "agent_pos": np.zeros(robot.state_dim, np.float32),
        }
        self.predict([blank] * batch_size, [instruction] * batch_size)


class Policy(ChunkPolicy):
    """An action-token policy.

    >>> policy = Policy.from_pretrained("nano")
    >>> policy.reset("pick up the red cube")
    >>> action = policy.act(observation)          # float32 [D], in the robot's units

    Attributes: those of `ChunkPolicy`, and
        decoding: how chunks are chosen from probabilities.
    """

    def __init__(
        self,
        network: VLAForActionPrediction,
        processor: VLAProcessor,
        device: str = "auto",
        unnorm_key: str | None = None,
        n_action_steps: int | None = None,
        decoding: DecodingConfig = GREEDY,
    ) -> None:
        super().__init__()
        check(decoding)
        self.device = choose_device(device)
        self.network = network.to(self.device).eval()
        self.processor, self.decoding = processor, decoding
        self.robot: RobotSpec = processor.robot
        self.horizon: int = network.config.horizon
        self.image_size: int = network.config.image_size
        self.n_action_steps = n_action_steps or network.config.n_action_steps
        if not 1 <= self.n_action_steps <= self.horizon:
            raise ConfigError(f"n_action_steps must be between 1 and the horizon {self.horizon}, got {n_action_steps}.")
        if decoding.max_actions is not None and decoding.max_actions < self.n_action_steps:
            raise ConfigError(f"{self.n_action_steps} actions are executed, but max_actions is {decoding.max_actions}.")
        if self.processor.action_tokenizer.tokens_per_action is None and decoding != GREEDY:
            raise ConfigError("this policy's tokens speak about several actions at once; it decodes greedily only.")
        self.unnorm_key = network.config.unnorm_key(unnorm_key)
        self._draws = itertools.count(1)  # sampled batches, of all twins: each has a seed of its own
        try:
            self._engine: Engine | None = Engine(self.network)
        except ConfigError as error:
            warnings.warn(f"decoding through transformers, which is slower: {error}", stacklevel=2)
            self._engine = None

    @classmethod
    def from_pretrained(
        cls,
        name: str = "nano",
        device: str = "auto",
        unnorm_key: str | None = None,
        n_action_steps: int | None = None,
        decoding: DecodingConfig = GREEDY,
    ) -> Policy:
        """Load a policy: "nano" (the embedded backbone), a checkpoint folder, a run folder, or a hub id."""
        network, processor = checkpoint.load(str(name))
        network.requires_grad_(False)
        policy = cls(network, processor, device, unnorm_key, n_action_steps, decoding)
        if policy.device.type == "cpu":
            for tower in network.vision_towers:  # oneDNN's convolutions are a fifth faster with it
                tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return policy

    @property
    def action_limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of each action entry that a token can say, float [D], in the robot's units."""
        ends = np.stack([-np.ones(self.robot.action_dim), np.ones(self.robot.action_dim)])
        low, high = self.processor.unnormalize(ends, self.unnorm_key)
        return np.minimum(low, high), np.maximum(low, high)

    @property
    def streams(self) -> bool:
        """Whether `predict` can hand over a chunk's actions one by one, and gains time by it: on a GPU, a chunk is one
        graph and comes at once."""
        by_action = self.processor.action_tokenizer.tokens_per_action is not None
        return by_action and self._final_by_token and self.device.type != "cuda"

    @property
    def _final_by_token(self) -> bool:
        """Whether a decoded token says what will be executed, whatever follows."""
        config = self.decoding
        return config.num_beams == 1 and config.readout != "mean" and config.ensemble is None

    def for_key(self, unnorm_key: str | None) -> Policy:
        """The same policy with other statistics, in an episode of its own; the network is shared, not copied."""
        twin = copy.copy(self)
        twin.unnorm_key = self.network.config.unnorm_key(unnorm_key)
        twin._forget()
        return twin

    def predict(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        memories: Sequence[Memory] | None = None,
        on_action: Callable[[int, np.ndarray], None] | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Prediction:
        """Chunks for a batch of observations.

        Args:
            memories: one per episode, which this call updates; the caller tells them what is executed
                (`Memory.advance`). They make greedy decoding faster without changing it, carry temporal ensembling, and
                say which actions are committed.
            on_action: is called with (index, action [D], un-normalised) as soon as an action is decoded, while the rest
                of the chunk is still to come; for one observation.
            stopping: transformers' criteria, asked after every token; the chunks end with the last whole action.
        Raises:
            SpecError: an observation does not fit the robot.
            ConfigError: actions cannot be streamed as this policy decodes.
        """
        batch = self.processor.observe(observations, instructions, self.unnorm_key)
        memories = [Memory() for _ in observations] if memories is None else memories
        decoded = self.decode(batch, memories, self._streamer(on_action, len(observations)), stopping)
        size = self.processor.action_tokenizer.tokens_per_action
        if size is not None and decoded.ids.shape[1] % size:
            whole = decoded.ids.shape[1] // size * size
            decoded = Decoded(decoded.ids[:, :whole], decoded.logits[:, :whole], decoded.forwards)
        prediction = self._describe(decoded)
        if self.decoding.ensemble is not None or self.decoding.readout == "mean":
            prediction = dataclasses.replace(prediction, chunks=self._averaged(decoded, memories))
        for memory, chunk in zip(memories, prediction.chunks, strict=True):
            memory.remember(chunk)
        return prediction

    def score(self, observations: Sequence[Observation], instructions: Sequence[str], chunks: np.ndarray) -> Prediction:
        """What the policy says about given chunks [B, H, D]: their tokens' probabilities, in one forward."""
        batch = self.processor.observe(observations, instructions, self.unnorm_key)
        ids = torch.from_numpy(self.processor.encode_actions(np.asarray(chunks), self.unnorm_key))
        return self._describe(strategies.teacher_forced(self.network, batch, ids))

    def decode(
        self,
        batch: dict[str, torch.Tensor],
        memories: Sequence[Memory] | None = None,
        streamer: ActionStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Decoded:
        """Tokens for prefix tensors from the processor: by the engine where they are greedy's, else by `generate`."""
        memories = [Memory() for _ in batch["input_ids"]] if memories is None else memories
        n_tokens, draft = strategies.count_tokens(self.network, self.decoding), self.draft(memories)
        size = self.processor.action_tokenizer.tokens_per_action
        if any(memory.committed for memory in memories) and size is None:
            raise ConfigError("this policy's tokens speak about several actions at once; none can be committed.")
        counts = torch.tensor([memory.committed * (size or 0) for memory in memories])
        trust = torch.tensor([memory.trust for memory in memories])
        committed = Commitment(counts, trust) if bool(counts.any()) else None
        if self.decoding.greedy and self._engine is not None and self._reaches(batch):
            if stopping is None and (self.device.type == "cpu" or committed is not None):
                return self._engine.parallel(batch, draft[:, :n_tokens], streamer, committed)
            if committed is None:
                return self._engine.stepwise(batch, n_tokens, streamer, stopping)
        seed = self.decoding.sampling_seed + next(self._draws)
        given = None if committed is None else (draft, committed)
        return strategies.generate(self.network, batch, self.decoding, seed, streamer, stopping, given)

    def _reaches(self, batch: dict[str, torch.Tensor]) -> bool:
        """Whether the engine decodes this batch as the network would; a warning says where it does not."""
        assert self._engine is not None
        if not (fits := self._engine.fits(batch)):
            warnings.warn(
                f"decoding through transformers, which is slower: attention slides over {self._engine.reach} "
                "positions, and this prompt and chunk need more.",
                stacklevel=3,
            )
        return fits

    def draft(self, memories: Sequence[Memory]) -> torch.Tensor:
        """Ids int64 [B, T] of the drafts in `memories`; the middle action row where there is none."""
        config, tokenizer = self.network.config, self.processor.action_tokenizer
        ids = np.full((len(memories), tokenizer.n_tokens), config.action_token_begin + tokenizer.vocab_size // 2)
        for row, memory in enumerate(memories):
            if memory.draft is not None and len(memory.draft):
                known = self.processor.encode_actions(completed(memory.draft, self.horizon), self.unnorm_key)
                ids[row, : len(known)] = known
        return torch.from_numpy(ids)

    def _describe(self, decoded: Decoded) -> Prediction:
        ids = decoded.ids.cpu().numpy()
        return Prediction(
            chunks=self.processor.decode_actions(ids, self.unnorm_key),
            ids=ids,
            log_probs=decoded.log_probs(self.network.config.action_token_begin).cpu().numpy(),
            entropy=decoded.entropy.cpu().numpy(),
            forwards=decoded.forwards,
        )

    def _averaged(self, decoded: Decoded, memories: Sequence[Memory]) -> np.ndarray:
        """Chunks [B, n, D] from distributions instead of tokens: their mean, their average over chunks, or both."""
        probabilities = decoded.distribution.exp().cpu().numpy()
        size = self.processor.action_tokenizer.tokens_per_action
        assert size is not None  # __init__ has seen to it
        if self.decoding.ensemble is not None:
            by_action = probabilities.reshape(len(probabilities), -1, size, probabilities.shape[-1])
            averaged = [m.ensemble(p, self.decoding.ensemble) for m, p in zip(memories, by_action, strict=True)]
            probabilities = np.stack(averaged).reshape(probabilities.shape)
        if self.decoding.readout == "mean":
            return self.processor.expected_actions(probabilities, self.unnorm_key)
        ids = probabilities.argmax(-1) + self.network.config.action_token_begin
        return self.processor.decode_actions(ids, self.unnorm_key)

    def _streamer(self, on_action: Callable[[int, np.ndarray], None] | None, size: int) -> ActionStreamer | None:
        """What hands actions over while others are decoded; ConfigError where an action is not final by then."""
        if on_action is None:
            return None
        tokens = self.processor.action_tokenizer.tokens_per_action
        if tokens is None or size > 1 or not self._final_by_token:
            raise ConfigError(
                "actions can be streamed for one observation, decoded token by token: without beams, readout 'mean' or "
                "temporal ensembling."
            )

        def forward(index: int, ids: list[int]) -> None:
            on_action(index, self.processor.decode_actions(np.array(ids), self.unnorm_key)[0])

        return ActionStreamer(tokens, forward)


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
