"""The policy with a network.

Owns: `Policy`, which decodes batches of action chunks and reports their likelihood, and the choice of device and data
type. It does not know environments, clocks or robot drivers.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import torch
from transformers import MaxTimeCriteria, StoppingCriteriaList

from vla.config import GREEDY, DecodingConfig, Dtype, check
from vla.decoding import strategies
from vla.decoding.prefix import Prefix
from vla.decoding.result import Decoded
from vla.decoding.strategies import Request
from vla.decoding.streaming import ActionStreamer
from vla.decoding.weights import native
from vla.errors import ConfigError, unknown
from vla.model.free_transformer import align
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.policy import checkpoint
from vla.policy.interface import ChunkPolicy, Prediction
from vla.policy.session import Draft, LatentDraw
from vla.spec import Observation, RobotSpec
from vla.transforms.chunks import completed, ensemble_chunks


class Policy(ChunkPolicy):
    """An action-token policy.

    >>> policy = Policy.from_pretrained("nano")
    >>> policy.reset("pick up the red cube")
    >>> action = policy.act(observation)          # float32 [D], in the robot's units

    Attributes:
        decoding: the decoding strategy. For the others, see `ChunkPolicy`.
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
        tokenizer = self.processor.action_tokenizer
        if (decoding.max_tokens is not None or decoding.deadline_ms is not None) and not tokenizer.anytime:
            raise ConfigError(
                "max_tokens and deadline_ms need a tokenizer that can decode a whole chunk from its first tokens, such "
                f"as 'pca'; this policy has {tokenizer.name!r}."
            )
        by_action = (decoding.readout == "mean", decoding.ensemble is not None, decoding.max_actions is not None)
        if tokenizer.tokens_per_action is None and any(by_action):
            raise ConfigError(
                "the tokens of this policy span several actions, but readout 'mean', ensemble and max_actions need "
                "tokens for each action."
            )
        self.unnorm_key = network.config.unnorm_key(unnorm_key)
        if decoding.latent:
            self.check_codes(decoding.latent)
        self._decoder = strategies.choose_decoder(self.network, decoding)

    @classmethod
    def from_pretrained(
        cls,
        name: str = "nano",
        device: str = "auto",
        unnorm_key: str | None = None,
        n_action_steps: int | None = None,
        decoding: DecodingConfig = GREEDY,
        dtype: str = "float32",
    ) -> Policy:
        """Load a policy: "nano" (the built-in backbone), a run folder, or the folder or hub id of a checkpoint of this
        package or OpenVLA.

        Args:
            dtype: type of weights and computation, "float32", "bfloat16" or "float16".
        Raises:
            CheckpointError: the policy does not exist or is damaged.
            ConfigError: the device is not available or does not support `dtype`, or an option does not fit the policy.
        """
        weights = choose_dtype(dtype, choose_device(device))
        network, processor = checkpoint.load(str(name), weights)
        network.requires_grad_(False)
        policy = cls(network, processor, device, unnorm_key, n_action_steps, decoding)
        if policy.device.type == "cpu":
            for tower in network.vision_towers:  # oneDNN's convolutions are 20 % faster in this format
                tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return policy

    @property
    def action_limits(self) -> tuple[np.ndarray, np.ndarray]:
        ends = np.stack([-np.ones(self.robot.action_dim), np.ones(self.robot.action_dim)])
        low, high = self.processor.unnormalize(ends, self.unnorm_key)
        return np.minimum(low, high), np.maximum(low, high)

    @property
    def streams(self) -> bool:
        # On CUDA, one graph decodes the whole chunk.
        by_action = self.processor.action_tokenizer.tokens_per_action is not None
        return by_action and self._final_by_token and self.device.type != "cuda"

    @property
    def _final_by_token(self) -> bool:
        """Whether an action is final as soon as its tokens are decoded."""
        config = self.decoding
        return self._decoder.final_by_token and config.readout != "mean" and config.ensemble is None

    def for_key(self, unnorm_key: str | None) -> Policy:
        """The same policy with other statistics and no running episode. The network is shared, not copied."""
        twin = copy.copy(self)
        twin.unnorm_key = self.network.config.unnorm_key(unnorm_key)
        twin._session = None
        return twin

    def predict(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        drafts: Sequence[Draft | None] | None = None,
        on_action: Callable[[int, np.ndarray], None] | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Prediction:
        """Predict one chunk per observation, as in `ChunkPolicy.predict`.

        Args:
            drafts: used to accelerate greedy decoding (its tokens do not change), for temporal ensembling and for
                prefix conditioning.
            stopping: transformers' criteria, evaluated after every token. A stopped chunk ends with its last complete
                action; if the tokenizer is `anytime`, it is complete but coarser.
        Raises:
            SpecError: an observation does not match the robot.
            ConfigError: the decoding strategy cannot stream actions; or early stopping or an action prefix is used
                with tokens that span several actions.
        """
        criteria, tokenizer = StoppingCriteriaList(stopping or ()), self.processor.action_tokenizer
        if self.decoding.deadline_ms is not None:
            criteria.append(MaxTimeCriteria(self.decoding.deadline_ms / 1e3))  # starts its clock here
        size = tokenizer.tokens_per_action
        if criteria and size is None and not tokenizer.anytime:
            raise ConfigError("the tokens of this policy span several actions, so decoding cannot be stopped early.")
        batch = self.processor.observe(observations, instructions, self.unnorm_key)
        drafts = [None] * len(observations) if drafts is None else drafts
        decoded = self.decode(batch, drafts, self._streamer(on_action, len(observations)), criteria or None)
        if size is not None and decoded.ids.shape[1] % size:
            whole = decoded.ids.shape[1] // size * size
            decoded = Decoded(decoded.ids[:, :whole], decoded.logits[:, :whole], decoded.forwards)
        prediction = self._describe(decoded)
        following = tuple(
            dataclasses.replace(new, latent=(LatentDraw() if old is None else old.latent).following)
            for new, old in zip(prediction.next_draft, drafts, strict=True)
        )
        prediction = dataclasses.replace(prediction, next_draft=following)
        if self.decoding.ensemble is not None or self.decoding.readout == "mean":
            prediction = self._average(prediction, decoded, drafts)
        return prediction

    def score(self, observations: Sequence[Observation], instructions: Sequence[str], chunks: np.ndarray) -> Prediction:
        """The likelihood of the chunks [B, H, D], computed in one forward pass. A policy with a latent uses the latent
        of an episode's first chunk."""
        batch = self.with_latent(self.processor.observe(observations, instructions, self.unnorm_key))
        ids = torch.from_numpy(self.processor.encode_actions(np.asarray(chunks), self.unnorm_key))
        return self._describe(strategies.teacher_forced(self.network, batch, ids))

    def decode(
        self,
        batch: dict[str, torch.Tensor],
        drafts: Sequence[Draft | None] | None = None,
        streamer: ActionStreamer | None = None,
        stopping: StoppingCriteriaList | None = None,
    ) -> Decoded:
        """Decode the tokens for `batch`, the processor's tensors of the prompt prefixes."""
        drafts = [None] * len(batch["input_ids"]) if drafts is None else drafts
        batch = self.with_latent(batch, drafts)
        request = Request(batch, self.draft_ids(drafts), self._prefix(drafts), streamer, stopping)
        return self._decoder(request)

    def with_latent(
        self, batch: dict[str, torch.Tensor], drafts: Sequence[Draft | None] | None = None
    ) -> dict[str, torch.Tensor]:
        """Add the latent codes of each episode's next chunk to `batch`. Nothing is added if the batch has codes or the
        policy has no latent.

        Raises:
            ConfigError: given codes do not fit the latent.
        """
        if self.network.latent is None or "latent" in batch:
            return batch
        drafts = [None] * len(batch["input_ids"]) if drafts is None else drafts
        codes = np.stack([self._codes(LatentDraw() if draft is None else draft.latent) for draft in drafts])
        n_tokens = self.processor.action_tokenizer.max_tokens
        return batch | {"latent": align(torch.from_numpy(codes), batch["input_ids"].shape[1], n_tokens)}

    def _codes(self, draw: LatentDraw) -> np.ndarray:
        """The codes of a chunk, int64 [n_latents]: those in `draw`, else those in `decoding`, else random codes."""
        config = self.network.config
        number = config.n_latents
        if given := draw.codes or self.decoding.latent:
            self.check_codes(given)
            return np.broadcast_to(np.array(given), number)
        rng = np.random.default_rng(
            [self.decoding.sampling_seed, draw.seed, 0 if config.latent == "episode" else draw.chunk]
        )
        return rng.integers(2**config.latent_bits, size=number)

    def check_codes(self, codes: Sequence[int]) -> None:
        """Raise ConfigError if the codes do not fit the policy's latent."""
        number, size = self.network.config.n_latents, 2**self.network.config.latent_bits
        if not number:
            raise ConfigError(f"got latent codes {list(codes)}, but this policy has no latent.")
        if len(codes) not in (1, number) or not all(0 <= code < size for code in codes):
            raise ConfigError(
                f"a latent of this policy has {'1 code' if number == 1 else f'1 or {number} codes'} between 0 and "
                f"{size - 1}, got {list(codes)}."
            )

    def draft_ids(self, drafts: Sequence[Draft | None]) -> torch.Tensor:
        """The drafts' tokens, int64 [B, T], ids of the model's vocabulary. Each draft begins with its action prefix; a
        missing draft is the middle action token throughout."""
        tokenizer = self.processor.action_tokenizer
        middle = self.network.config.action_token_begin + tokenizer.vocab_size // 2
        ids = np.full((len(drafts), tokenizer.max_tokens), middle)
        for row, draft in zip(ids, drafts, strict=True):
            if draft is not None and len(draft):
                steps = completed(draft.steps, self.horizon)
                row[:] = self._encode(steps) if steps.dtype.kind == "f" else steps.ravel()
            if draft is not None and draft.prefix is not None and len(draft.prefix):
                given = self._encode(completed(draft.prefix, self.horizon))
                n_given = len(draft.prefix) * (tokenizer.tokens_per_action or 0)
                row[:n_given] = given[:n_given]
        return torch.from_numpy(ids)

    def _encode(self, chunk: np.ndarray) -> np.ndarray:
        return self.processor.encode_actions(chunk, self.unnorm_key)

    def _prefix(self, drafts: Sequence[Draft | None]) -> Prefix | None:
        """The token count and threshold of each draft's action prefix; None if no draft has a prefix."""
        size = self.processor.action_tokenizer.tokens_per_action
        lengths = [0 if draft is None or draft.prefix is None else len(draft.prefix) for draft in drafts]
        if not any(lengths):
            return None
        if size is None:
            raise ConfigError("the tokens of this policy span several actions, so an action prefix cannot be used.")
        thresholds = [0.0 if draft is None else draft.threshold for draft in drafts]
        return Prefix(torch.tensor(lengths) * size, torch.tensor(thresholds))

    def _describe(self, decoded: Decoded) -> Prediction:
        ids = decoded.ids.cpu().numpy()
        chunks = self.processor.decode_actions(ids, self.unnorm_key)
        size = self.processor.action_tokenizer.tokens_per_action
        steps = chunks if size is None else ids.reshape(len(ids), -1, size)
        return Prediction(
            chunks=chunks,
            ids=ids,
            log_probs=decoded.log_probs(self.network.config.action_token_begin).cpu().numpy(),
            entropy=decoded.entropy.cpu().numpy(),
            forwards=decoded.forwards,
            next_draft=tuple(map(Draft, steps)),
        )

    def _average(self, prediction: Prediction, decoded: Decoded, drafts: Sequence[Draft | None]) -> Prediction:
        """Compute the chunks from token distributions: expected actions (`readout`), temporal ensembling, or both."""
        probabilities, following = decoded.distribution.exp().cpu().numpy(), prediction.next_draft
        if self.decoding.ensemble is not None:
            by_action = probabilities.reshape(*prediction.chunks.shape[:2], -1, probabilities.shape[-1])
            following = tuple(
                dataclasses.replace(new, past=(*(() if old is None else old.past), distribution))
                for new, old, distribution in zip(following, drafts, by_action, strict=True)
            )
            averaged = [ensemble_chunks(draft.past, self.decoding.ensemble) for draft in following]
            probabilities = np.stack(averaged).reshape(probabilities.shape)
        if self.decoding.readout == "mean":
            chunks = self.processor.expected_actions(probabilities, self.unnorm_key)
        else:
            ids = probabilities.argmax(-1) + self.network.config.action_token_begin
            chunks = self.processor.decode_actions(ids, self.unnorm_key)
        return dataclasses.replace(prediction, chunks=chunks, next_draft=following)

    def _streamer(self, on_action: Callable[[int, np.ndarray], None] | None, size: int) -> ActionStreamer | None:
        """The streamer that calls `on_action`. ConfigError if later tokens could change decoded actions."""
        if on_action is None:
            return None
        tokens = self.processor.action_tokenizer.tokens_per_action
        if tokens is None or size > 1 or not self._final_by_token:
            raise ConfigError(
                "streaming actions needs a batch of one observation and tokens for each action, without beams, readout "
                "'mean' or temporal ensembling."
            )

        def forward(index: int, ids: list[int]) -> None:
            on_action(index, self.processor.decode_actions(np.array(ids), self.unnorm_key)[0])

        return ActionStreamer(tokens, forward)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type `name`. ConfigError if it is unknown or `device` does not support it. Warns if a CPU emulates it."""
    if name not in get_args(Dtype):
        raise ConfigError(unknown("dtype", name, get_args(Dtype)))
    dtype: torch.dtype = getattr(torch, name)
    try:
        if (
            device.type == "cuda"
            and dtype == torch.bfloat16
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise RuntimeError("this GPU emulates it")
        image = torch.zeros(1, 1, 4, 4, dtype=dtype, device=device)
        torch.nn.functional.conv2d(image, image) @ torch.nn.functional.layer_norm(image, (4,))[..., :1, :]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"dtype {name!r} is not supported by the device {str(device)!r} ({reason}).") from None
    if device.type == "cpu" and not native(dtype):
        warnings.warn(
            f"this processor has no {name} instructions: {name} takes half the memory of float32, but is several times "
            "slower.",
            stacklevel=3,
        )
    return dtype


def choose_device(name: str) -> torch.device:
    """The device `name`; "auto": CUDA, else Apple's MPS, else the CPU. ConfigError if the device is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} is not available ({reason}). Use 'auto' or 'cpu'.") from None
    return device
