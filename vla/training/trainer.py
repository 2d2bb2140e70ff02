"""The training loop: transformers' Trainer with atomic checkpoints and metrics of actions.

Owns: the differences to the stock Trainer: atomic checkpoints, validation by token accuracy and error per action
dimension, a metrics file with its plot, and stopping on request. Trainer and accelerate handle devices, precision,
gradient accumulation and data parallelism. It does not know where samples come from.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from vla.data.samples import Sample
from vla.decoding.constraint import most_likely
from vla.errors import TrainingError
from vla.model.processing import VLAProcessor
from vla.support.progress import Progress, duration
from vla.support.run_folder import read_lines, write_text

METRICS = "metrics.jsonl"
CURVES = "curves.png"
LINE_EVERY_S = 30.0  # minimum time between two progress lines in a log


class Collator:
    """Converts samples to model inputs: the prompt prefix, and the chunk's tokens as suffix and labels."""

    def __init__(self, processor: VLAProcessor, unnorm_keys: Sequence[str], pad_to: int | None = None) -> None:
        self.processor, self.unnorm_keys, self.pad_to = processor, list(unnorm_keys), pad_to

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        keys = [self.unnorm_keys[sample.source] for sample in samples]
        suffix = np.stack([self.processor.encode_actions(s.chunk, key) for s, key in zip(samples, keys, strict=True)])
        states = np.stack([self._state(s, key) for s, key in zip(samples, keys, strict=True)])
        learn = self.processor.token_mask(suffix, np.stack([sample.valid for sample in samples]))
        batch = self.processor(
            [s.images for s in samples], [s.instruction for s in samples], states, suffix, pad_to=self.pad_to
        )
        return batch | {"labels": torch.from_numpy(np.where(learn, suffix, -100))}

    def _state(self, sample: Sample, key: str) -> np.ndarray:
        state = self.processor.state(sample.state, key)
        state[: len(sample.state)] += sample.state_noise
        return np.zeros_like(state) if sample.state_masked else state


class VLATrainer(Trainer):
    """Trains on a `Mixture`.

    Args:
        collator: used for training and validation.
        validation: samples to validate on; empty: no validation.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        collator: Collator,
        validation: Sequence[Sample],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=list(validation) or None,
            data_collator=collator,
            # Checkpoints include the text tokenizer.
            processing_class=collator.processor.tokenizer,
            callbacks=list(callbacks),
        )
        # The loss is a mean over samples, so average the losses of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.collator, self.validation = collator, validation
        self._staging: str | None = None
        self._losses: dict[str, list[torch.Tensor]] = {}  # terms of the loss since the last log, by name
        self._stop = StopOnRequest()
        self.add_callback(self._stop)
        self.remove_callback(PrinterCallback)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Within the context, the first Ctrl-C or SIGTERM only requests a stop after the current step. Its exception is
        raised at the end of the context, after a checkpoint is saved."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: Any) -> None:
            signal.signal(number, before[number])
            try:
                handler = before[number]
                handler(number, frame) if callable(handler) else signal.default_int_handler(number, frame)
            except KeyboardInterrupt as stop:
                self._stop.requested = stop
                print("\nstopping after this step and saving a checkpoint to resume from ...", flush=True)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._stop.agree(self.args)  # the request may have arrived after the last step
        if self._stop.requested is not None:
            raise self._stop.requested

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save to a scratch folder and rename it, so that a checkpoint is complete when it gets its name."""
        run = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = str(run / ".saving")
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self._staging = self._staging, None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for file in Path(staging, name).rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if (run / name).exists():
                _remove(run / name)
            Path(staging, name).rename(run / name)
            shutil.rmtree(staging)
            for folder in sort_checkpoints(str(run))[: -(self.args.save_total_limit or 1)]:
                _remove(Path(folder))
        self.accelerator.wait_for_everyone()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        for name, value in (outputs.losses or {}).items():
            self._losses.setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Also log the mean of each term of the loss since the last log."""
        if "loss" in logs:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._losses.items()}
            self._losses.clear()
        super().log(logs, *args, **options)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Teacher-forced validation: loss, token accuracy, and mean absolute error per action dimension in its unit.
        With a latent, all but "elbo" are too optimistic, because the posterior sees the chunk."""
        metrics = {f"eval_{name}": value for name, value in self._validate().items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        model, processor = self.model.eval(), self.collator.processor
        tokenizer, begin = processor.action_tokenizer, processor.config.action_token_begin
        losses, correct, total = [], 0, 0
        errors, valid = [], []
        terms: dict[str, float] = {}
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(self.validation), size):
            samples = self.validation[start : start + size]
            inputs = self._prepare_inputs(self.collator(samples))
            with self.compute_loss_context_manager():
                outputs = model(**inputs)
            logits = outputs.logits[..., begin : begin + tokenizer.vocab_size].float()
            predicted, labels = logits.argmax(-1).cpu().numpy() + begin, inputs["labels"].cpu().numpy()
            losses.append(float(outputs.loss) * len(samples))
            for name, value in (outputs.losses or {}).items():
                terms[name] = terms.get(name, 0.0) + float(value) * len(samples)
            correct += int(((predicted == labels) & (labels >= 0)).sum())
            total += int((labels >= 0).sum())
            chunks = most_likely(tokenizer, logits).cpu().numpy() + begin
            for sample, ids in zip(samples, chunks, strict=True):
                chunk = processor.decode_actions(ids, self.collator.unnorm_keys[sample.source])
                errors.append(np.abs(chunk - sample.chunk))
                valid.append(sample.valid)
        model.train()
        per_entry = np.concatenate(errors)[np.concatenate(valid)].mean(0)
        named = zip(processor.robot.action_names, per_entry, strict=True)
        return {
            "loss": sum(losses) / len(self.validation),
            "token_accuracy": correct / max(total, 1),
            **{name: value / len(self.validation) for name, value in terms.items()},
        } | {f"l1/{name}": float(error) for name, error in named}


class Metrics(TrainerCallback):
    """Appends the Trainer's logs to `metrics.jsonl`. When a run is resumed, rows after the checkpoint are dropped.

    Raises:
        TrainingError: the loss is not finite. The weights are then invalid and must not be saved.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = [row for row in read_lines(self.path) if row["step"] <= state.global_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        for name in ("loss", "train_loss"):  # "train_loss" is the mean of all steps, logged at the end
            if not math.isfinite(loss := (logs or {}).get(name, 0.0)):
                raise TrainingError(
                    f"the loss is {loss} at step {state.global_step}: training has diverged. Start again with another "
                    "--out, and a lower --learning-rate or more --warmup-steps."
                )


class ShowProgress(TrainerCallback):
    """Shows progress with the latest loss and validation accuracy: a bar in a terminal, lines in a log file."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}
        self._progress: Progress | None = None
        self._last_line = -math.inf  # time of the last line
        self._begun = (0, 0.0)  # step and time of the start

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if state.global_step:
            print(f"resuming at step {state.global_step} of {state.max_steps}", flush=True)
        self._begun = state.global_step, time.monotonic()
        if sys.stderr.isatty():
            self._progress = Progress(state.max_steps, "steps", done=state.global_step)
            self._progress.__enter__()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, label in (("loss", "loss"), ("eval_token_accuracy", "validation accuracy")):
            if name in (logs or {}):
                self._notes[name] = f"{label} {logs[name]:.3f}"
        if state.is_world_process_zero and not sys.stdout.isatty():
            now, over = time.monotonic(), "train_runtime" in (logs or {})
            if self._notes and (now - self._last_line >= LINE_EVERY_S or over):
                self._last_line = now
                print(self._line(state.global_step, state.max_steps, now), flush=True)

    def _line(self, step: int, steps: int, now: float) -> str:
        per_second = (step - self._begun[0]) / max(now - self._begun[1], 1e-9)
        remaining = f", {duration((steps - step) / per_second)} remaining" if per_second and step < steps else ""
        return f"step {step} of {steps}: {', '.join(self._notes.values())}{remaining}"

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress:
            self._progress.advance(", ".join(self._notes.values()) or "first steps")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress:
            self._progress.__exit__(None, None, None)


class StopOnRequest(TrainerCallback):
    """Once `requested` is set, finishes the current step, saves a checkpoint and stops training."""

    def __init__(self) -> None:
        self.requested: BaseException | None = None

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.agree(args)
        if self.requested is not None:
            control.should_save = control.should_training_stop = True

    def agree(self, args: TrainingArguments) -> None:
        """Share a request between all processes. They may receive a signal in different steps, or not at all, but must
        stop in the same step, and must not export the unfinished policy."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.requested is not None), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            if flag and self.requested is None:
                self.requested = KeyboardInterrupt("another process was asked to stop")


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it, so that an interrupted deletion leaves no incomplete checkpoint."""
    doomed = checkpoint.with_name(".removing")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def last_checkpoint(run: Path) -> str | None:
    """The newest complete checkpoint in a run folder."""
    return get_last_checkpoint(str(run)) if run.is_dir() else None


def plot_metrics(run: Path) -> None:
    """Plot the loss and token accuracy in `metrics.jsonl` to `curves.png`, if there are any."""
    rows = read_lines(run / METRICS)
    if not any("loss" in row for row in rows):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    # Fixed margins, because computing them takes longer than drawing.
    margins = {"left": 0.06, "right": 0.99, "bottom": 0.13, "top": 0.92, "wspace": 0.14}
    left, right = figure.subplots(1, 2, gridspec_kw=margins)
    for axis, names in ((left, ("loss", "eval_loss")), (right, ("eval_token_accuracy",))):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                style = {"linewidth": 1.2} if name == "loss" else {"linewidth": 2, "marker": "o", "markersize": 3}
                label = {"loss": "training", "eval_loss": "validation", "eval_token_accuracy": "validation"}[name]
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    left.set_title("cross-entropy of action tokens")
    right.set_title("token accuracy, teacher-forced")
    figure.savefig(run / CURVES, dpi=130)
