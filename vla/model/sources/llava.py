"""LLaVA (Liu et al., arXiv:2304.08485): a vision tower, a two-layer projector and a LLaMA that were trained together.

Owns: reusing the three parts, including the trained projector.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.errors import ConfigError
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import SOURCES, Source
from vla.model.sources.checkpoint import reject_vision
from vla.model.sources.composed import Composed, causal_lm
from vla.model.sources.hub import load_config, load_model, model_type
from vla.model.sources.towers import HubTower

# Fields of config.json -> the only supported values.
_SUPPORTED = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",  # without the class token
}


@SOURCES.register("llava")
class Llava(Composed):
    """A folder or hub id for transformers' `LlavaForConditionalGeneration`."""

    def __init__(self, name: str, model: ModelConfig) -> None:
        Source.__init__(self, name, model)
        reject_vision(name, model)
        self._whole_config = whole = load_config(name, "backbone")
        for field, supported in _SUPPORTED.items():
            if (value := getattr(whole, field)) != supported:
                raise ConfigError(f"{name!r} has {field} {value!r}; only {supported!r} is supported.")
        if not isinstance(whole.vision_feature_layer, int) or whole.vision_feature_layer >= 0:
            raise ConfigError(
                f"{name!r} has vision_feature_layer {whole.vision_feature_layer!r}; only one layer, counted from the "
                "end (-1, -2, ...), is supported."
            )
        self.feature_layer = whole.vision_feature_layer
        self._set_parts(whole.text_config, [HubTower(name, whole.vision_config)])

    @classmethod
    def probe(cls, name: str) -> bool:
        return model_type(name) == "llava"

    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        whole = load_model(AutoModelForImageTextToText, self.name, "backbone", self._whole_config)
        decoder = causal_lm(self._text, whole.model.language_model, whole.lm_head)
        config.text_config.tie_word_embeddings = False
        network = VLAForActionPrediction(config, [whole.model.vision_tower], decoder)
        trained = whole.model.multi_modal_projector
        with torch.no_grad():
            for ours, theirs in ((network.projector[0], trained.linear_1), (network.projector[2], trained.linear_2)):
                ours.load_state_dict(theirs.state_dict())
        return network, self._tokenizer
