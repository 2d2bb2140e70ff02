"""`vla dagger`: DAgger, training on expert labels for the states that the policy reaches (Ross et al., 2011).

Owns: the rounds, the stopping criterion, and labels and success per round. Round 0 is behaviour cloning. Every later
round collects DAgger rollouts with the last policy and the expert (`vla.training.dagger_rollouts`), trains that policy
further (or a new one) on the demonstrations of all rounds, and evaluates it. Every stage is a separate job; finished
stages are not repeated. The output folder:

    round-0/data, train, rollout     output of `vla collect`, `vla train` and `vla rollout`; likewise round-1, ...
    round-1/trials                   with `trials`: rollouts of the last policy without the expert
    bc-4/...                         behaviour cloning on the budget of rounds 0 to 4
    dagger.json, dagger.png          success against the number of labels
    dagger.yaml                      settings
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from vla import config as configuration
from vla.config import CollectConfig, DaggerConfig, RolloutConfig, TrainConfig
from vla.config.training import ROUNDS_APART
from vla.data.format import INFO, Info
from vla.data.reader import Demonstrations
from vla.evaluation import results
from vla.evaluation.comparison import compare
from vla.jobs.collect import collect
from vla.jobs.rollout import rollout
from vla.jobs.train import train
from vla.policy import Policy
from vla.simulation import adapter as simulator
from vla.support.palette import ACCENT, SOFT, WARN, dress
from vla.support.run_folder import RunFolder
from vla.training.dagger_rollouts import collect_rollouts, first_seed, scenes_of

FILE, FIGURE, SETTINGS = "dagger.json", "dagger.png", "dagger.yaml"
FREE = ("rounds", "labels", "target", "compare_bc", "device", "hosts")  # may change when a run is resumed
KEY = "dagger"  # the unnorm_key of all rounds, so that they share statistics

_console = Console()


def dagger(config: DaggerConfig) -> dict[str, Any]:
    """Run the rounds and return the contents of `dagger.json`: labels, optimizer steps and closed-loop success of each
    round.

    Raises:
        ConfigError, DataError, SimulatorError: the configuration, a dataset, the output folder or an environment is
            invalid.
    """
    _check(config)
    RunFolder(config.out, config, SETTINGS, FREE).claim(config.resume)
    rounds: list[dict[str, Any]] = []
    info: dict[str, Any] = {"rounds": rounds, "stopped": None}
    while info["stopped"] is None:
        row = _round(config, rounds)
        if row is not None:
            rounds.append(row)
        info["stopped"] = _enough(config, rounds) if row is not None else "nothing to label"
        _write(config, info)
    if config.compare_bc and len(rounds) > 1:
        info["bc"] = _behaviour_cloning(config, rounds)
        info["comparison"] = compare(rounds[-1]["report"], info["bc"]["report"])
        _write(config, info)
    _print(info, config.out)
    return info


def _round(config: DaggerConfig, before: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Run one round: demonstrations, training, evaluation. None if there is nothing to label."""
    number = len(before)
    folder = config.out / f"round-{number}"
    title = f"the expert controls {config.beta**number:.0%} of the rollouts" if number else "behaviour cloning"
    _console.print(Rule(f"round {number}: {title}", align="left"))
    steps = config.train.steps if not number or config.finetune_steps is None else config.finetune_steps
    if number:
        last = before[-1]
        new = [folder / "data"]
        if not (new[0] / INFO).is_file():
            failures = _failures(config, number, last["policy"]) if config.trials else None
            if failures and not any(failures):
                return None
            policy, scenes = Policy.from_pretrained(last["policy"], config.device), scenes_of(config, number, failures)
            if collect_rollouts(config, number, policy, new[0], scenes) is None:
                return None
        data = [*map(Path, last["data"]), *new]
        backbone, done = (last["policy"], last["optimizer_steps"]) if config.warm_start else (None, 0)
    else:
        new = data = list(config.data) or [_demonstrate(config, folder / "data", config.demonstrations, config.seed)]
        backbone, done = None, 0
    successes = [episode.success for root in new for episode in Demonstrations(root).episodes]
    row = {
        "round": number,
        "beta": config.beta**number,
        "episodes": len(successes),
        "pc_success_of_episodes": None if None in successes else 100 * successes.count(True) / len(successes),
        "labels": sum(Info.load(root).total_frames for root in data),
        "optimizer_steps": done + steps,
    }
    return row | _learn(config, folder, data, backbone, steps)


def _failures(config: DaggerConfig, number: int, policy: str) -> list[int]:
    """Number of failures per environment of the policy without the expert, in this round's scenes."""
    folder = config.out / f"round-{number}" / "trials"
    tried = _evaluate(config, policy, folder, config.trials, first_seed(config, number))["per_episode"]
    failed = [episode["env_id"] for episode in tried if not episode["success"]]
    return [failed.count(env_id) for env_id in config.env]


def _behaviour_cloning(config: DaggerConfig, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The baseline: behaviour cloning on the expert's demonstrations, with at least as many labels as DAgger and the
    same number of optimizer steps.

    The remaining differences favour the baseline: it has all demonstrations from the start, and complete episodes may
    give it more labels.
    """
    _console.print(Rule("behaviour cloning on the same budget", align="left"))
    first, last = rounds[0], rounds[-1]
    folder = config.out / f"bc-{last['round']}"
    data, labels, seed = list(map(Path, first["data"])), first["labels"], config.seed + ROUNDS_APART
    while labels < last["labels"]:
        # The length of an episode is known only after it is collected.
        episodes = math.ceil((last["labels"] - labels) * first["episodes"] / first["labels"])
        data.append(_demonstrate(config, folder / f"data-{len(data)}", episodes, seed))
        labels, seed = labels + Info.load(data[-1]).total_frames, seed + episodes
    row = {"labels": labels, "optimizer_steps": last["optimizer_steps"]}
    return row | _learn(config, folder, data, None, last["optimizer_steps"])


def _demonstrate(config: DaggerConfig, out: Path, episodes: int, seed: int) -> Path:
    """Collect successful episodes of the expert."""
    if not (out / INFO).is_file():
        collect(
            CollectConfig(
                env=config.env,
                out=out,
                episodes=episodes,
                seed=seed,
                noise=config.noise,
                noise_share=config.noise_share,
                resume=out.exists(),
                adapter=config.adapter,
                hosts=config.hosts,
            )
        )
    return out


def _learn(
    config: DaggerConfig, folder: Path, data: Sequence[Path], backbone: str | None, steps: int
) -> dict[str, Any]:
    """Train on `data`, starting from the policy `backbone` (None: the configured backbone), and evaluate the result."""
    run, report = folder / "train", folder / "rollout"
    if not (run / "policy").is_dir():
        train(_training(config, run, data, backbone, steps), conclude=False)
    info = _evaluate(config, str(run), report, config.eval_episodes, config.eval_seed, videos=1)
    shown = ("n_episodes", "n_successes", "pc_success", "pc_success_ci95")
    places = {"data": list(map(str, data)), "policy": str(run), "report": str(report)}
    return {key: info["overall"][key] for key in shown} | places


def _evaluate(
    config: DaggerConfig, policy: str, report: Path, episodes: int, seed: int, videos: int = 0
) -> dict[str, Any]:
    """Results of a policy without the expert, with `episodes` per environment."""
    return results.finished(report) or rollout(
        RolloutConfig(
            policy=policy,
            env=config.env,
            episodes=episodes,
            seed=seed,
            n_envs=config.n_envs,
            videos=videos,
            out=report,
            device=config.device,
            adapter=config.adapter,
            hosts=config.hosts,
        )
    )


def _training(config: DaggerConfig, run: Path, data: Sequence[Path], backbone: str | None, steps: int) -> TrainConfig:
    started = (run / "config.yaml").is_file()
    if not started:  # no folder, or an earlier process was killed while it wrote the first files
        shutil.rmtree(run, ignore_errors=True)
    model = config.train.model
    if backbone is not None:  # a trained policy, which has a vision tower
        model = dataclasses.replace(model, backbone=backbone, vision=(), image_size=None)
    # The seed selects the validation episodes; with the same seed, those of earlier rounds stay held out.
    return dataclasses.replace(
        config.train,
        data=tuple(data),
        unnorm_keys=(KEY,) * len(data),
        out=run,
        model=model,
        steps=steps,
        resume=started,
    )


def _enough(config: DaggerConfig, rounds: Sequence[dict[str, Any]]) -> str | None:
    """The stopping criterion that these rounds meet; None if another round follows."""
    if rounds[-1]["pc_success"] >= 100 * config.target:
        return "target"
    if config.labels is not None and rounds[-1]["labels"] >= config.labels:
        return "labels"
    return "rounds" if len(rounds) > config.rounds else None


def _check(config: DaggerConfig) -> None:
    """Raise errors that would otherwise occur hours into the run."""
    configuration.check(config)
    for folder in config.data:
        Info.load(folder)
    for env_id in config.env:
        with simulator.make(env_id, config.adapter) as env:
            env.make_expert()


def _write(config: DaggerConfig, info: dict[str, Any]) -> None:
    RunFolder(config.out).write_json(FILE, info | {"config": configuration.to_dict(config)})
    _draw(info).savefig(config.out / FIGURE, dpi=150, facecolor="white")


def _print(info: dict[str, Any], out: Path) -> None:
    table = Table(title=f"DAgger (stopping criterion: {info['stopped']})", title_justify="left")
    for column in ("", "expert", "episodes", "solved", "labels", "steps", "success (95 %)"):
        table.add_column(column, justify="right" if column else "left")
    for row in info["rounds"]:
        solved = row["pc_success_of_episodes"]
        made = (f"{row['beta']:.0%}", str(row["episodes"]), "-" if solved is None else f"{solved:.0f} %")
        table.add_row(f"round {row['round']}", *made, *_cells(row))
    if "bc" in info:
        table.add_row("BC alone", "100%", "-", "-", *_cells(info["bc"]))
    _console.print(table)
    if "comparison" in info:
        _console.print(info["comparison"]["words"], highlight=False)
    _console.print(f"figure: {out / FIGURE}", soft_wrap=True, highlight=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["pc_success_ci95"]
    return str(row["labels"]), str(row["optimizer_steps"]), f"{row['pc_success']:.0f} % ({low:.0f} to {high:.0f})"


def _draw(info: dict[str, Any]) -> Figure:
    """Plot success with its interval against the number of labels. Both lines start at round 0."""
    figure = Figure(figsize=(6.4, 3.8))
    axis = figure.subplots(gridspec_kw={"left": 0.08, "right": 0.98, "bottom": 0.12, "top": 0.92})
    lines = [("DAgger", info["rounds"], ACCENT)]
    if "bc" in info:
        lines.append(("behaviour cloning", [info["rounds"][0], info["bc"]], WARN))
    for name, rows, colour in lines:
        success = np.array([row["pc_success"] for row in rows])
        low, high = np.array([row["pc_success_ci95"] for row in rows]).T
        spread = np.maximum([success - low, high - success], 0)  # rounding can give -1e-15
        labels = [row["labels"] for row in rows]
        axis.errorbar(labels, success, spread, color=colour, label=name, lw=1.6, marker="o", ms=4, capsize=3)
    axis.set_ylim(-3, 103)
    dress(axis, "closed-loop success (95 % intervals)", "frames labelled by the expert", "%")
    axis.legend(frameon=False, fontsize=8, labelcolor=SOFT)
    return figure
