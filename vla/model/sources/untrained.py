"""Untrained architectures of this package: "nano-init" and "small-init"."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vla.errors import ConfigError
from vla.model.configuration import N_ACTION_ROWS, VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import SOURCES, Source
from vla.model.sources.checkpoint import NANO, reject_vision

# Decoder width, decoder layers, encoder channels, encoder blocks, image size in pixels.
SIZES = {"nano-init": (256, 4, [48, 128], 2, 96), "small-init": (512, 8, [64, 256], 4, 144)}


@SOURCES.register("untrained")
class Untrained(Source):
    """A convolutional encoder conditioned on the instruction, and a LLaMA decoder, with random weights.

    "nano-init" is for CPUs and has the architecture of the built-in backbone: images of 96 pixels, 16 tokens per
    camera, 4 decoder layers of width 256, 5 M parameters. "small-init" is for GPUs: images of 144 pixels, 36 tokens per
    camera, 8 decoder layers of width 512, 36 M parameters. `ModelConfig.image_size` overrides the image size.
    """

    @classmethod
    def probe(cls, name: str) -> bool:
        return name in SIZES

    def config(self) -> VLAConfig:
        reject_vision(self.name, self.model)
        config = untrained_config(self.name, self.model.image_size)
        tower = config.vision_configs[0]
        tower.keypoints = self.model.keypoints or 0
        tower.grid = self.model.grid is not False
        if not tower.grid and not tower.keypoints:
            raise ConfigError(
                "model.grid false needs model.keypoints (32, for example); otherwise, an image has no tokens."
            )
        return config

    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        network = VLAForActionPrediction(config)
        _sharpen_attention(network)
        return network, AutoTokenizer.from_pretrained(NANO)


def untrained_config(name: str, image_size: int | None = None) -> VLAConfig:
    """The configuration of an untrained architecture; `image_size` in pixels, None: that of `SIZES`."""
    width, layers, channels, blocks, usual_size = SIZES[name]
    image_size = image_size or usual_size
    if image_size < 24:
        raise ConfigError(f"image_size must be at least 24 for {name!r}, got {image_size}.")
    return VLAConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 1024,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_configs=[
            {
                "model_type": "vla_nano_vision",
                "image_size": image_size,
                "channels": channels,
                "blocks": blocks,
                "hidden_size": width,
                "condition_size": width,
            }
        ],
        image_mean=[[0.5] * 3],
        image_std=[[0.25] * 3],
        image_size=image_size,
        projector_layers=1,
        action_token_begin=1024 - N_ACTION_ROWS,
        n_action_rows=N_ACTION_ROWS,
        image_token_id=3,
        state_token_id=4,
    )


@torch.no_grad()
def _sharpen_attention(network: VLAForActionPrediction, factor: float = 4.0) -> None:
    """Scale up the initial query and key weights, so that attention in a narrow decoder does not start uniform.

    With the usual standard deviation of 0.02 and a width of 256, attention logits start near 0.1, and learning where to
    attend takes several times as many samples.
    """
    for layer in network.language_model.model.layers:
        layer.self_attn.q_proj.weight.mul_(factor)
        layer.self_attn.k_proj.weight.mul_(factor)
