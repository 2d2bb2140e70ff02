"""EfficientNet-Lite0 (Tan and Le, 2019, arXiv:1905.11946; the variant without squeeze-and-excitation, with ReLU6).

Owns: its configuration, network, published weights and features. Batch normalisation is folded into the convolutions
and not updated in training. A token covers a cell of 32 x 32 pixels: the 320 channels of the last block, and the 112
channels of the last stride-16 block at each of its 2 x 2 positions in the cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from vla.errors import CheckpointError, ConfigError
from vla.model.vision import TOWERS, Tower

# Expansion, channels, kernel, stride of the first block, number of blocks.
_STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
_STRIDE, _FINE_CHANNELS, _COARSE_CHANNELS = 32, 112, 320
_EPS = 1e-3  # of its batch normalisation


@strict
class EfficientNetLite0Config(PreTrainedConfig):
    """Configuration of `EfficientNetLite0Model`.

    Attributes:
        image_size: default side length of the square images in pixels; other sizes are accepted.
        hidden_size: width of the output tokens.
    """

    model_type = "vla_efficientnet_lite0"

    image_size: int = 224
    hidden_size: int = _COARSE_CHANNELS + 4 * _FINE_CHANNELS


class _Convolution(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, for sides that are multiples of the stride. An odd amount of
    padding is larger by one pixel at the bottom and right."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        before = (kernel - stride) // 2
        self._before_after = (before, kernel - stride - before) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, self._before_after) if self.kernel_size != (1, 1) else x)


class _Block(nn.Module):
    """Inverted residual block (MobileNetV2): expansion, depthwise convolution, projection, residual if shapes match."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Convolution(inputs, width) if expansion > 1 else None
        self.depthwise = _Convolution(width, width, kernel, stride, groups=width)
        self.project = _Convolution(width, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return x + hidden if self.residual else hidden


class EfficientNetLite0Model(PreTrainedModel):
    """pixel_values [B, 3, S, S] -> last_hidden_state [B, (S / 32)^2, hidden_size], for S a multiple of 32."""

    config_class = EfficientNetLite0Config
    base_model_prefix = "efficientnet"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLite0Config) -> None:
        super().__init__(config)
        self.stem = _Convolution(3, 32, 3, stride=2)
        blocks, inputs = [], 32
        for expansion, channels, kernel, stride, count in _STAGES:
            for index in range(count):
                blocks.append(_Block(inputs, channels, expansion, kernel, 1 if index else stride))
                inputs = channels
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions keep torch's default initialisation."""

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        x = F.relu6(self.stem(pixel_values.contiguous(memory_format=torch.channels_last)))
        fine = x
        for block in self.blocks:
            x = block(x)
            fine = x if x.shape[1] == _FINE_CHANNELS else fine
        features = torch.cat([x, F.pixel_unshuffle(fine, 2)], dim=1)
        return BaseModelOutput(last_hidden_state=features.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def load_published(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the published weights except the classifier. CheckpointError if they do not fit exactly."""
        remaining = {
            name: tensor
            for name, tensor in weights.items()
            if not name.startswith(("_conv_head.", "_bn1.", "_fc.")) and not name.endswith("num_batches_tracked")
        }

        def copy(into: Any, convolution: str, norm: str) -> None:
            names = [f"{convolution}.weight", *(f"{norm}.{name}" for name in _NORM)]
            if missing := [name for name in names if name not in remaining]:
                raise CheckpointError(f"the weights of EfficientNet-Lite0 lack {', '.join(missing)}.")
            kernel, scale, shift, mean, variance = (remaining.pop(name) for name in names)
            factor = scale / (variance + _EPS).sqrt()
            if kernel.shape != into.weight.shape:
                expected = list(into.weight.shape)
                raise CheckpointError(f"{names[0]} of EfficientNet-Lite0 must be {expected}, got {list(kernel.shape)}.")
            into.weight.copy_(kernel * factor[:, None, None, None])
            into.bias.copy_(shift - mean * factor)

        copy(self.stem, "_conv_stem", "_bn0")
        for index, block in enumerate(cast("list[Any]", self.blocks)):
            name = f"_blocks.{index}."
            if block.expand is not None:
                copy(block.expand, f"{name}_expand_conv", f"{name}_bn0")
            copy(block.depthwise, f"{name}_depthwise_conv", f"{name}_bn1")
            copy(block.project, f"{name}_project_conv", f"{name}_bn2")
        if named := ", ".join(sorted(remaining)):
            raise CheckpointError(f"the weights of EfficientNet-Lite0 have unknown keys: {named}.")


_NORM = ("weight", "bias", "running_mean", "running_var")


@TOWERS.register("vla_efficientnet_lite0")
class EfficientNetLite0(Tower):
    """One token per cell of 32 x 32 pixels."""

    any_size = True

    @classmethod
    def check(cls, name: str, config: PreTrainedConfig) -> None:
        """Every configuration can be used."""

    @classmethod
    def tokens_per_image(cls, config: Any, image_size: int) -> int:
        if image_size % _STRIDE:
            raise ConfigError(f"image_size must be a multiple of {_STRIDE} for EfficientNet-Lite0, got {image_size}.")
        return (image_size // _STRIDE) ** 2

    @classmethod
    def features(cls, tower: nn.Module, images: torch.Tensor, layer: int) -> torch.Tensor:
        """As in `Tower.features`; `layer` is ignored."""
        return tower(pixel_values=images, return_dict=True).last_hidden_state


AutoConfig.register("vla_efficientnet_lite0", EfficientNetLite0Config)
AutoModel.register(EfficientNetLite0Config, EfficientNetLite0Model)
