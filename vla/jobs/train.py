"""`vla train` and `vla pretrain`: train a policy on demonstrations.

Owns: the steps of a training run, from the checks of its data to the export of the merged policy, and the layout of a
run folder (config.yaml, metrics.jsonl, curves.png, checkpoint-N/, policy/, adapter/). The training loop is in
`vla.training.trainer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from vla import config
from vla.config import TrainConfig
from vla.data import state_only
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, Mixture, split_episodes
from vla.errors import ConfigError, DataError, VLAError
from vla.model import lora
from vla.model.build import DataFacts, build_policy
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.policy import checkpoint
from vla.simulation.adapter import make
from vla.support.machine import cpu_flags, peak_memory
from vla.support.run_folder import RunFolder
from vla.training import processes, summary, trainer
from vla.transforms.normalize import compute_statistics

VALIDATION_FRAMES = 512
SETTINGS = "config.yaml"
DATA = "data.json"  # fingerprints of the datasets at the start of the run


def pretrain(cfg: TrainConfig) -> Path:
    """Train all weights: `train` with method "full" and the default backbone "nano-init"."""
    model = dataclasses.replace(cfg.model, backbone=cfg.model.backbone or "nano-init")
    return train(dataclasses.replace(cfg, method="full", model=model))


def train(cfg: TrainConfig, conclude: bool = True) -> Path:
    """Run one training job and return the run folder. The (merged) policy is in its subfolder `policy`.

    Args:
        conclude: print the paths of the results and the next command.
    Raises:
        ConfigError, DataError, CheckpointError: the configuration, a dataset or the backbone is invalid; raised before
            anything is written.
    """
    config.check(cfg)
    if cfg.dry_run:
        return _dry_run(cfg)
    # A run can be resumed with other batches, if they make the same number of samples per step.
    same = (cfg.out / processes.BATCH).is_file()
    folder = RunFolder(cfg.out, cfg, SETTINGS, free=("batch_size", "grad_accum") if same else ())
    resume_from = _check_output(folder)
    job, demos = _prepare(cfg)
    processes.check_sharding(job, cfg, resume_from)
    if resume_from is None and job.args.should_save:
        folder.begin()
        folder.write_json(DATA, _fingerprints(demos))
        processes.note_batch(folder)
    try:
        with job.graceful():
            job.train(resume_from_checkpoint=resume_from)
    except Exception:
        if job.args.should_save and not cfg.resume and not job.state.global_step:
            _forget_start(cfg.out)
        raise
    model = processes.whole(job, lambda: _trainable(build_policy(cfg.model, _facts(cfg, demos)[0])[0], cfg))
    if job.args.should_save:
        _export(model, job.collator.processor, cfg)
        trainer.plot_metrics(cfg.out)
        if conclude:
            print(summary.conclusion(cfg, demos), flush=True)
    processes.leave(job)
    return cfg.out


def seconds_per_step(cfg: TrainConfig, steps: int = 2) -> float:
    """Measure the duration of an optimizer step of this job, over `steps` steps. Writes nothing."""
    ends = _Ends()
    job, _ = _prepare(dataclasses.replace(cfg, steps=steps + 1, report_to="none", dry_run=True), quiet=True)
    job.add_callback(ends)
    job.train()
    return (ends.times[-1] - ends.times[0]) / steps  # excludes the first step, which allocates and compiles


def _prepare(cfg: TrainConfig, quiet: bool = False) -> tuple[trainer.VLATrainer, list[Demonstrations]]:
    """The trainer (with network and samples) and the datasets of a job. The trainer of a dry run writes nothing."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    demos = [Demonstrations(folder) for folder in cfg.data]
    facts, keys = _facts(cfg, demos)
    set_seed(cfg.seed)
    network, processor = build_policy(cfg.model, facts)
    cameras, size, horizon = processor.robot.cameras, network.config.image_size, network.config.horizon
    for env_id in cfg.rollout_env:
        with make(env_id, cfg.adapter) as env:
            processor.robot.check_fits(env.robot, f"environment {env_id!r}", tolerated=("names", "rate"))
    if cfg.augment.prefix and processor.action_tokenizer.tokens_per_action is None:
        raise ConfigError(
            "augment.prefix conditions chunks on their first actions, but the tokens of "
            f"{processor.action_tokenizer.name!r} span several actions. Set augment.prefix to 0, or use a "
            "tokenizer with tokens for each action, such as 'uniform'."
        )
    if cfg.augment.order_dropout and not network.sees_word_order:
        raise ConfigError(
            "augment.order_dropout has no effect without word_order. Set it to 0, or set model.word_order."
        )
    network.order_dropout = cfg.augment.order_dropout
    trains_vision = cfg.lora.train_vision if cfg.method == "lora" else not cfg.model.freeze_vision
    if cfg.model.word_order and not trains_vision:
        raise ConfigError(
            "word_order has no effect, because the vision tower is not trained. Set lora.train_vision (method 'lora') "
            "or freeze_vision false (method 'full'), or omit word_order, which a trained policy keeps."
        )
    if (cfg.augment.state_mask or cfg.augment.state_noise) and not network.config.use_state:
        raise ConfigError(
            "augment.state_mask and augment.state_noise have no effect, because this policy does not use the state "
            "(use_state false). Set them to 0."
        )
    if cfg.label_sigma:
        network.soft_targets = torch.from_numpy(processor.action_tokenizer.soft_targets(cfg.label_sigma))
    transform = network.config.image_transform
    sources = [ChunkSamples(demo, cameras, size, horizon, i, transform, cfg.frames) for i, demo in enumerate(demos)]
    splits = [split_episodes(demo, cfg.val_fraction, cfg.seed) for demo in demos]
    draws = cfg.steps * processes.samples_per_step(cfg)
    train_frames = [split[0] for split in splits]
    errors = (
        [state_only.of(demo).errors[frames] for demo, frames in zip(demos, train_frames, strict=True)]
        if cfg.hard_frames
        else ()
    )
    mixture = Mixture(
        sources, train_frames, cfg.weights, cfg.seed, draws, cfg.augment, hard_frames=cfg.hard_frames, errors=errors
    )
    validation = _validation(sources, [split[1] for split in splits])
    model = _trainable(network, cfg)
    arguments = _arguments(cfg, validate=bool(validation))
    if not quiet and arguments.process_index == 0:
        summary.show(cfg, sources, model, processor, bf16(cfg.precision))
    if arguments.n_gpu > 1:
        # Otherwise, the Trainer would use DataParallel, which changes the batch size.
        print(f"using one of {arguments.n_gpu} GPUs; `accelerate launch -m vla.cli train ...` uses all of them.")
        arguments._n_gpu = 1
    if arguments.device.type == "cuda":
        # On Hopper GPUs, this kernel gives NaN gradients for masked sequences of some lengths
        # (https://github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if arguments.device.type == "cpu":
        # For short sequences, plain softmax attention is 1.25 times faster than the fused kernel.
        network.set_attn_implementation("eager")
    callbacks: list[TrainerCallback] = []
    if not cfg.dry_run:
        callbacks += [trainer.Metrics(cfg.out), trainer.ShowProgress()]
        callbacks += [_Rollouts(cfg, processor)] if cfg.rollout_every else []
    collator = trainer.Collator(processor, keys, pad_to=_static_length(cfg, demos, processor))
    try:
        return trainer.VLATrainer(model, arguments, mixture, collator, validation, callbacks), demos
    except (ImportError, RuntimeError, ValueError) as error:
        if cfg.report_to != "none" and "install" in str(error):
            raise ConfigError(f"report_to {cfg.report_to!r}: {error}") from None
        raise


def _fingerprints(demos: list[Demonstrations]) -> dict[str, str]:
    return {str(demo.root): demo.fingerprint for demo in demos}


def _check_output(folder: RunFolder) -> str | None:
    """The checkpoint to resume from; None to start at step 0. ConfigError if the folder cannot be used."""
    cfg, last = folder.config, trainer.last_checkpoint(folder.path)
    if cfg.resume and last is None and not folder.settings_file.is_file():
        raise ConfigError(f"cannot resume {cfg.out}: the folder contains no training run.")
    folder.check(cfg.resume, has_results=last is not None)
    if last and (cfg.out / processes.BATCH).is_file():
        processes.check_batch(folder)
    if (
        last
        and (cfg.out / DATA).is_file()
        and folder.read_json(DATA) != _fingerprints([Demonstrations(data) for data in cfg.data])
    ):
        raise ConfigError(
            f"cannot resume {cfg.out}: its datasets have changed since the start. Start a new run with another --out."
        )
    return last


def _facts(cfg: TrainConfig, demos: list[Demonstrations]) -> tuple[DataFacts, list[str]]:
    """Robot and statistics of the datasets, and the unnorm_key of each. Datasets with the same key share statistics."""
    keys = list(cfg.unnorm_keys) or [demo.root.resolve().name for demo in demos]
    if len(keys) != len(demos) or (not cfg.unnorm_keys and len(set(keys)) < len(keys)):
        raise ConfigError(f"unnorm_keys must be one name for each of the {len(demos)} datasets, got {keys}.")
    first = demos[0].robot
    for demo in demos[1:]:
        ours, theirs = first.to_dict(), demo.robot.to_dict()
        differing = [name for name in ours if name != "cameras" and ours[name] != theirs[name]]
        if differing:
            raise DataError(
                f"{demos[0].root} and {demo.root} were recorded with different robots ("
                + "; ".join(f"{name} {ours[name]} and {theirs[name]}" for name in differing)
                + "). All datasets of a training run must have the same robot."
            )
    shared = tuple(name for name in first.cameras if all(name in demo.robot.cameras for demo in demos))
    statistics: dict[str, dict[str, Any]] = {}
    actions: dict[str, np.ndarray] = {}
    for key in dict.fromkeys(keys):
        group = [demo for demo, own in zip(demos, keys, strict=True) if own == key]
        states = [demo.states for demo in group if demo.states is not None]
        actions[key] = np.concatenate([demo.actions for demo in group])
        statistics[key] = {
            "action": compute_statistics(actions[key]),
            "state": compute_statistics(np.concatenate(states)) if states else None,
            "num_frames": sum(demo.num_frames for demo in group),
            "num_episodes": sum(len(demo.episodes) for demo in group),
        }
    if first.cameras and not shared:
        listed = "; ".join(f"{demo.root} has {', '.join(demo.robot.cameras) or 'none'}" for demo in demos)
        raise DataError(f"the datasets have no camera in common: {listed}.")
    return DataFacts(dataclasses.replace(first, cameras=shared), statistics, actions), keys


def _validation(sources: list[ChunkSamples], frames: list[np.ndarray]) -> list[Any]:
    """At most `VALIDATION_FRAMES` samples, evenly spaced in the validation episodes of all datasets."""
    pairs = [(source, int(frame)) for source, indices in zip(sources, frames, strict=True) for frame in indices]
    places = np.linspace(0, len(pairs) - 1, min(len(pairs), VALIDATION_FRAMES)).round().astype(int)
    return [source[frame] for source, frame in (pairs[place] for place in places)]


def _trainable(network: VLAForActionPrediction, cfg: TrainConfig) -> torch.nn.Module:
    if cfg.method == "lora":
        return lora.attach(network, cfg.lora)
    if cfg.model.freeze_vision:
        network.vision_towers.requires_grad_(False)
    return network


def _static_length(cfg: TrainConfig, demos: list[Demonstrations], processor: VLAProcessor) -> int | None:
    """The fixed prefix length for a compiled network; None if the network is not compiled."""
    if not cfg.compile:
        return None
    return max(len(processor.prefix_ids(task)) for demo in demos for task in demo.tasks)


def _arguments(cfg: TrainConfig, validate: bool) -> TrainingArguments:
    return TrainingArguments(
        # The Trainer creates this folder, but a dry run must not create `out`.
        output_dir=tempfile.gettempdir() if cfg.dry_run else str(cfg.out),
        max_steps=cfg.steps,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=cfg.batch_size,
        gradient_accumulation_steps=cfg.grad_accum,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        warmup_steps=cfg.warmup_steps,
        lr_scheduler_type="cosine",
        max_grad_norm=cfg.max_grad_norm,
        adam_beta2=0.95,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        bf16=bf16(cfg.precision),
        activation_checkpointing=cfg.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=cfg.compile,
        dataloader_num_workers=cfg.workers,
        dataloader_drop_last=True,
        train_sampling_strategy="sequential",  # `Mixture` defines a random sample for each draw number
        remove_unused_columns=False,
        eval_strategy="steps" if validate and not cfg.dry_run else "no",
        eval_steps=cfg.eval_every,
        save_strategy="no" if cfg.dry_run else "steps",
        save_steps=cfg.save_every,
        save_total_limit=cfg.keep_checkpoints,
        logging_steps=cfg.log_every,
        logging_nan_inf_filter=False,
        report_to=cfg.report_to,
        seed=cfg.seed,
        data_seed=cfg.seed,
        label_names=["labels"],
        disable_tqdm=True,
    )


def bf16(precision: str) -> bool:
    """Whether to compute in bfloat16; with "auto", if the hardware supports it natively."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


def _dry_run(cfg: TrainConfig) -> Path:
    """Take two optimizer steps as in training. Writes nothing.

    Memory peaks in the second step, because the optimizer's state exists only after the first.
    """
    job, _ = _prepare(dataclasses.replace(cfg, steps=2, log_every=1, report_to="none"))
    job.train()
    loss, tokenizer = job.state.log_history[0]["loss"], job.collator.processor.action_tokenizer
    if job.args.process_index == 0:
        batch = job.collator([job.train_dataset[i] for i in range(cfg.batch_size)])
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
        guess = f"a uniform guess among {tokenizer.vocab_size} action tokens has {np.log(tokenizer.vocab_size):.3f}"
        print(f"dry run: two steps, first loss {loss:.3f} ({guess}), {shapes}")
        if torch.cuda.is_available():
            print(f"dry run: peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        print(f"dry run: peak memory of this process {peak_memory() / 2**30:.2f} GiB")
        print("dry run: no problems found; nothing was written")
    return cfg.out


def _forget_start(run: Path) -> None:
    """Remove the files of a run that failed before its first step, so that the folder can be used again."""
    for name in (SETTINGS, DATA, processes.BATCH, trainer.METRICS):
        (run / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        run.rmdir()


def _export(model: Any, processor: VLAProcessor, cfg: TrainConfig) -> None:
    """Export the policy of the finished run: merged weights to `policy/` and, for LoRA, the adapter to `adapter/`."""
    if isinstance(model, peft.PeftModel):
        with checkpoint.atomic_folder(cfg.out / "adapter") as scratch:
            model.save_pretrained(scratch)
        model = lora.merge(model)
    card = (
        f"\n# Action-token policy\n\nTrained by `vla` ({cfg.method}) on {', '.join(d.name for d in cfg.data)}: "
        f"{cfg.steps} steps of {processes.samples_per_step(cfg)} samples, from `{cfg.model.backbone or 'nano'}`.\n\n"
        f"Cameras {', '.join(processor.robot.cameras)}; actions {', '.join(processor.robot.action_names)} at "
        f"{processor.robot.control_hz:g} Hz; chunks of {processor.config.horizon}, "
        f"{processor.config.n_action_steps} executed.\n"
    )
    checkpoint.save(model, processor, cfg.out / "policy", card)


class _Ends(TrainerCallback):
    """Records the time in seconds at which each optimizer step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


class _Rollouts(TrainerCallback):
    """Evaluates the network in closed loop every `rollout_every` steps. A failed evaluation does not end training."""

    def __init__(self, cfg: TrainConfig, processor: VLAProcessor) -> None:
        self.cfg, self.processor = cfg, processor

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.cfg.rollout_every or not state.is_world_process_zero:
            return
        try:
            overall = self._evaluate(model, args, state.global_step)["overall"]
            print(f"step {state.global_step}: closed-loop success {overall['pc_success']:.0f} %", flush=True)
        except Exception as error:  # an error of an environment, renderer or disk must not end training
            what = str(error) if isinstance(error, VLAError) else f"{type(error).__name__}: {error}"
            print(f"step {state.global_step}: the closed-loop evaluation failed: {what}", file=sys.stderr, flush=True)
        finally:
            model.train()
            gc.collect()  # the policy's engine holds a copy of the weights, in a reference cycle

    def _evaluate(self, model: Any, args: TrainingArguments, step: int) -> dict[str, Any]:
        from vla.jobs.rollout import rollout
        from vla.policy import Policy

        network = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        key = next(iter(network.config.statistics))
        return rollout(
            config.RolloutConfig(
                env=self.cfg.rollout_env,
                episodes=self.cfg.rollout_episodes,
                out=self.cfg.out / f"rollout-{step}",
                videos=1,
                overwrite=True,
                adapter=self.cfg.adapter,
            ),
            Policy(network, self.processor, device=str(args.device), unnorm_key=key),
        )
