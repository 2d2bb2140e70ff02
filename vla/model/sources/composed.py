"""A language model with LLaMA architecture and vision towers, each from a folder or the Hugging Face Hub.

Owns: which models fit together, and the ids that action tokens and placeholders take. Embeddings are never resized:
these are the last ids of the vocabulary, as in OpenVLA (arXiv:2406.09246).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.errors import ConfigError, unknown
from vla.model.configuration import N_ACTION_ROWS, VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import Source
from vla.model.sources.hub import check_tower, image_statistics, load_config, load_model, load_tokenizer
from vla.model.sources.untrained import SIZES
from vla.model.vision import adapter
from vla.support.locations import missing_folder


class Composed(Source):
    """`name` is the language model, `ModelConfig.vision` the towers.

    Attributes:
        feature_layer: index of the towers' hidden states, counted from the end.
    """

    feature_layer = -2

    def __init__(self, name: str, model: ModelConfig) -> None:
        super().__init__(name, model)
        if (problem := missing_folder(name)) and "/" not in name:
            raise ConfigError(unknown("backbone", name, ["nano", *SIZES], f"For another: {problem}"))
        self._text = load_config(name, "backbone")
        _check_language_model(name, self._text)
        if not model.vision:
            raise ConfigError(
                f"{name!r} is not a checkpoint of this package, so it needs a vision tower: set `vision` to the folder "
                "or hub id of a SigLIP, DINOv2 or CLIP model."
            )
        towers = [load_config(tower, "vision tower") for tower in model.vision]
        # Of a SigLIP or CLIP model with both towers, only the vision tower is loaded.
        self._whole = [hasattr(tower, "vision_config") for tower in towers]
        self._set_parts(self._text, model.vision, [getattr(tower, "vision_config", tower) for tower in towers])

    def _set_parts(self, text: PreTrainedConfig, names: Sequence[str], towers: list[PreTrainedConfig]) -> None:
        """Set the configurations of the language model and the towers, the latter's names, and the text tokenizer."""
        self._text, self._names, self._towers = text, names, towers
        self._tokenizer = load_tokenizer(self.name, text.vocab_size)
        text.pad_token_id = self._tokenizer.pad_token_id

    @classmethod
    def probe(cls, name: str) -> bool:
        return True

    def config(self) -> VLAConfig:
        named = list(zip(self._names, self._towers, strict=True))
        for name, tower in named:
            adapter(tower).check(name, tower)
        means, stds = zip(*(image_statistics(name, tower) for name, tower in named), strict=True)
        begin = _action_rows(self._text.vocab_size, self._tokenizer.all_special_ids)
        config = VLAConfig(
            text_config=self._text.to_dict(),
            vision_configs=[tower.to_dict() for tower in self._towers],
            vision_feature_layer=self.feature_layer,
            image_mean=list(means),
            image_std=list(stds),
            image_size=self.model.image_size or self._towers[0].image_size,
            projector_layers=2 if len(self._towers) == 1 else 3,
            layout="image_first",
            action_token_begin=begin,
            n_action_rows=N_ACTION_ROWS,
            image_token_id=begin - 1,
            state_token_id=begin - 2,
        )
        size = config.image_size
        for name, tower in zip(self._names, config.vision_configs, strict=True):
            if tower.image_size != size and not adapter(tower).any_size:
                raise ConfigError(f"the vision tower was built for images of {tower.image_size}, not {size}.")
            check_tower(name, tower, size, config.vision_feature_layer)
        return config

    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        decoder = _load_decoder(self.name, self._text)
        towers = [
            load_model(AutoModel, name, "vision tower", tower, foreign)
            for name, tower, foreign in zip(self._names, self._towers, self._whole, strict=True)
        ]
        config.text_config.tie_word_embeddings = False
        return VLAForActionPrediction(config, towers, decoder), self._tokenizer


def _check_language_model(name: str, config: PreTrainedConfig) -> None:
    """Raise ConfigError unless `config` describes a plain language model."""
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise ConfigError(
            f"{name!r} ({config.model_type}) is a vision-language model; `backbone` must be a plain language model. "
            "Name the language model that it is based on."
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(f"{name!r} ({config.model_type}) is not a language model: its config.json has no vocab_size.")


def _load_decoder(backbone: str, config: PreTrainedConfig) -> Any:
    decoder = load_model(AutoModelForCausalLM, backbone, "backbone", config)
    head = getattr(decoder, "lm_head", None)
    if head is None or head.bias is not None or not hasattr(decoder, "model"):
        raise ConfigError(f"{backbone!r} ({decoder.config.model_type}) is not a LLaMA-architecture causal LM.")
    return untied(decoder)


def untied(decoder: Any) -> Any:
    """The language model, with its head untied from the embedding, since action rows differ as inputs and outputs."""
    head = decoder.lm_head
    if decoder.config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        decoder.config.tie_word_embeddings = False
        decoder.all_tied_weights_keys = {}  # otherwise the head would not be saved
    return decoder


def _action_rows(vocab_size: int, special: list[int]) -> int:
    """First id of the action rows, which are as close to the end of the vocabulary as its special tokens allow. The two
    placeholders directly precede them."""
    begin = vocab_size - N_ACTION_ROWS
    while inside := [i for i in special if begin - 2 <= i < begin + N_ACTION_ROWS]:
        begin = min(inside) - N_ACTION_ROWS
    if begin < 8:
        raise ConfigError(f"a vocabulary of {vocab_size} has no room for {N_ACTION_ROWS} action rows.")
    return begin
