"""Training with several processes: data parallelism and sharding (FSDP2), started by `accelerate launch`.

Owns: the number of samples per optimizer step, which must not change when a run is resumed with another number of
processes; the checks of a sharded run; its weights; and the end of the process group. Trainer and accelerate distribute
the batches, gradients and weights.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

from vla.config import TrainConfig
from vla.errors import ConfigError
from vla.support.run_folder import RunFolder
from vla.training.trainer import VLATrainer

BATCH = "batch.json"
_SHARDED = "pytorch_model_fsdp.bin"  # in the checkpoints of accelerate's FSDP plugin


def count() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def samples_per_step(cfg: TrainConfig) -> int:
    """Samples per optimizer step, in all processes together."""
    return cfg.batch_size * cfg.grad_accum * count()


def note_batch(folder: RunFolder) -> None:
    """Write the number of samples per step, for `check_batch`."""
    folder.write_json(BATCH, {"samples_per_step": samples_per_step(folder.config)})


def check_batch(folder: RunFolder) -> None:
    """Raise ConfigError if the run in this folder was started with another number of samples per step: each step of a
    resumed run must draw the samples of the uninterrupted run."""
    cfg, before = folder.config, folder.read_json(BATCH)["samples_per_step"]
    if samples_per_step(cfg) != before:
        raise ConfigError(
            f"cannot resume {folder.path}: it was started with {before} samples per step, but batch_size "
            f"{cfg.batch_size} x grad_accum {cfg.grad_accum} x {count()} processes is {samples_per_step(cfg)}. Change "
            "--batch-size or --grad-accum."
        )


def check_sharding(job: VLATrainer, cfg: TrainConfig, resume_from: str | None) -> None:
    """Raise ConfigError if this job cannot be sharded as requested, or cannot resume from the checkpoint."""
    if job.is_fsdp_enabled and not job.accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP of version 1 is not supported. Set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml."
        )
    if job.is_fsdp_enabled and cfg.rollout_every:
        raise ConfigError(
            "a sharded network cannot be evaluated in closed loop during training, because one process runs the "
            "environment and all must take part in a forward pass. Set rollout_every to 0."
        )
    if resume_from is not None and job.is_fsdp_enabled != (Path(resume_from) / _SHARDED).is_file():
        was, now = ("without", "with") if job.is_fsdp_enabled else ("with", "without")
        raise ConfigError(
            f"cannot resume {cfg.out} {now} sharding (FSDP), because its checkpoint was saved {was} it. Use the "
            "`accelerate launch --config_file` of the start."
        )


def whole(job: VLATrainer, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The trained model of a process that saves. If it is sharded, its weights are gathered in a new one.

    All processes must call this.

    Args:
        build: creates the untrained model.
    """
    if not job.is_fsdp_enabled:
        return job.model
    weights = job.accelerator.get_state_dict(job.model_wrapped)
    if not job.args.should_save:
        return job.model
    model = build()
    model.load_state_dict(weights)
    return model


def leave(job: VLATrainer) -> None:
    """End distributed training together: a process that exits early would abort the others."""
    job.accelerator.wait_for_everyone()
    # Free the data-parallel wrapper before its process group. Otherwise, the wrapper may hold the last reference to the
    # group. gloo then joins its threads without releasing the GIL, and deadlocks with a thread that still frees the
    # barrier above (torch 2.13, one exit in ten).
    job.accelerator.free_memory()
    job.model_wrapped = job.model
    gc.collect()
    job.accelerator.end_training()
