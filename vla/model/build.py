"""Building a policy network from the embedded backbone, from a checkpoint of this package, or from a language model
with LLaMA architecture and vision towers (SigLIP, arXiv:2303.15343; DINOv2, arXiv:2304.07193; CLIP, arXiv:2103.00020).

Owns: the construction of a network and its processor from a `ModelConfig` and the facts of a dataset (robot,
statistics). Embeddings are never resized: action tokens and placeholders reuse the last ids of the vocabulary, as in
OpenVLA (arXiv:2406.09246). It does not know training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError, VLAError, unknown
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.model.sources.hub import (
    check_tower,
    image_statistics,
    load_config,
    load_model,
    load_tokenizer,
    misfit,
    read_json,
)
from vla.spec import RobotSpec
from vla.support.locations import missing_folder
from vla.transforms.tokenizers.base import TOKENIZERS

NANO = Path(__file__).parent.parent / "pretrained" / "nano"
N_ACTION_ROWS = 256

# Untrained architectures: decoder width, decoder layers, encoder channels, encoder blocks, image size in pixels.
_SIZES = {"nano-init": (256, 4, [48, 128], 2, 96), "small-init": (512, 8, [64, 256], 4, 144)}


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """The properties of the demonstrations that a policy depends on.

    Attributes:
        robot: the RobotSpec, with all cameras of the dataset.
        statistics: unnorm_key -> {"action": ..., "state": ...}, from `compute_statistics`.
        actions: unnorm_key -> float32 [N, D], all actions (quantile bins are fitted to them).
    """

    robot: RobotSpec
    statistics: dict[str, dict[str, Any]]
    actions: dict[str, np.ndarray]


def build_policy(model: ModelConfig, facts: DataFacts) -> tuple[VLAForActionPrediction, VLAProcessor]:
    """Build the network to train and its processor.

    Raises:
        ConfigError: `model` is invalid or does not fit the data.
        CheckpointError: a checkpoint is damaged or incomplete.
    """
    robot = _choose_cameras(facts.robot, model.cameras)
    backbone = model.backbone or "nano"
    own = None if backbone in _SIZES else find_checkpoint(backbone)
    if model.vision and (backbone in _SIZES or own is not None):
        raise ConfigError(f"{backbone} already has its vision tower; leave `vision` empty.")
    if backbone in _SIZES:
        config, tokenizer = untrained_config(backbone, model.image_size), AutoTokenizer.from_pretrained(NANO)
        _set_policy(config, model, facts, robot)
        _make_room(config)
        network = VLAForActionPrediction(config)
        _sharpen_attention(network)
    elif own is not None:
        config = read_config(own)
        if model.image_size not in (None, config.image_size):
            raise ConfigError(f"{backbone} was built for images of {config.image_size}, not {model.image_size}.")
        _set_policy(config, model, facts, robot)
        check_room(config, backbone)
        network, tokenizer = load_checkpoint(own, config)
    else:
        network, tokenizer = _compose(backbone, model, facts, robot)
    return network, VLAProcessor(network.config, tokenizer)


def find_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint of this package, given "nano", a run folder or a checkpoint folder; None for any other
    name. CheckpointError if a config.json cannot be read."""
    for folder in [NANO] if name == "nano" else [Path(name) / "policy", Path(name)]:
        config = folder / "config.json"
        if config.is_file() and read_json(config).get("model_type") == "vla":
            return folder
    if name == "nano":
        raise CheckpointError("this installation lacks the embedded backbone; reinstall the package.")
    return None


def read_config(folder: Path) -> VLAConfig:
    """The configuration in a checkpoint folder of this package. CheckpointError if it is invalid."""
    try:
        return VLAConfig.from_pretrained(folder)
    except VLAError:
        raise
    except Exception as error:  # the file may contain values of any type
        raise CheckpointError(f"{folder}/config.json does not describe a policy: {error}") from error


def load_checkpoint(
    folder: Path, config: VLAConfig, dtype: torch.dtype = torch.float32
) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
    """Load the network and text tokenizer from a checkpoint folder of this package.

    Raises:
        CheckpointError: files are damaged, or the weights do not match `config` exactly.
    """
    try:
        network, info = VLAForActionPrediction.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files raise various errors
        raise CheckpointError(f"{folder} is damaged or incomplete: {error}") from error
    # transformers initialises missing weights randomly; such a policy must not move a robot.
    if problem := misfit(info):
        raise CheckpointError(f"{folder}: its weights do not fit its config.json ({problem}).")
    return network, tokenizer


def untrained_config(name: str, image_size: int | None = None) -> VLAConfig:
    """An architecture of this package: a convolutional encoder conditioned on the instruction, and a LLaMA decoder.

    "nano-init", for CPUs, is the architecture of the embedded backbone: images of 96 pixels, 16 tokens per camera, 4
    decoder layers of width 256, 5 M parameters. "small-init", for GPUs: images of 144 pixels, 36 tokens per camera, 8
    decoder layers of width 512, 36 M parameters. `image_size` overrides the image size in pixels.
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
    """Scale up the initial query and key weights, so that attention in a narrow decoder does not start out uniform.

    With the usual standard deviation of 0.02 and a width of 256, attention logits start near 0.1. Every token then
    averages over all others, and learning where to attend takes several times as many samples.
    """
    for layer in network.language_model.model.layers:
        layer.self_attn.q_proj.weight.mul_(factor)
        layer.self_attn.k_proj.weight.mul_(factor)


def _compose(
    backbone: str, model: ModelConfig, facts: DataFacts, robot: RobotSpec
) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
    if (problem := missing_folder(backbone)) and "/" not in backbone:
        raise ConfigError(unknown("backbone", backbone, ["nano", *_SIZES], f"For another: {problem}"))
    text_config = load_config(backbone, "backbone")
    _check_language_model(backbone, text_config)
    if not model.vision:
        raise ConfigError(
            f"{backbone!r} is not a checkpoint of this package, so it needs a vision tower: set `vision` to the folder "
            "or hub id of a SigLIP, DINOv2 or CLIP model."
        )
    tokenizer = load_tokenizer(backbone, text_config.vocab_size)
    text_config.pad_token_id = tokenizer.pad_token_id
    visions = [load_config(name, "vision tower") for name in model.vision]
    # If a SigLIP or CLIP model has both towers, use the vision tower.
    whole = [hasattr(vision, "vision_config") for vision in visions]
    visions = [getattr(vision, "vision_config", vision) for vision in visions]
    for name, vision in zip(model.vision, visions, strict=True):
        _check_grid(name, vision)
    means, stds = zip(*(image_statistics(n, v) for n, v in zip(model.vision, visions, strict=True)), strict=True)
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
    _make_room(config)
    for name, vision in zip(model.vision, config.vision_configs, strict=True):
        # DINOv2 interpolates its position embeddings itself (it was trained on images of 518 pixels).
        if vision.image_size != config.image_size and not vision.model_type.startswith("dinov2"):
            raise ConfigError(f"the vision tower was built for images of {vision.image_size}, not {config.image_size}.")
        check_tower(name, vision, config.image_size, config.vision_feature_layer)
    decoder = _load_decoder(backbone, text_config)
    towers = [
        load_model(AutoModel, name, "vision tower", vision, foreign)
        for name, vision, foreign in zip(model.vision, visions, whole, strict=True)
    ]
    config.text_config.tie_word_embeddings = False
    return VLAForActionPrediction(config, towers, decoder), tokenizer


def _check_language_model(name: str, config: PreTrainedConfig) -> None:
    """Raise ConfigError unless `config` describes a plain language model."""
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise ConfigError(
            f"{name!r} ({config.model_type}) is a vision-language model; `backbone` must be a plain language model. "
            "Name the language model that it is based on."
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(f"{name!r} ({config.model_type}) is not a language model: its config.json has no vocab_size.")


def _check_grid(name: str, vision: PreTrainedConfig) -> None:
    """Raise ConfigError unless a vision tower splits images of a fixed size into patches."""
    if not isinstance(getattr(vision, "patch_size", None), int):
        raise ConfigError(f"vision tower {name!r} ({vision.model_type}) has no patch grid.")
    if not isinstance(getattr(vision, "image_size", None), int):
        raise ConfigError(
            f"vision tower {name!r} ({vision.model_type}) has no fixed image size. Use a variant that has one, such as "
            "the -224 or -256 variant of SigLIP 2 instead of -naflex."
        )


def _load_decoder(backbone: str, config: PreTrainedConfig) -> Any:
    """The language model, with its head untied from the embedding, since action rows differ as inputs and outputs."""
    decoder = load_model(AutoModelForCausalLM, backbone, "backbone", config)
    head = getattr(decoder, "lm_head", None)
    if head is None or head.bias is not None or not hasattr(decoder, "model"):
        raise ConfigError(f"{backbone!r} ({decoder.config.model_type}) is not a LLaMA-architecture causal LM.")
    if decoder.config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        decoder.config.tie_word_embeddings = False
        decoder.all_tied_weights_keys = {}  # otherwise the head would not be saved
    return decoder


def _make_room(config: VLAConfig) -> None:
    """Raise the limits of an untrained network to the number of cameras and state entries in the data."""
    robot = config.robot_spec
    config.max_cameras = max(config.max_cameras, len(robot.cameras))
    if config.use_state:
        config.max_state_dim = max(config.max_state_dim, robot.state_dim)


def check_room(config: VLAConfig, backbone: str) -> None:
    """Raise ConfigError if the data has more cameras or state entries than a trained network supports."""
    robot = config.robot_spec
    if len(robot.cameras) > config.max_cameras:
        raise ConfigError(
            f"the data has {len(robot.cameras)} cameras ({', '.join(robot.cameras)}); {backbone!r} takes at most "
            f"{config.max_cameras}. Select some with `cameras`, or start from 'nano-init', which takes any number."
        )
    if config.use_state and robot.state_dim > config.max_state_dim:
        raise ConfigError(
            f"the state has {robot.state_dim} entries; {backbone!r} takes at most {config.max_state_dim}. Disable the "
            "state (use_state false), or start from 'nano-init', which takes any number."
        )


def _action_rows(vocab_size: int, special: list[int]) -> int:
    """First id of the action rows. They are as close to the end of the vocabulary as its special tokens allow; the two
    placeholders directly precede them."""
    begin = vocab_size - N_ACTION_ROWS
    while inside := [i for i in special if begin - 2 <= i < begin + N_ACTION_ROWS]:
        begin = min(inside) - N_ACTION_ROWS
    if begin < 8:
        raise ConfigError(f"a vocabulary of {vocab_size} has no room for {N_ACTION_ROWS} action rows.")
    return begin


def _set_policy(config: VLAConfig, model: ModelConfig, facts: DataFacts, robot: RobotSpec) -> None:
    """Write the policy fields into `config`: robot, statistics, tokenizer, horizon, prompt.

    When a checkpoint is trained further, fields that `model` leaves unset keep their values.
    """
    before = config.action_tokenizer or {}
    config.robot, config.statistics = robot.to_dict(), facts.statistics
    config.use_state = config.use_state if model.use_state is None else model.use_state
    config.normalization = model.normalization or config.normalization
    config.prompt = model.prompt or config.prompt
    config.horizon = model.horizon or config.horizon
    kept = config.n_action_steps if before and model.horizon is None else max(1, config.horizon // 2)
    config.n_action_steps = model.n_action_steps or kept
    if not 1 <= config.n_action_steps <= config.horizon:
        raise ConfigError(f"n_action_steps {config.n_action_steps} must be between 1 and the horizon {config.horizon}.")
    normalizers = {key: config.action_normalizer(key) for key in facts.statistics}
    constant = np.logical_and.reduce([normalizer.constant for normalizer in normalizers.values()])
    if constant.all():
        raise ConfigError("all action entries are constant in this data, so there is nothing to learn.")
    active = np.flatnonzero(~constant).tolist()
    normalized = np.concatenate([normalizers[key].normalize(actions) for key, actions in facts.actions.items()])
    name = model.tokenizer or before.get("name", "uniform")
    if model.bins is not None and model.bins > N_ACTION_ROWS:
        raise ConfigError(f"bins must be between 2 and the {N_ACTION_ROWS} action rows, got {model.bins}.")
    bins = model.bins or (before.get("n_bins") if name == before.get("name") else None)
    config.action_tokenizer = TOKENIZERS.get(name).fit(normalized, config.horizon, bins, active).to_dict()
    config.check_policy()


def _choose_cameras(robot: RobotSpec, cameras: tuple[str, ...]) -> RobotSpec:
    for camera in cameras:
        if camera not in robot.cameras:
            raise ConfigError(unknown("camera", camera, robot.cameras, "`cameras` must name cameras of the dataset."))
    if not robot.cameras:
        raise ConfigError("the dataset has no camera; an image policy needs at least one.")
    return dataclasses.replace(robot, cameras=cameras or robot.cameras)
