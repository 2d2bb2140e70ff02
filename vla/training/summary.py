"""The printed summaries of a training run.

Owns: the table of data, sequence and size before the first step, notes on unused features of the data, and the paths of
the results after the last step.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vla.config import TrainConfig
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, VideoFrames
from vla.model.processing import VLAProcessor
from vla.training.processes import samples_per_step
from vla.training.trainer import CURVES, METRICS


def show(
    cfg: TrainConfig, sources: Sequence[ChunkSamples], model: torch.nn.Module, processor: VLAProcessor, bf16: bool
) -> None:
    """Print the facts of a training run before its first step."""
    demos = [source.demos for source in sources]
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokenizer, horizon = processor.action_tokenizer, processor.config.horizon
    length = f"{tokenizer.max_tokens}" if tokenizer.end is None else f"up to {tokenizer.max_tokens}"
    table = Table(title=f"vla {'train' if cfg.method == 'lora' else 'pretrain'}", show_header=False, title_style="bold")
    still = [name for i, name in enumerate(processor.robot.action_names) if i not in tokenizer.active]
    rows = {
        "data": ", ".join(f"{d.root} ({len(d.episodes)} episodes, {d.num_frames} frames)" for d in demos),
        "cameras": f"{', '.join(processor.robot.cameras)} at {processor.config.image_size} px",
        "state": _state_row(processor),
        "chunk": f"[{horizon}, {processor.robot.action_dim}] as {length} tokens, vocabulary of {tokenizer.vocab_size}",
        "unused actions": ", ".join(still) + " (constant in this data)" if still else "none",
        "prefix": f"{len(processor.prefix_ids(demos[0].tasks[0]))} tokens for {demos[0].tasks[0]!r}",
        **_latent_row(processor),
        "parameters": f"{parameters:,}, {trainable:,} trained ({100 * trainable / parameters:.1f} %)",
        "memory": f"{(4 * parameters + 12 * trainable) / 2**30:.2f} GiB for weights, gradients and optimizer",
        "steps": f"{cfg.steps} of {samples_per_step(cfg)} samples",
        "precision": "bf16" if bf16 else "float32",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    for note in [*_left_out(processor, demos), *_from_video(cfg, sources)]:
        Console().print(f"[bold yellow]note[/]: {escape(note)}", highlight=False, soft_wrap=True)


def _latent_row(processor: VLAProcessor) -> dict[str, str]:
    config = processor.config
    if config.latent == "none":
        return {}
    return {"latent": f"{config.latent_bits} bits per {config.latent}, {config.latent_kappa:g} of them free"}


def _state_row(processor: VLAProcessor) -> str:
    if not processor.config.use_state:
        return "not used (use_state is off)"
    return ", ".join(processor.robot.state_names) or "none: the data has no observation.state"


def _left_out(processor: VLAProcessor, demos: Sequence[Demonstrations]) -> list[str]:
    """Notes on features of the datasets that the policy does not use."""
    notes = [f"{d.root}: the depth images {', '.join(d.info.depth)} are not used." for d in demos if d.info.depth]
    for demo in demos:
        if processor.config.use_state and demo.states is None:
            unread = ", ".join(demo.info.unread)
            similar = f" Rename or join these features to use them: {unread}." if unread else ""
            notes.append(
                f"{demo.root} has no feature observation.state, so the policy has no state as input.{similar} If this "
                "is intended, pass `--no-use-state`."
            )
    return notes


def _from_video(cfg: TrainConfig, sources: Sequence[ChunkSamples]) -> list[str]:
    listed = ", ".join(str(source.demos.root) for source in sources if isinstance(source.frames, VideoFrames))
    loaders = (
        f"by {cfg.workers} process{'es' if cfg.workers > 1 else ''}"
        if cfg.workers
        else "in the training process; `--workers 4` adds four"
    )
    return [f"images of {listed} are decoded from the videos when they are drawn, {loaders}."] if listed else []


def conclusion(cfg: TrainConfig, demos: Sequence[Demonstrations]) -> str:
    """The paths of the results, and the command to evaluate the policy."""
    env_ids = dict.fromkeys(e.env_id for demo in demos for e in demo.episodes if e.env_id)
    command = ["vla", "rollout", "--policy", str(cfg.out), "--env", *(env_ids or ["<environment id>"])]
    places = {"policy": cfg.out / "policy", "metrics": cfg.out / METRICS, "curves": cfg.out / CURVES}
    lines = [f"{name + ':':<9}{place}" for name, place in places.items() if place.exists()]
    return "\n".join([*lines, f"{'next:':<9}{shlex.join(command)}"])
