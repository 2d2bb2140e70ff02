"""Checkpoints on disk: one folder with a complete policy.

Owns: the folder layout (config.json, model.safetensors, text tokenizer, model card), atomic writing (a folder is
complete before it gets its final name), and finding a checkpoint by name. The trainer stores training state separately.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from vla.config import ModelConfig
from vla.errors import CheckpointError
from vla.model.build import check_room
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.model.sources.checkpoint import download, find_checkpoint, load_checkpoint, read_config
from vla.model.sources.hub import errors_as, read_json
from vla.model.sources.openvla import OpenVLA
from vla.model.sources.shards import ADAPTER_CONFIG
from vla.policy.hub import FRONT_MATTER
from vla.spec import RobotSpec
from vla.support.locations import check_policy

# Required fields of config.json. VLAConfig also requires `robot`, `statistics` and `action_tokenizer`.
REQUIRED = ("normalization", "prompt", "layout", "image_size", "use_state", "horizon", "n_action_steps")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that replaces `target` if the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}-*"):  # left by a killed process
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors creates files that only their owner can read
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.rename(previous / target.name)
            scratch.rename(target)
            shutil.rmtree(previous)
        else:
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save(network: VLAForActionPrediction, processor: VLAProcessor, folder: Path, card: str = "") -> None:
    """Write a complete policy to `folder`, atomically."""
    with atomic_folder(folder) as scratch:
        write(network, processor, scratch, card)


def write(network: VLAForActionPrediction, processor: VLAProcessor, folder: Path, card: str = "") -> None:
    """Write the files of a complete policy into an existing folder."""
    network.generation_config.use_cache = True  # training disables the cache; `generate` must use it
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(FRONT_MATTER + card)


def load(name: str, dtype: torch.dtype | None = torch.float32) -> tuple[VLAForActionPrediction, VLAProcessor]:
    """Load a policy: "nano", a run folder, or the folder or hub id of a checkpoint of this package or OpenVLA.

    Args:
        dtype: type of the weights; None: as stored.
    Raises:
        CheckpointError: the policy does not exist, is incomplete, or has an unknown format.
    """
    transformers_logging.disable_progress_bar()
    if OpenVLA.probe(name):
        source = OpenVLA(name, ModelConfig(), dtype)
        config = source.config()
        config.check_policy()
        network, tokenizer = source.load(config)
        return network.eval(), VLAProcessor(config, tokenizer)
    folder = find_checkpoint(name) or _from_hub(name)
    config = _checked_config(folder)
    network, tokenizer = load_checkpoint(folder, config, dtype)
    return network.eval(), VLAProcessor(config, tokenizer)


def _checked_config(folder: Path) -> VLAConfig:
    """Read and check config.json. Fields that define the meaning of an action must be present, because defaults may
    change between versions."""
    values = read_json(folder / "config.json")
    missing = [name for name in REQUIRED if name not in values]
    robot = values.get("robot")
    if isinstance(robot, dict):
        missing += [f"robot.{field.name}" for field in dataclasses.fields(RobotSpec) if field.name not in robot]
    if missing:
        raise CheckpointError(
            f"{folder}/config.json has no {', '.join(missing)}, needed to interpret the actions. Add the values of the "
            "original training run."
        )
    config = read_config(folder)
    with errors_as(CheckpointError, f"{folder}/config.json does not describe a policy"):
        config.check_policy()
        check_room(config, str(folder))
    return config


def _from_hub(name: str) -> Path:
    if (Path(name) / "metrics.jsonl").is_file():
        raise CheckpointError(f"the run in {name} has no policy yet. Finish it with `vla train ... --resume`.")
    if (Path(name) / ADAPTER_CONFIG).is_file():
        base = read_json(Path(name) / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{name} holds an adapter, but its base model {base!r} is not an OpenVLA checkpoint on this machine. If "
            f"the base model is in another folder, correct base_model_name_or_path in {ADAPTER_CONFIG}. For a run of "
            "this package, pass its `policy` folder, which contains the merged adapter."
        )
    if Path(name).exists():
        raise CheckpointError(
            f"{name} is not a policy of this package: neither it nor {name}/policy has a config.json with model_type "
            "'vla'. Pass the run folder of `vla train`, or its policy folder."
        )
    check_policy(name)
    return download(name)
