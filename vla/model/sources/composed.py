"""A LLaMA-architecture language model joined with separately trained vision towers.

Owns: the check that the models fit together, and the ids of action tokens and placeholders. These ids are
at the end of the vocabulary, as in OpenVLA (arXiv:2406.09246), so embeddings are not resized.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.errors import ConfigError, unknown
from vla.model.configuration import N_ACTION_ROWS, VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import Source
from vla.model.sources.hub import load_config, load_model, load_tokenizer
from vla.model.sources.towers import TOWER_SOURCES, TowerSource, tower_source
from vla.model.sources.untrained import SIZES
from vla.support.locations import missing_folder


class Composed(Source):
    """A backbone from the language model `name` and the towers `ModelConfig.vision`.

    Attributes:
        feature_layer: index of the towers' hidden states, counted from the end.
    """

    feature_layer = -2

    def __init__(self, name: str, model: ModelConfig) -> None:
        super().__init__(name, model)
        text = self._read_config()
        if not model.vision:
            raise ConfigError(
                f"{name!r} is not a checkpoint of this package, so it needs a vision tower: set `vision` to the folder "
                f"or hub id of a SigLIP, DINOv2 or CLIP model, or to {' or '.join(map(repr, TOWER_SOURCES))}."
            )
        self._set_parts(text, [tower_source(tower, text) for tower in model.vision])

    def _set_parts(self, text: PreTrainedConfig, towers: list[TowerSource]) -> None:
        """Set the configuration of the language model, its text tokenizer, and the towers."""
        self._text, self._towers = text, towers
        self._tokenizer = self._read_tokenizer(text)
        text.pad_token_id = self._tokenizer.pad_token_id

    @classmethod
    def probe(cls, name: str) -> bool:
        return True

    def _read_config(self) -> PreTrainedConfig:
        """The configuration of the language model. ConfigError if it is missing or not a language model."""
        if (problem := missing_folder(self.name)) and "/" not in self.name:
            known = ["nano", *SIZES, "smollm2"]
            raise ConfigError(unknown("backbone", self.name, known, f"As a folder or hub id: {problem}"))
        text = load_config(self.name, "backbone")
        _check_language_model(self.name, text)
        return text

    def _read_tokenizer(self, text: PreTrainedConfig) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.name, text.vocab_size)

    def _read_decoder(self, text: PreTrainedConfig) -> Any:
        return load_model(AutoModelForCausalLM, self.name, "backbone", text)

    def config(self) -> VLAConfig:
        means, stds = zip(*(tower.statistics() for tower in self._towers), strict=True)
        rows = max(N_ACTION_ROWS, self.model.bins or 0)
        begin = _action_rows(rows, self._text.vocab_size, self._tokenizer.all_special_ids)
        config = VLAConfig(
            text_config=self._text.to_dict(),
            vision_configs=[tower.config.to_dict() for tower in self._towers],
            vision_feature_layer=self.feature_layer,
            image_mean=list(means),
            image_std=list(stds),
            image_size=self.model.image_size or self._towers[0].config.image_size,
            projector_layers=2 if len(self._towers) == 1 else 3,
            layout="image_first",
            action_token_begin=begin,
            n_action_rows=rows,
            image_token_id=begin - 1,
            state_token_id=begin - 2,
        )
        for tower in self._towers:
            tower.check(config.image_size, config.vision_feature_layer)
        return config

    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        decoder = self._read_decoder(self._text)
        head = getattr(decoder, "lm_head", None)
        if head is None or head.bias is not None or not hasattr(decoder, "model"):
            raise ConfigError(f"{self.name!r} ({self._text.model_type}) is not a LLaMA-architecture causal LM.")
        towers = [tower.load() for tower in self._towers]
        config.text_config.tie_word_embeddings = False
        return VLAForActionPrediction(config, towers, untied(decoder)), self._tokenizer


def _check_language_model(name: str, config: PreTrainedConfig) -> None:
    """Raise ConfigError if `config` does not describe a plain language model."""
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise ConfigError(
            f"{name!r} ({config.model_type}) is a vision-language model, but `backbone` must be a plain language "
            "model. Name the language model that it is based on."
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(f"{name!r} ({config.model_type}) is not a language model: its config.json has no vocab_size.")


def causal_lm(config: PreTrainedConfig, model: Any, head: Any) -> Any:
    """A language model with this configuration, from the decoder `model` and the `head` of a larger model."""
    with init_empty_weights():
        decoder = AutoModelForCausalLM.from_config(config)
    decoder.model, decoder.lm_head = model, head
    return untied(decoder)


def untied(decoder: Any) -> Any:
    """Untie a language model's head from its embedding, so that action tokens learn both separately."""
    head = decoder.lm_head
    if decoder.config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        decoder.config.tie_word_embeddings = False
        decoder.all_tied_weights_keys = {}  # otherwise the head would not be saved
    return decoder


def _action_rows(rows: int, vocab_size: int, special: list[int]) -> int:
    """First id of the action rows. They are as close to the end of the vocabulary as its special tokens allow, and the
    two placeholders directly precede them."""
    begin = vocab_size - rows
    while inside := [i for i in special if begin - 2 <= i < begin + rows]:
        begin = min(inside) - rows
    if begin < 8:
        raise ConfigError(f"a vocabulary of {vocab_size} has no room for {rows} action rows.")
    return begin
