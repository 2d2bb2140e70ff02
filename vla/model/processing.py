"""VLAProcessor: observations -> prefix tensors, action chunks -> target tokens, tokens -> actions.

Owns: the only conversion between robot data and the model's tensors. Training, evaluation and deployment share it, so
training and serving prefixes are identical, bit for bit. All settings come from VLAConfig. It does not know files,
datasets or decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vla.model.configuration import VLAConfig
from vla.model.vision import tokens_per_image
from vla.spec import Observation
from vla.transforms.images import TRANSFORMS
from vla.transforms.prompt import build_prompt


class VLAProcessor:
    """Converts between robot data and the network's tensors according to a checkpoint's config.

    Args:
        config: the VLAConfig of the checkpoint; `check_policy` must pass.
        tokenizer: the language model's text tokenizer.
    """

    def __init__(self, config: VLAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        config.check_policy()
        self.config, self.tokenizer = config, tokenizer
        self.robot = config.robot_spec
        self.action_tokenizer = config.make_action_tokenizer()
        self.tokens_per_image = tokens_per_image(config.vision_configs, config.image_size)
        self._prompts: dict[str, list[int]] = {}
        self._actions = {key: config.action_normalizer(key) for key in config.statistics}
        self._states = {key: config.state_normalizer(key) for key in config.statistics}

    def prefix_ids(self, instruction: str) -> list[int]:
        """Token ids of a prefix: [BOS], prompt, and placeholders for images and state, in the order of the layout."""
        if instruction not in self._prompts:
            text = self.tokenizer(build_prompt(instruction, self.config.prompt), add_special_tokens=False)["input_ids"]
            # Placeholders and action tokens reuse ids of rare text tokens. Remove them from the text, or the network
            # would read them as images or actions. Also remove ids outside the embedding, of tokens that were added to
            # the tokenizer.
            begin, end = self.config.action_token_begin, self.config.action_token_begin + self.config.n_action_rows
            reserved = (self.config.image_token_id, self.config.state_token_id)
            size, first_id = self.config.vocab_size, self.tokenizer.bos_token_id
            text = [i for i in text if i < size and not begin <= i < end and i not in reserved]
            ending = self.config.prompt_end
            if text[len(text) - len(ending) :] != ending:
                text += ending
            bos = [] if first_id is None or first_id >= size else [first_id]
            images = [self.config.image_token_id] * (self.tokens_per_image * len(self.robot.cameras))
            state = [self.config.state_token_id] if self.config.use_state else []
            first = self.config.layout == "instruction_first"
            if len(self._prompts) > 100_000:  # bounds the memory of servers
                self._prompts.clear()
            self._prompts[instruction] = bos + (text + images + state if first else images + state + text)
        return self._prompts[instruction]

    def images(self, observation: Observation) -> np.ndarray:
        """The camera images, uint8 [C, S, S, 3], in the policy's order and image size."""
        pixels = observation["pixels"]
        transform, size = TRANSFORMS[self.config.image_transform], self.config.image_size
        return np.stack([transform(np.asarray(pixels[name]), size) for name in self.robot.cameras])

    def state(self, states: np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """[..., S] in the robot's units -> float32 [..., max_state_dim], normalised and padded with zeros."""
        normalizer = self._states[self.config.unnorm_key(unnorm_key)]
        padded = np.zeros((*np.shape(states)[:-1], self.config.max_state_dim), np.float32)
        if normalizer is not None:
            padded[..., : np.shape(states)[-1]] = normalizer.normalize(states)
        return padded

    def __call__(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        states: np.ndarray | None = None,
        suffix: np.ndarray | None = None,
        pad_to: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Batch tensors for the model.

        Args:
            images: one uint8 [C, S, S, 3] per sample, from `images`.
            instructions: one per sample.
            states: float32 [B, max_state_dim], from `state`; ignored if the policy does not use the state.
            suffix: int64 [B, T], ids of the model's vocabulary to append (for training and scoring).
            pad_to: minimum length of the padded prefixes (for static shapes).
        Returns:
            input_ids and attention_mask, int64 [B, L], padded on the left; pixel_values, uint8 [B, C, 3, S, S]; and
            state, float32 [B, max_state_dim], if the policy uses the state.
        """
        prefixes = [self.prefix_ids(instruction) for instruction in instructions]
        length = max([pad_to or 0, *map(len, prefixes)])
        pad = self.tokenizer.pad_token_id or 0
        ids = np.full((len(prefixes), length), pad, np.int64)
        mask = np.zeros((len(prefixes), length), np.int64)
        for row, prefix in enumerate(prefixes):
            ids[row, length - len(prefix) :] = prefix
            mask[row, length - len(prefix) :] = 1
        if suffix is not None:
            ids = np.concatenate([ids, suffix], axis=1)
            mask = np.concatenate([mask, np.ones_like(suffix)], axis=1)
        pixels = torch.from_numpy(np.ascontiguousarray(np.stack(images))).permute(0, 1, 4, 2, 3)
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), "pixel_values": pixels}
        if self.config.use_state:
            batch["state"] = torch.from_numpy(np.asarray(states, np.float32))
        return batch

    def observe(
        self, observations: Sequence[Observation], instructions: Sequence[str], unnorm_key: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Prefix tensors for live observations. SpecError if an observation does not fit the RobotSpec."""
        for observation in observations:
            self.robot.check_observation(observation)
        states = None
        if self.config.use_state:
            raw = (
                np.stack([np.asarray(o["agent_pos"]) for o in observations])
                if self.robot.state_dim
                else np.zeros((len(observations), 0))
            )
            states = self.state(raw, unnorm_key)
        return self([self.images(o) for o in observations], instructions, states)

    def encode_actions(self, chunks: np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Chunks [..., H, D] in the robot's units -> int64 [..., T] ids of the model's vocabulary."""
        normalized = self._actions[self.config.unnorm_key(unnorm_key)].normalize(chunks)
        return self.action_tokenizer.encode(normalized) + self.config.action_token_begin

    def token_mask(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The tokens to learn, bool [..., T].

        Args:
            ids: int64 [..., T], from `encode_actions`.
            valid: bool [..., H], the actions to learn.
        """
        return self.action_tokenizer.token_mask(ids - self.config.action_token_begin, valid)

    def decode_actions(self, ids: np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Inverse of `encode_actions`, up to quantisation: float32 [..., H, D] in the robot's units."""
        normalized = self.action_tokenizer.decode(np.asarray(ids) - self.config.action_token_begin)
        return self._actions[self.config.unnorm_key(unnorm_key)].unnormalize(normalized)

    def expected_actions(self, probabilities: np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Token probabilities [..., T, rows] -> expected chunk, float32 [..., H, D] in the robot's units."""
        normalized = self.action_tokenizer.expect(probabilities)
        return self._actions[self.config.unnorm_key(unnorm_key)].unnormalize(normalized)

    def unnormalize(self, values: np.ndarray, unnorm_key: str | None = None) -> np.ndarray:
        """Normalised entries [..., D] -> the robot's units. -1 and 1 map to the action bounds."""
        return self._actions[self.config.unnorm_key(unnorm_key)].unnormalize(values)

    def save_pretrained(self, folder: Any) -> None:
        self.tokenizer.save_pretrained(folder)
