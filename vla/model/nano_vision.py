"""The vision tower of the built-in backbone: a small convolutional encoder for CPUs.

Owns: its configuration and network. An overlapping patch convolution of stride 4 and a 3x3 convolution of stride 2
reduce an image of 96 pixels to 12 x 12 cells. Residual blocks mix neighbouring cells, and a patch-merging convolution
yields 4 x 4 = 16 tokens per camera. The token count is small because the decoder dominates the run time. The early
strides are large because, on a CPU, elementwise operations on large feature maps cost more than all convolutions.

The residual blocks can be conditioned on a vector by feature-wise linear modulation (FiLM; Perez et al., 2018,
arXiv:1709.07871), as in RT-1 (arXiv:2212.06817) and OpenVLA-OFT+ (arXiv:2502.19645). The vector is the mean word
embedding of the instruction. With it, a policy trained from scratch learned to select the object in the instruction
from a tenth of the data that attention alone needed. A second vector can encode the order of the words, which tells
"red on blue" from "blue on red". It does not know cameras, words or actions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from vla.errors import ConfigError


@strict
class NanoVisionConfig(PreTrainedConfig):
    """Configuration of `NanoVisionModel`.

    Attributes:
        image_size: side length of the square images in pixels.
        channels: channels after the stride-4 and the stride-2 convolution.
        blocks: number of residual blocks.
        merge: `merge` x `merge` cells become one token.
        hidden_size: width of the output tokens.
        condition_size: width of the conditioning vector; None disables conditioning.
        order_size: width of a second conditioning vector, the order of the words; None: none.
        keypoints: number of keypoints (spatial softmax), whose coordinates are added to every token; 0: none.
        grid: if False, an image has one token, made of its keypoints.
    """

    model_type = "vla_nano_vision"

    image_size: int = 96
    channels: Any = None
    blocks: int = 2
    merge: int = 3
    hidden_size: int = 256
    condition_size: int | None = None
    order_size: int | None = None
    keypoints: int = 0
    grid: bool = True

    def __post_init__(self, **kwargs) -> None:
        self.channels = self.channels or [48, 128]
        if not self.grid and not self.keypoints:
            raise ConfigError("a vision tower without a grid of tokens needs keypoints.")
        super().__post_init__(**kwargs)

    @property
    def patch_size(self) -> int:
        return 8 * self.merge if self.grid else self.image_size


class _Residual(nn.Module):
    """x + conv(relu(conv(FiLM(norm(x))))), where FiLM(h) = h * (1 + scale) + shift, per channel."""

    def __init__(self, channels: int, condition_size: int | None, order_size: int | None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.film = nn.Linear(condition_size, 2 * channels) if condition_size else None
        self.film_order = _zero_linear(order_size, 2 * channels) if order_size else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None, order: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = self.norm(x)
        if self.film is not None:
            film = self.film(condition)
            if self.film_order is not None:
                film = film + self.film_order(order)
            scale, shift = film[..., None, None].chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        return x + self.conv2(nn.functional.relu(self.conv1(hidden)))


def _zero_linear(width: int, out: int) -> nn.Linear:
    """A linear map whose output is 0 until it is trained."""
    layer = nn.Linear(width, out, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


class Keypoints(nn.Module):
    """Spatial softmax (Levine et al., 2016, arXiv:1504.00702): each of `count` maps is a distribution over the cells,
    and the keypoint is its mean, with coordinates in -1..1."""

    def __init__(self, channels: int, count: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, count, 1)
        self.out = nn.Linear(2 * count, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map [B, channels, h, w] -> [B, 1, width]."""
        maps = self.maps(x).float()
        height, width = maps.shape[-2:]
        share = maps.flatten(2).softmax(-1).view_as(maps)
        down = share.sum(3) @ torch.linspace(-1, 1, height, device=x.device)
        right = share.sum(2) @ torch.linspace(-1, 1, width, device=x.device)
        return self.out(torch.cat([down, right], dim=1).to(x.dtype)).unsqueeze(1)


class NanoVisionModel(PreTrainedModel):
    """pixel_values [B, 3, S, S], condition [B, condition_size + order_size] -> last_hidden_state
    [B, (S / patch_size)^2, hidden_size]."""

    config_class = NanoVisionConfig
    base_model_prefix = "nano_vision"
    main_input_name = "pixel_values"

    def __init__(self, config: NanoVisionConfig) -> None:
        super().__init__(config)
        first, second = config.channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 7, stride=4, padding=3),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
        )
        self.condition_norm = nn.LayerNorm(config.condition_size) if config.condition_size else None
        self.order_norm = nn.LayerNorm(config.order_size) if config.order_size else None
        self.blocks = nn.ModuleList(
            _Residual(second, config.condition_size, config.order_size) for _ in range(config.blocks)
        )
        self.keypoints = Keypoints(second, config.keypoints, config.hidden_size) if config.keypoints else None
        self.merge = nn.Conv2d(second, config.hidden_size, config.merge, stride=config.merge) if config.grid else None
        self.position_embedding = nn.Parameter(
            torch.zeros(1, (config.image_size // config.patch_size) ** 2, config.hidden_size)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Convolutions keep torch's default initialisation.
        if isinstance(module, NanoVisionModel):
            # The scale of the features. With the usual 0.02, tokens hardly encoded positions, and the policy did not
            # learn to locate a single red object.
            nn.init.normal_(module.position_embedding, std=1.0)

    def add_order(self) -> None:
        """Condition an existing tower on the order of the words, too. Until it is trained, this changes nothing."""
        width = self.config.condition_size
        assert width is not None and self.order_norm is None
        self.config.order_size = width
        self.order_norm = nn.LayerNorm(width)
        for block in cast("list[Any]", self.blocks):
            block.film_order = _zero_linear(width, block.film.out_features)
        self.to(self.position_embedding)

    @torch.no_grad()
    def condition_on(self, width: int, typical: torch.Tensor) -> None:
        """Replace the conditioning by an untrained one for vectors of another width, without the order of the words.
        Until the tower is trained, every vector acts like `typical`, [condition_size], with an order of zeros."""
        assert self.condition_norm is not None
        typical = self.condition_norm(typical)
        for block in cast("list[Any]", self.blocks):
            bias = block.film(typical)
            if self.order_norm is not None:
                bias = bias + block.film_order(self.order_norm(torch.zeros_like(typical)))
            block.film, block.film_order = nn.Linear(width, len(bias)), None
            block.film.weight.zero_()
            block.film.bias.copy_(bias)
        self.condition_norm, self.order_norm = nn.LayerNorm(width), None
        self.config.condition_size, self.config.order_size = width, None

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> BaseModelOutput:
        x = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        order = None
        if self.order_norm is not None:
            assert condition is not None
            condition, order = condition.split([self.config.condition_size, self.config.order_size], dim=-1)
            order = self.order_norm(order)
        if self.condition_norm is not None:
            condition = self.condition_norm(condition)
        for block in self.blocks:
            x = block(x, condition, order)
        tokens = self.position_embedding
        if self.merge is not None:
            tokens = tokens + self.merge(x).flatten(2).transpose(1, 2)
        if self.keypoints is not None:
            tokens = tokens + self.keypoints(x)
        return BaseModelOutput(last_hidden_state=self.norm(tokens))


AutoConfig.register("vla_nano_vision", NanoVisionConfig)
AutoModel.register(NanoVisionConfig, NanoVisionModel)
