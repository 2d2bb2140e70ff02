"""Where a policy's weights come from: the embedded backbone, a checkpoint of this package, or any LLaMA-architecture
causal language model with any SigLIP/DINOv2/CLIP tower.

Owns: turning a `ModelConfig` plus what the data says (robot, statistics) into a network and its processor. Embeddings
are never resized: action tokens and placeholders take over the tail of the vocabulary. It does not know training.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from vla.actions.bins import OpenVLABins, QuantileBins, UniformBins
from vla.actions.tokenizer import ActionTokenizer
from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError, unknown
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.spec import RobotSpec

NANO = Path(__file__).parent.parent / "pretrained" / "nano"
N_ACTION_ROWS = 256
# Odd, so that one bin's centre is exactly 0.
DEFAULT_BINS = 255

# Untrained architectures: width, layers, channels and residual blocks of the encoder, image side in pixels.
_SIZES = {"nano-init": (256, 4, [48, 128], 2, 96), "small-init": (512, 8, [64, 256], 4, 144)}

_MEAN_STD = {
    "siglip": ([0.5] * 3, [0.5] * 3),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What the demonstrations decide about a policy.

    Attributes:
        robot: the RobotSpec; its cameras are the dataset's.
        statistics: unnorm_key -> {"action": ..., "state": ...} as `compute_statistics` returns.
        actions: unnorm_key -> float32 [N, D], all actions (quantile bins are fitted to them).
    """

    robot: RobotSpec
    statistics: dict[str, dict[str, Any]]
    actions: dict[str, np.ndarray]


def build_policy(model: ModelConfig, facts: DataFacts) -> tuple[VLAForActionPrediction, VLAProcessor]:
    """The network to train and its processor. Errors: ConfigError, CheckpointError."""
    robot = _choose_cameras(facts.robot, model.cameras)
    backbone = model.backbone or "nano"
    if model.vision and (backbone in _SIZES or find_checkpoint(backbone) is not None):
        raise ConfigError(f"{backbone} already has its vision tower; leave `vision` empty.")
    if backbone in _SIZES:
        config, tokenizer = untrained_config(backbone, model.image_size), AutoTokenizer.from_pretrained(NANO)
        _set_policy(config, model, facts, robot)
        network = VLAForActionPrediction(config)
        _sharpen_attention(network)
    elif (own := find_checkpoint(backbone)) is not None:
        config = VLAConfig.from_pretrained(own)
        if model.image_size not in (None, config.image_size):
            raise ConfigError(f"{backbone} was built for images of {config.image_size}, not {model.image_size}.")
        _set_policy(config, model, facts, robot)
        network = VLAForActionPrediction.from_pretrained(own, config=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(own)
    else:
        network, tokenizer = _compose(backbone, model, facts, robot)
    if robot.state_dim > network.config.max_state_dim:
        raise ConfigError(f"the state has {robot.state_dim} entries; at most {network.config.max_state_dim} fit.")
    return network, VLAProcessor(network.config, tokenizer)


def find_checkpoint(name: str) -> Path | None:
    """The folder of one of this package's checkpoints: "nano", a run folder, or a checkpoint folder; else None."""
    for folder in [NANO] if name == "nano" else [Path(name) / "policy", Path(name)]:
        config = folder / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("model_type") == "vla":
            return folder
    if name == "nano":
        raise CheckpointError("this installation has no embedded backbone; reinstall the package.")
    return None


def untrained_config(name: str, image_size: int | None = None) -> VLAConfig:
    """An architecture of this package: a convolutional encoder that the instruction steers, and a LLaMA decoder.

    "nano-init" is that of the embedded backbone, for CPUs: 96 pixels, 16 tokens per camera, 4 layers of 256, 5 M
    parameters. "small-init" is for GPUs: 144 pixels, 36 tokens per camera, 8 layers of 512, 36 M parameters.
    `image_size` is another side in pixels than these.
    """
    width, layers, channels, blocks, usual_size = _SIZES[name]
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
    """Scale up the initial query and key weights, so that a narrow decoder does not start by attending to everything.

    At the usual standard deviation of 0.02 and a width of 256 attention logits start near 0.1: every token sees the
    mean of all others, and finding out which one to look at takes several times as many samples.
    """
    for layer in network.language_model.model.layers:
        layer.self_attn.q_proj.weight.mul_(factor)
        layer.self_attn.k_proj.weight.mul_(factor)


def _compose(
    backbone: str, model: ModelConfig, facts: DataFacts, robot: RobotSpec
) -> tuple[VLAForActionPrediction, Any]:
    if not model.vision:
        raise ConfigError(
            f"{backbone!r} is not a checkpoint of this package, so a vision tower is needed: name a SigLIP, "
            "DINOv2 or CLIP folder or hub id in `vision`."
        )
    text_config = _load(AutoConfig, backbone, "backbone")
    tokenizer = _load(AutoTokenizer, backbone, "text tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    visions = [_load(AutoConfig, name, "vision tower") for name in model.vision]
    visions = [getattr(vision, "vision_config", vision) for vision in visions]
    for name, vision in zip(model.vision, visions, strict=True):
        if not isinstance(getattr(vision, "patch_size", None), int):
            raise ConfigError(f"vision tower {name!r} ({vision.model_type}) has no patch grid.")
    means, stds = zip(*(_image_statistics(n, v) for n, v in zip(model.vision, visions, strict=True)), strict=True)
    begin = _action_rows(text_config.vocab_size, tokenizer.all_special_ids)
    config = VLAConfig(
        text_config=text_config.to_dict(),
        vision_configs=[vision.to_dict() for vision in visions],
        vision_feature_layer=-2,
        image_mean=list(means),
        image_std=list(stds),
        image_size=model.image_size or visions[0].image_size,
        projector_layers=2 if len(visions) == 1 else 3,
        layout="image_first",
        action_token_begin=begin,
        n_action_rows=N_ACTION_ROWS,
        image_token_id=begin - 1,
        state_token_id=begin - 2,
    )
    _set_policy(config, model, facts, robot)
    for vision in config.vision_configs:
        # DINOv2 interpolates its position embeddings by itself (its own images have 518 pixels).
        if vision.image_size != config.image_size and not vision.model_type.startswith("dinov2"):
            raise ConfigError(f"the vision tower was built for images of {vision.image_size}, not {config.image_size}.")
    decoder = _load_decoder(backbone)
    towers = [
        _load(AutoModel, name, "vision tower", config=vision, dtype=torch.float32)
        for name, vision in zip(model.vision, visions, strict=True)
    ]
    config.text_config.tie_word_embeddings = False
    return VLAForActionPrediction(config, towers, decoder), tokenizer


def _load_decoder(backbone: str) -> Any:
    """The language model, with a head of its own: action rows mean one thing when read and another when predicted."""
    decoder = _load(AutoModelForCausalLM, backbone, "backbone", dtype=torch.float32)
    head = getattr(decoder, "lm_head", None)
    if head is None or head.bias is not None or not hasattr(decoder, "model"):
        raise ConfigError(f"{backbone!r} ({decoder.config.model_type}) is not a LLaMA-architecture causal LM.")
    if decoder.config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        decoder.config.tie_word_embeddings = False
        decoder.all_tied_weights_keys = {}  # or the head would be left out when the network is saved
    return decoder


def _action_rows(vocab_size: int, special: list[int]) -> int:
    """First id of the action rows: as near to the vocabulary's end as its special tokens allow, with the two
    placeholders in front."""
    begin = vocab_size - N_ACTION_ROWS
    while inside := [i for i in special if begin - 2 <= i < begin + N_ACTION_ROWS]:
        begin = min(inside) - N_ACTION_ROWS
    if begin < 8:
        raise ConfigError(f"a vocabulary of {vocab_size} has no room for {N_ACTION_ROWS} action rows.")
    return begin


def _set_policy(config: VLAConfig, model: ModelConfig, facts: DataFacts, robot: RobotSpec) -> None:
    """Write what an action means into `config`: robot, statistics, tokenizer, horizon, prompt."""
    before = config.action_tokenizer  # that of the checkpoint which is trained further
    config.robot, config.statistics = robot.to_dict(), facts.statistics
    config.use_state, config.normalization = model.use_state, model.normalization
    config.prompt = model.prompt or config.prompt
    config.horizon = model.horizon or config.horizon
    kept = config.n_action_steps if before and model.horizon is None else max(1, config.horizon // 2)
    config.n_action_steps = model.n_action_steps or kept
    if not 1 <= config.n_action_steps <= config.horizon:
        raise ConfigError(f"n_action_steps {config.n_action_steps} must be between 1 and the horizon {config.horizon}.")
    bins = model.bins or (before or {}).get("n_bins", DEFAULT_BINS)
    normalizers = {key: config.action_normalizer(key) for key in facts.statistics}
    constant = np.logical_and.reduce([normalizer.constant for normalizer in normalizers.values()])
    if constant.all():
        raise ConfigError("no action entry ever moves in this data; there is nothing to learn.")
    active = np.flatnonzero(~constant).tolist()
    normalized = np.concatenate([normalizers[key].normalize(actions) for key, actions in facts.actions.items()])
    config.action_tokenizer = _tokenizer(model.tokenizer, config.horizon, bins, normalized, active).to_dict()
    config.check_policy()


def _tokenizer(name: str, horizon: int, bins: int, normalized: np.ndarray, active: list[int]) -> ActionTokenizer:
    """The action tokenizer for normalised actions [N, D] of which the entries `active` move."""
    action_dim = normalized.shape[1]
    if not 2 <= bins <= N_ACTION_ROWS:
        raise ConfigError(f"bins must be between 2 and the {N_ACTION_ROWS} action rows, got {bins}.")
    match name:
        case "uniform":
            return UniformBins(horizon, action_dim, bins, active)
        case "openvla":
            return OpenVLABins(horizon, action_dim)
        case "quantile":
            return QuantileBins.fit(normalized, horizon, bins, active)
    raise ConfigError(unknown("action tokenizer", name, ["uniform", "quantile", "openvla"]))


def _choose_cameras(robot: RobotSpec, cameras: tuple[str, ...]) -> RobotSpec:
    for camera in cameras:
        if camera not in robot.cameras:
            raise ConfigError(unknown("camera", camera, robot.cameras, "`cameras` names those of the dataset."))
    if not robot.cameras:
        raise ConfigError("the dataset has no camera; an image policy needs at least one.")
    return dataclasses.replace(robot, cameras=cameras or robot.cameras)


def _load(auto: Any, name: str, what: str, **kwargs: Any) -> Any:
    try:
        return auto.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot load {what} {name!r}: {error}\nExpected the embedded 'nano', a checkpoint folder of this package, "
            "or a folder or hub id that transformers can load."
        ) from None


def _image_statistics(name: str, vision: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """Mean and std that the tower was trained with: from its preprocessor_config.json, else its family's."""
    path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    stored = json.loads(Path(path).read_text()) if path else {}
    if "image_mean" in stored and "image_std" in stored:
        return stored["image_mean"], stored["image_std"]
    for family, values in _MEAN_STD.items():
        if family in vision.model_type:
            return values
    return _MEAN_STD["siglip"]
