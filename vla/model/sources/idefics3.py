"""Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): a SigLIP tower, a linear connector and a LLaMA that were
trained together.

Owns: reusing the three parts. Unlike in these models, a camera image is resized to the tower's size instead of being
split into tiles, and no text surrounds its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import SOURCES, Source
from vla.model.sources.checkpoint import reject_vision
from vla.model.sources.composed import Composed, causal_lm
from vla.model.sources.hub import load_config, load_model, model_type
from vla.model.sources.towers import HubTower


@SOURCES.register("idefics3")
class Idefics3(Composed):
    """A folder or hub id for transformers' `Idefics3ForConditionalGeneration` or `SmolVLMForConditionalGeneration`."""

    feature_layer = -1

    def __init__(self, name: str, model: ModelConfig) -> None:
        Source.__init__(self, name, model)
        reject_vision(name, model)
        self._whole_config = whole = load_config(name, "backbone")
        whole.text_config.tie_word_embeddings = whole.tie_word_embeddings
        tower = whole.vision_config
        tower.scale_factor = whole.scale_factor
        self._set_parts(whole.text_config, [HubTower(name, tower)])

    @classmethod
    def probe(cls, name: str) -> bool:
        return model_type(name) in ("idefics3", "smolvlm")

    def config(self) -> VLAConfig:
        config = super().config()
        config.projector_layers = 1
        return config

    @torch.no_grad()
    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        whole = load_model(AutoModelForImageTextToText, self.name, "backbone", self._whole_config)
        decoder = causal_lm(self._text, whole.model.text_model, whole.lm_head)
        config.text_config.tie_word_embeddings = False
        network = VLAForActionPrediction(config, [whole.model.vision_model], decoder)
        ours: Any = network.projector[0]
        ours.weight.copy_(whole.model.connector.modality_projection.proj.weight)
        ours.bias.zero_()  # Idefics3's projection has no bias
        return network, self._tokenizer
