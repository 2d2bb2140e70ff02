"""OpenVLA's published checkpoints (Kim et al., arXiv:2406.09246), their fine-tuned versions and their LoRA adapters.

Owns: the conversion of OpenVLA's config.json, preprocessor_config.json and statistics to a `VLAConfig`. No code from
the folder is executed: the network is `VLAForActionPrediction`. `openvla_layout` reads the weights, and
`openvla_export` writes this format.

Conventions of these checkpoints that `config` makes explicit:

* One camera, no state. One action per prediction: end-effector deltas, and a gripper (0 closed, 1 open).
* The embedding has 32064 rows, of which the last 64 are padding. The action tokens are the 256 rows before.
* The prompt ends with id 29871, a space, which OpenVLA's tokenizer inserts before the first action token.
* Statistics have no median, and `mask` excludes the gripper from normalisation.
* ImageNet's mean and std are rounded to bfloat16.
* The only change to instructions is lowercasing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError, unknown
from vla.model.configuration import N_ACTION_ROWS, VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources import openvla_layout
from vla.model.sources.base import SOURCES, Source
from vla.model.sources.hub import errors_as, model_type, read_json
from vla.model.sources.shards import ADAPTER_CONFIG, Adapter, Keys, Shards
from vla.spec import ActionSpace, RobotSpec

FILE, STATISTICS, PREPROCESSOR = "config.json", "dataset_statistics.json", "preprocessor_config.json"
SPACE = 29871
PROMPT, IMAGE_TRANSFORM = "openvla-verbatim", "lanczos"
IMAGE_SIZE, PADDED_ROWS = 224, 64
MEANS = [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]]
STDS = [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]]

# The only published architecture, as in config.json.
ARCHITECTURE = {
    "model_type": "openvla",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "llm_backbone_id": "llama2-7b-pure",
    "image_resize_strategy": "resize-naive",
    "n_action_bins": 256,
}
# timm's models -> transformers' configurations.
TIMM: dict[str, dict[str, Any]] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_ratio": 4,
    },
    "vit_so400m_patch14_siglip_224": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
}
TOWER = {"image_size": IMAGE_SIZE, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
# OpenVLA's config.json stores only differences from these values, which were transformers' defaults.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 32000,
}
_ROBOT = RobotSpec(
    cameras=("image",),
    state_names=(),
    action_names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    action_space=ActionSpace.EE_DELTA,
    gripper_index=6,
    gripper_open=1.0,
    gripper_closed=0.0,
    control_hz=5.0,  # that of BridgeData V2
)


@SOURCES.register("openvla")
class OpenVLA(Source):
    """A folder or hub id of an OpenVLA checkpoint, or the folder of a LoRA adapter from OpenVLA's fine-tuning script.

    It is a complete policy, which can be used without further training.

    Args:
        dtype: type of the weights; None: as stored.
    Attributes:
        keys: the keys that `load` used, set by `load`.
    """

    keys: Keys

    def __init__(self, name: str, model: ModelConfig, dtype: torch.dtype | None = torch.float32) -> None:
        super().__init__(name, model)
        self._dtype = dtype

    @classmethod
    def probe(cls, name: str) -> bool:
        return model_type(_adapter_base(name) or name) == "openvla"

    def config(self) -> VLAConfig:
        model = self.model
        if model.vision:
            raise ConfigError(f"{self.name} already has its vision towers; leave `vision` empty.")
        if model.image_size not in (None, IMAGE_SIZE):
            raise ConfigError(f"{self.name} needs images of {IMAGE_SIZE} pixels, not {model.image_size}.")
        statistics = self._statistics()
        with errors_as(CheckpointError, f"{self._base}/{FILE} does not describe an OpenVLA checkpoint"):
            return read_config(self._base, statistics)

    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        tokenizer = _tokenizer(self._base, config)
        config.text_config.tie_word_embeddings = False
        with init_empty_weights(include_buffers=False):  # checkpoints lack buffers, such as rotary frequencies
            network = VLAForActionPrediction(config)
        self.keys = openvla_layout.load(network, Shards(self._base), self._adapter, self._dtype)
        _add_missing_parts(network)
        return network, tokenizer

    @functools.cached_property
    def _folder(self) -> Path:
        return _download(self.name)

    @functools.cached_property
    def _adapter(self) -> Adapter | None:
        return Adapter(self._folder) if (self._folder / ADAPTER_CONFIG).is_file() else None

    @functools.cached_property
    def _base(self) -> Path:
        return self._folder if self._adapter is None else _download(self._adapter.base)

    def _statistics(self) -> dict[str, Any] | None:
        """The statistics that OpenVLA's fine-tuning script writes next to its weights or its adapter."""
        for folder in (self._folder, self._base):
            if (folder / STATISTICS).is_file():
                return read_json(folder / STATISTICS)
        return None


def _adapter_base(name: str) -> str | None:
    """The base model of the LoRA adapter in the folder `name`; None if it has no adapter."""
    path = Path(name) / ADAPTER_CONFIG
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


def _download(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!r} cannot be loaded from the hub ({error}).") from None


def read_config(folder: Path, statistics: Mapping[str, Any] | None = None) -> VLAConfig:
    """The configuration of the checkpoint in `folder`.

    Args:
        statistics: replaces the statistics in config.json.
    Raises:
        CheckpointError: the architecture is not supported, or statistics are missing.
    """
    values = read_json(folder / FILE)
    for field, expected in ARCHITECTURE.items():
        if values.get(field, expected) != expected:
            raise CheckpointError(
                f"{folder}/{FILE} has {field} {values[field]!r}; only {expected!r}, as in openvla/openvla-7b, is "
                "supported."
            )
    text, names = values.get("text_config") or {}, values.get("timm_model_ids") or list(TIMM)[:2]
    if text.get("model_type", "llama") != "llama":
        raise CheckpointError(f"{folder}/{FILE} has a language model of type {text['model_type']!r}, not 'llama'.")
    for name in names:
        if name not in TIMM:
            raise CheckpointError(f"{folder}/{FILE}: {unknown('vision tower', name, TIMM)}")
    text = LLAMA | {name: value for name, value in text.items() if name not in ("torch_dtype", "dtype")}
    towers = [TIMM[name] | TOWER for name in names]
    kinds = [tower["model_type"] for tower in towers]
    if kinds != ["dinov2_with_registers", "siglip_vision_model"]:
        raise CheckpointError(f"{folder}/{FILE}: timm_model_ids must be DINOv2 and SigLIP, in this order, got {names}.")
    end = text["vocab_size"] - values.get("pad_to_multiple_of", PADDED_ROWS)
    found = _check_statistics(folder, values.get("norm_stats") if statistics is None else statistics)
    ours = values.get("vla") or {}  # written by `openvla_export`; OpenVLA has no such fields
    robot = RobotSpec.from_dict(ours["robot"]) if "robot" in ours else _ROBOT
    means, stds = _image_statistics(folder)
    width = sum(tower["hidden_size"] for tower in towers)
    horizon = ours.get("horizon", 1)
    return VLAConfig(
        text_config=text,
        vision_configs=towers,
        vision_feature_layer=-2,
        image_mean=means,
        image_std=stds,
        image_size=IMAGE_SIZE,
        image_transform=ours.get("image_transform", IMAGE_TRANSFORM),
        projector_layers=3,
        projector_hidden=[4 * width, text["hidden_size"]],
        layout="image_first",
        image_token_id=end + 1,
        state_token_id=end + 2,
        action_token_begin=end - N_ACTION_ROWS,
        n_action_rows=N_ACTION_ROWS,
        prompt=PROMPT,
        prompt_end=[SPACE],
        robot=robot.to_dict(),
        use_state=False,
        horizon=horizon,
        n_action_steps=ours.get("n_action_steps", horizon),
        normalization="q01_q99",
        action_tokenizer={"name": "openvla", "horizon": horizon, "action_dim": robot.action_dim, "n_bins": 256},
        statistics=found,
    )


def _check_statistics(folder: Path, statistics: Any) -> dict[str, Any]:
    """Check that every dataset has q01 and q99 and, optionally, a mask, all of one length. CheckpointError if not."""
    if not isinstance(statistics, Mapping) or not statistics:
        raise CheckpointError(
            f"{folder} has no statistics: {FILE} has no norm_stats, and there is no {STATISTICS}. Without them, "
            f"actions cannot be un-normalised. Copy {STATISTICS} from the training run into the folder."
        )
    for key, values in statistics.items():
        action = values.get("action") if isinstance(values, Mapping) else None
        if not isinstance(action, Mapping) or not all(isinstance(action.get(name), list) for name in ("q01", "q99")):
            raise CheckpointError(f"{folder}: the statistics of {key!r} have no action.q01 and action.q99.")
        lengths = {name: len(action[name]) for name in ("q01", "q99", "mask") if action.get(name) is not None}
        if len(set(lengths.values())) > 1:
            raise CheckpointError(f"{folder}: the statistics of {key!r} have different lengths: {lengths}.")
    return dict(statistics)


def _image_statistics(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    path = folder / PREPROCESSOR
    values = read_json(path) if path.is_file() else {}
    strategy = values.get("image_resize_strategy", ARCHITECTURE["image_resize_strategy"])
    if strategy != ARCHITECTURE["image_resize_strategy"]:
        raise CheckpointError(f"{path} has image_resize_strategy {strategy!r}; only 'resize-naive' is supported.")
    return values.get("means") or MEANS, values.get("stds") or STDS


def _tokenizer(folder: Path, config: VLAConfig) -> PreTrainedTokenizerBase:
    """Load the text tokenizer exactly as in tokenizer.json; transformers' LlamaTokenizer would change it."""
    with errors_as(CheckpointError, f"{folder}: the text tokenizer cannot be loaded"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    end = config.action_token_begin + config.n_action_rows
    if tokenizer.vocab_size > end or tokenizer.bos_token_id is None:
        raise CheckpointError(
            f"{folder}: the text tokenizer has {tokenizer.vocab_size} tokens, but action tokens end at id {end}. It "
            "belongs to another model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token is suitable
    return tokenizer


@torch.no_grad()
def _add_missing_parts(network: VLAForActionPrediction) -> None:
    """Create the parameters that OpenVLA does not have: the camera embedding and the mask token as zeros, and an
    untrained state projector."""
    dtype = network.dtype
    embeddings: Any = network.vision_towers[0].embeddings
    network.camera_embedding.to_empty(device="cpu").to(dtype).weight.zero_()
    embeddings.mask_token = torch.nn.Parameter(torch.zeros(embeddings.mask_token.shape, dtype=dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same checkpoint always gives the same network
        network._init_weights(network.state_projector.to_empty(device="cpu").to(dtype))
    left = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    assert not left, left
