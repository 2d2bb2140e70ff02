"""Vision towers: an adapter for each kind of tower.

Owns: the number of tokens per image, the features of a tower, and the image statistics of its family. Adapters are
registered by the `model_type` of the tower's transformers configuration; `vla --plugin MODULE` adds others. A tower
without an adapter is treated as a vision transformer (`Tower`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from vla.errors import ConfigError
from vla.support.registry import Registry

TOWERS: Registry[type[Tower]] = Registry("kind of vision tower")


@TOWERS.register("siglip_vision_model")
class Tower:
    """A vision transformer such as SigLIP (arXiv:2303.15343): one token per patch of a square grid, preceded by class
    and register tokens.

    Attributes:
        mean, std: image statistics of the family, for images scaled to [0, 1]; the default for models without them.
        any_size: whether the tower accepts images of other sizes than its configuration's.
    """

    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    any_size: ClassVar[bool] = False

    @classmethod
    def check(cls, name: str, config: PreTrainedConfig) -> None:
        """Raise ConfigError if a tower with this configuration cannot be used. `name` is for the message."""
        if not isinstance(getattr(config, "patch_size", None), int):
            raise ConfigError(f"vision tower {name!r} ({config.model_type}) has no patch grid.")
        if not isinstance(getattr(config, "image_size", None), int):
            raise ConfigError(
                f"vision tower {name!r} ({config.model_type}) has no fixed image size. Use a variant that has one, "
                "such as the -224 or -256 variant of SigLIP 2 instead of -naflex."
            )

    @classmethod
    def tokens_per_image(cls, config: Any, image_size: int) -> int:
        """Number of tokens for a square image with sides of `image_size` pixels."""
        return (image_size // config.patch_size) ** 2

    @classmethod
    def width(cls, config: Any) -> int:
        """Number of features of a token."""
        return config.hidden_size

    @classmethod
    def features(cls, tower: nn.Module, images: torch.Tensor, layer: int) -> torch.Tensor:
        """Features [B, tokens, width] of normalised images [B, 3, S, S]; the network uses the last `tokens_per_image`.

        Args:
            layer: -1: the output of the tower; -2: the hidden states before its last block; and so on.
        """
        if layer == -1:
            return tower(pixel_values=images, return_dict=True).last_hidden_state
        return tower(pixel_values=images, output_hidden_states=True, return_dict=True).hidden_states[layer]


@TOWERS.register("clip_vision_model")
class CLIP(Tower):
    """CLIP (arXiv:2103.00020)."""

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)


@TOWERS.register("dinov2_with_registers")
@TOWERS.register("dinov2")
class DINOv2(Tower):
    """DINOv2 (arXiv:2304.07193), also with register tokens (arXiv:2309.16588). Trained on images of 518 pixels; for
    others, it interpolates position embeddings."""

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    any_size = True


@TOWERS.register("smolvlm_vision")
@TOWERS.register("idefics3_vision")
class Idefics3(Tower):
    """The tower of Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299). A token consists of `scale_factor` x
    `scale_factor` patches."""

    @classmethod
    def tokens_per_image(cls, config: Any, image_size: int) -> int:
        return (image_size // config.patch_size // config.scale_factor) ** 2

    @classmethod
    def width(cls, config: Any) -> int:
        return config.hidden_size * config.scale_factor**2

    @classmethod
    def features(cls, tower: nn.Module, images: torch.Tensor, layer: int) -> torch.Tensor:
        """As in `Tower.features`, but always of the last layer. A token's patches are concatenated row by row."""
        module: Any = tower
        config, side = module.config, images.shape[-1] // module.config.patch_size
        # Not `module.forward`: it inspects the mask, which synchronises with a GPU.
        whole = torch.ones(len(images), side, side, dtype=torch.bool, device=images.device)
        hidden = module.embeddings(pixel_values=images, patch_attention_mask=whole)
        patches = module.post_layernorm(module.encoder(inputs_embeds=hidden).last_hidden_state)
        scale = config.scale_factor
        cells = patches.view(-1, side // scale, scale, side // scale, scale, config.hidden_size)
        return cells.transpose(2, 3).reshape(len(patches), (side // scale) ** 2, -1)


def adapter(config: Any) -> type[Tower]:
    """The adapter for the tower with this configuration."""
    return TOWERS.get(config.model_type) if config.model_type in TOWERS else Tower


def tokens_per_image(configs: Any, image_size: int) -> int:
    """Tokens per camera image. ConfigError if the towers differ, because their features are concatenated per token."""
    counts = {adapter(config).tokens_per_image(config, image_size) for config in configs}
    if len(counts) != 1:
        raise ConfigError(
            f"vision towers must have the same number of tokens per image of {image_size} pixels, got {sorted(counts)}."
        )
    return counts.pop()
