"""`vla replay`: execute recorded actions in their environment.

Owns: the check that a recording matches the environment and its action conventions. If the recorded actions do not
solve the task, a policy that imitates them will not, either. It does not know policies.

Datasets are not trusted: a module named by a dataset (in its environment ids or in `collect.yaml`) is never imported.
Modules come only from the command line, from files named on the command line, and from this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vla import config as configuration
from vla.config import AdapterConfig, CollectConfig, ReplayConfig
from vla.data.format import PLAN
from vla.data.reader import Demonstrations, Episode
from vla.errors import DataError, SimulatorError
from vla.evaluation.results import short
from vla.simulation import adapter as simulator
from vla.simulation.environments import OWN
from vla.support.run_folder import RunFolder

FILE = "replay.json"
SAME = 1e-3  # tolerance for equal states, as a share of each dimension's range


@dataclasses.dataclass(frozen=True)
class Replay:
    """Result of replaying one episode.

    Attributes:
        success: success after the last action.
        recorded_success: success according to the dataset; None if it is not recorded.
        steps: number of executed actions.
        drift: the largest difference between replayed and recorded states, as a share of the dimension's range in the
            dataset; None without states.
        drift_at: the first frame whose states differ by more than `SAME`; None if there is none.
        drift_in: the state dimension with the largest difference; None without `drift_at`.
        early_end: whether the environment ended the episode before the end of the recording.
    """

    episode: int
    env_id: str
    seed: int
    instruction: str
    success: bool
    recorded_success: bool | None
    steps: int
    drift: float | None
    drift_at: int | None
    drift_in: str | None
    early_end: bool


def replay(config: ReplayConfig) -> bool:
    """Replay the first `config.episodes` episodes, print the results, and return whether all outcomes are as recorded.

    If no adapter value except `module` is set, the values from the dataset's collection are used.

    Raises:
        DataError: the dataset cannot be read, or its environments are not recorded.
        SimulatorError: the environment cannot be created.
        SpecError: the environment's robot does not match the recorded robot.
    """
    configuration.check(config)
    demos = Demonstrations(config.data)
    episodes = demos.episodes[: config.episodes]
    collected = _collected_with(config.data)
    adapter = _adapter(config.adapter, collected)
    results: list[Replay] = []
    notes: dict[str, None] = {}  # differences from the recording, without duplicates
    env: simulator.SimulatedRobot | None = None
    try:
        for episode in track(episodes, "replaying", console=Console(stderr=True), transient=True):
            env_id = config.env or _recorded_env(demos, episode, adapter, collected.module)
            if env is None or env.env_id != env_id:
                if env is not None:
                    env.close()
                env = simulator.make(env_id, adapter)
                recorded = dataclasses.replace(demos.robot, cameras=())  # images are not compared
                recorded.check_fits(env.robot, f"environment {env_id!r}", "the recording", ("names", "rate"))
            if episode.env_id is not None and short(env_id) != short(episode.env_id):
                recorded_in, replayed_in = short(episode.env_id), short(env_id)
                notes[f"The demonstrations were recorded in {recorded_in!r} and replayed in {replayed_in!r}."] = None
            results.append(_replay(env, demos, episode))
    finally:
        if env is not None:
            env.close()
    hint = explain(results)
    _print(Console(), results, [*notes, hint] if hint else [*notes])
    if config.out is not None:
        summary = {
            "data": str(config.data),
            "pc_success": 100 * float(np.mean([result.success for result in results])),
            "notes": [*notes],
            "hint": hint,
            "per_episode": [dataclasses.asdict(result) for result in results],
        }
        RunFolder(config.out).write_json(FILE, summary)
    return all(_as_recorded(result) for result in results)


def explain(results: Sequence[Replay]) -> str:
    """The likely cause of the failures and what to check; "" if all outcomes are as recorded."""
    wrong = [result for result in results if not _as_recorded(result)]
    if not wrong:
        return ""
    drifted = [result for result in wrong if result.drift_at is not None]
    at_start = [result for result in drifted if result.drift_at == 0]
    if len(at_start) * 2 > len(wrong):
        return (
            "The initial states differ. The environment ignores its seed, was created with other arguments than for "
            "the recording, or has changed since."
        )
    if len(drifted) * 2 > len(wrong):
        where = int(np.median([result.drift_at for result in drifted]))
        return (
            f"The states agree up to about frame {where}, so the actions have a different effect now. Compare the "
            "action space, its units, the gripper's polarity, the control rate and the simulator's version. "
            "Demonstrations of a noisy expert can only be replayed if the dataset has `executed_action`."
        )
    if any(result.early_end for result in wrong):
        return (
            "The environment ends the episodes early. Check that adapter.max_steps is not below the recorded lengths."
        )
    if all(result.drift is None for result in wrong):
        return "The dataset has no states, so the first frame that differs from the recording is unknown."
    return (
        "The states agree, but the task is not solved. The definition of success has changed, success depends on "
        "something that the state does not contain, or adapter.success names the wrong entry of `info`."
    )


def _replay(env: simulator.SimulatedRobot, demos: Demonstrations, episode: Episode) -> Replay:
    recorded = demos.actions if demos.executed_actions is None else demos.executed_actions
    states = None if demos.states is None else demos.states[episode.rows]
    seen: list[np.ndarray] = []
    steps, over = 0, False
    # Without a recorded seed, the scene differs; the drift shows this.
    observation, info = env.reset(seed=episode.seed if episode.seed is not None else episode.index)
    success = info["is_success"]
    for action in recorded[episode.rows]:
        if over:
            break
        seen.append(np.asarray(observation.get("agent_pos", ()), np.float32))
        observation, _, terminated, truncated, info = env.step(action, images=False)
        success, over, steps = info["is_success"], terminated or truncated, steps + 1
    drift, drift_at, drift_in = None, None, None
    if states is not None:
        assert demos.states is not None
        spread = np.maximum(np.ptp(demos.states, axis=0), 1e-6)
        difference = np.abs(np.stack(seen) - states[: len(seen)]) / spread
        drift, entry = float(difference.max()), int(difference.max(0).argmax())
        if drift > SAME:
            drift_at = int(np.argmax((difference > SAME).any(1)))
            drift_in = demos.robot.state_names[entry]
    return Replay(
        episode=episode.index,
        env_id=env.env_id,
        seed=episode.seed if episode.seed is not None else episode.index,
        instruction=episode.instruction,
        success=success,
        recorded_success=episode.success,
        steps=steps,
        drift=drift,
        drift_at=drift_at,
        drift_in=drift_in,
        early_end=steps < episode.length,
    )


def _collected_with(root: Path) -> AdapterConfig:
    """The adapter that the dataset was collected with; the default adapter if it is unknown."""
    plan = root / PLAN
    return configuration.load(CollectConfig, plan).adapter if plan.is_file() else AdapterConfig()


def _adapter(given: AdapterConfig, collected: AdapterConfig) -> AdapterConfig:
    """The adapter to replay with. It never takes a module from the dataset."""
    if dataclasses.replace(given, module=None) != AdapterConfig():
        return given
    return dataclasses.replace(collected, module=given.module, expert="env")


def _recorded_env(demos: Demonstrations, episode: Episode, adapter: AdapterConfig, collected_module: str | None) -> str:
    """The environment id of the recording. Modules named only by the dataset are removed."""
    if episode.env_id is None:
        raise DataError(
            f"{demos.root}: the environment of episode {episode.index} is not recorded. Set it with `--env <id>`."
        )
    module, _, name = episode.env_id.rpartition(":")
    module = module or collected_module or ""
    if module.partition(".")[0] == OWN:
        return f"{module}:{name}"
    if module and adapter.module is None and name not in gym.registry:
        raise SimulatorError(
            f"{demos.root} was recorded in {name!r} of the module {module!r}. For security, modules named by a dataset "
            f"are not imported. If you trust the module, run `vla replay --data {demos.root} --module <module>`."
        )
    return name


def _as_recorded(result: Replay) -> bool:
    return result.success or result.recorded_success is False


def _print(console: Console, results: Sequence[Replay], remarks: Sequence[str]) -> None:
    table = Table(title=", ".join(dict.fromkeys(result.env_id for result in results)), title_justify="left", box=None)
    for name in ("episode", "seed", "steps", "success", "drift", "instruction"):
        table.add_column(name, no_wrap=name != "instruction")
    for result in results:
        outcome = "[green]yes[/]" if result.success else "no, as recorded" if _as_recorded(result) else "[red]no[/]"
        drift = "" if result.drift is None else "none"
        if result.drift_at is not None:
            drift = f"{result.drift:.1%} {result.drift_in}, from frame {result.drift_at}"
        row = (result.episode, result.seed, result.steps, outcome, drift, result.instruction)
        table.add_row(*map(str, row))
    console.print(table)
    solved = sum(result.success for result in results)
    console.print(f"\n{solved} of {len(results)} replayed episodes succeeded.", highlight=False)
    for remark in remarks:
        console.print(remark, highlight=False, markup=False)
