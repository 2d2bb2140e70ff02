"""Policies of this package: the built-in backbone "nano", run folders and checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import SOURCES, Source
from vla.model.sources.hub import errors_as, misfit, model_type, read_json

NANO = Path(__file__).parents[2] / "pretrained" / "nano"


@SOURCES.register("checkpoint")
class Checkpoint(Source):
    """A policy to train further. Unset options of `model` keep the checkpoint's values."""

    trained = True

    @classmethod
    def probe(cls, name: str) -> bool:
        return find_checkpoint(name) is not None or model_type(name) == "vla"

    def config(self) -> VLAConfig:
        reject_vision(self.name, self.model)
        config = read_config(self._folder)
        if self.model.image_size not in (None, config.image_size):
            raise ConfigError(f"{self.name} needs images of {config.image_size} pixels, not {self.model.image_size}.")
        return config

    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        return load_checkpoint(self._folder, config)

    @property
    def _folder(self) -> Path:
        return find_checkpoint(self.name) or download(self.name)


def reject_vision(name: str, model: ModelConfig) -> None:
    """Raise ConfigError if `model` names vision towers: this backbone has its own."""
    if model.vision:
        raise ConfigError(f"{name} already has its vision tower; leave `vision` empty.")


def find_checkpoint(name: str) -> Path | None:
    """The checkpoint folder for "nano", a run folder or a checkpoint folder of this package; None for other names.
    CheckpointError if a config.json cannot be read."""
    for folder in [NANO] if name == "nano" else [Path(name) / "policy", Path(name)]:
        config = folder / "config.json"
        if config.is_file() and read_json(config).get("model_type") == "vla":
            return folder
    if name == "nano":
        raise CheckpointError("this installation lacks the built-in backbone; reinstall the package.")
    return None


def download(name: str) -> Path:
    """Download a checkpoint from the hub unless it is in the cache. Return its folder; CheckpointError on failure."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no policy {name!r}: there is no such folder, and it cannot be loaded from the hub ({error})."
        ) from None


def read_config(folder: Path) -> VLAConfig:
    """The configuration in a checkpoint folder of this package. CheckpointError if it is invalid."""
    with errors_as(CheckpointError, f"{folder}/config.json does not describe a policy"):
        return VLAConfig.from_pretrained(folder)


def load_checkpoint(
    folder: Path, config: VLAConfig, dtype: torch.dtype | None = torch.float32
) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
    """Load the network and text tokenizer from a checkpoint folder of this package.

    Args:
        dtype: type of the weights; None: as stored.
    Raises:
        CheckpointError: files are damaged, or the weights do not match `config` exactly.
    """
    try:
        network, info = VLAForActionPrediction.from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files raise various errors
        raise CheckpointError(f"{folder} is damaged or incomplete: {error}") from error
    # transformers initialises missing weights randomly; such a policy must not control a robot.
    if problem := misfit(info):
        raise CheckpointError(f"{folder}: its weights do not fit its config.json ({problem}).")
    return network, tokenizer
