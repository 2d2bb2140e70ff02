"""`vla quickstart`: from demonstrations to an evaluated policy in one command.

Owns: the sequence collect -> rollout (zero-shot) -> train (LoRA) -> rollout, and its settings. Finished steps are not
repeated.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from vla import config
from vla.config import (
    AugmentConfig,
    CollectConfig,
    LoraConfig,
    ModelConfig,
    QuickstartConfig,
    RolloutConfig,
    TrainConfig,
)
from vla.data.format import INFO
from vla.evaluation import results
from vla.jobs.collect import collect
from vla.jobs.rollout import rollout
from vla.jobs.train import seconds_per_step, train
from vla.support.run_folder import RunFolder

UNSEEN = 100_000  # first seed of the rollouts, larger than all seeds of the demonstrations
SETTINGS = "quickstart.yaml"


def quickstart(cfg: QuickstartConfig) -> Path:
    """Run all steps and return the path of the report."""
    config.check(cfg)
    start = time.monotonic()
    _claim(cfg)
    demos, run = cfg.out / "demonstrations", cfg.out / "train"
    console = Console()

    console.print(Rule(f"1/4  {cfg.demonstrations} demonstrations of {cfg.env}", align="left"))
    if not (demos / INFO).is_file():
        collect(CollectConfig(env=(cfg.env,), out=demos, episodes=cfg.demonstrations, noise=0.5, resume=demos.exists()))

    console.print(Rule("2/4  zero-shot evaluation of the built-in backbone", align="left"))
    before = _rollout(cfg, "nano", cfg.out / "before")

    console.print(Rule("3/4  LoRA fine-tuning", align="left"))
    if not (run / "policy").is_dir():
        train(_training(cfg, demos, run), conclude=False)

    console.print(Rule("4/4  evaluation of the fine-tuned policy on unseen seeds", align="left"))
    after = _rollout(cfg, str(run), cfg.out / "after", compare=cfg.out / "before")

    report = cfg.out / "after" / "report.html"
    console.print(Rule(align="left"))
    for name, info in (("zero-shot", before), ("fine-tuned", after)):
        console.print(f"{name:>10}: {_words(info)}")
    console.print(f"{'time':>10}: {(time.monotonic() - start) / 60:.1f} minutes")
    console.print(f"{'report':>10}: {report.resolve()}", soft_wrap=True)
    return report


def _claim(cfg: QuickstartConfig) -> None:
    """Start or continue a quickstart in `out`; with `fresh`, first remove the results of an earlier one."""
    remedy = "pass --fresh, or choose another --out"
    folder = RunFolder(cfg.out, dataclasses.replace(cfg, fresh=False), SETTINGS, remedy=remedy)
    if cfg.fresh and folder.settings_file.is_file():
        for name in ("demonstrations", "before", "train", "after"):
            shutil.rmtree(cfg.out / name, ignore_errors=True)
        folder.begin()
    else:
        folder.claim(resume=True)


def _training(cfg: QuickstartConfig, demos: Path, run: Path) -> TrainConfig:
    if (run / "config.yaml").is_file():
        return dataclasses.replace(config.load(TrainConfig, run / "config.yaml"), resume=True)
    training = TrainConfig(
        data=(demos,),
        out=run,
        model=ModelConfig(backbone="nano"),
        lora=LoraConfig(train_vision=True),  # the built-in vision tower was trained on few objects
        # The cameras are fixed, so shifted images would only make object positions inaccurate.
        augment=AugmentConfig(shift=0.0),
        batch_size=32,
        save_every=200,
        eval_every=200,
    )
    steps = int(60 * cfg.minutes / seconds_per_step(training))
    # More than 4000 steps do not improve the policy.
    return dataclasses.replace(training, steps=max(cfg.min_steps, min(steps, 4000)))


def _rollout(cfg: QuickstartConfig, policy: str, out: Path, compare: Path | None = None) -> dict[str, Any]:
    return results.finished(out) or rollout(
        RolloutConfig(policy=policy, env=(cfg.env,), episodes=cfg.episodes, seed=UNSEEN, out=out, compare=compare)
    )


def _words(info: dict[str, Any]) -> str:
    overall = info["overall"]
    low, high = overall["pc_success_ci95"]
    rate = f"{overall['pc_success']:.0f} % success over {overall['n_episodes']} episodes"
    return f"{rate} (95 % interval {low:.0f} to {high:.0f})"
