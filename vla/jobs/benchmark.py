"""`vla benchmark metaworld`: Meta-World as papers about vision-language-action policies report it.

Owns: the tasks and seeds, resuming, the averages over tiers of difficulty, and the published results beside them. Every
task is a rollout (`vla.jobs.rollout`) in its own folder, so a benchmark can be resumed task by task; the page is
`vla.evaluation.report`'s. The suite defines the sets of tasks; its module `SETS_MODULE` is imported by name, as
environments are.

The folder of a finished benchmark is also a rollout report: `vla rollout --compare` reads it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vla import config as configuration
from vla.config import BenchmarkConfig, RolloutConfig
from vla.errors import ConfigError, SimulatorError, unknown
from vla.evaluation import report, results
from vla.evaluation.results import Episode
from vla.jobs.rollout import hash_of, rollout
from vla.serving import client
from vla.support.run_folder import RunFolder
from vla.support.statistics import mean_interval, wilson

if TYPE_CHECKING:
    from vla.policy import ChunkPolicy

FILE, TASKS = "benchmark.json", "tasks"
SETS_MODULE = "envs.metaworld_sets"
WHOLE = "mt50"  # the set whose tiers are averaged; "mt50/easy" is one of its tiers
_FREE = ("n_envs", "videos", "hosts")  # may change when a benchmark is resumed
_KEPT = [field.name for field in dataclasses.fields(Episode) if field.name != "decode_ms"]

Counts = tuple[int, int]  # successes, episodes


class Published(NamedTuple):
    """What the authors of a policy report on MT50: success in percent per tier, and the mean of the four."""

    policy: str
    tiers: tuple[float, float, float, float] | None
    average: float
    note: str = ""


PUBLISHED = (
    Published("Diffusion Policy", (23.1, 10.7, 1.9, 6.1), 10.5),
    Published("TinyVLA-H 1.3B", (77.6, 21.5, 11.4, 15.8), 31.6),
    Published("pi0", (71.8, 48.2, 41.7, 30.0), 47.9),
    Published("SmolVLA 0.45B", None, 57.3),
    Published("SmolVLA 2.25B", (87.1, 51.8, 70.0, 64.0), 68.2),
    Published("pi0 + PPO", (92.1, 74.6, 61.7, 84.0), 78.1, "also learns by trial in the simulator"),
    Published("ProgVLA 0.1B", (84.9, 72.7, 77.0, 79.6), 78.5),
    Published("Evo-1 0.77B", (89.2, 76.8, 77.2, 79.2), 80.6, "is told where the object is"),
    Published("ALAM + pi0", None, 85.0),
    Published("FabriVLA 0.89B", None, 90.0),
)


def benchmark(config: BenchmarkConfig, policy: ChunkPolicy | None = None) -> dict[str, Any]:
    """Play the missing tasks in `config.out`, aggregate, and write `benchmark.json`, `eval_info.json` and the page.

    Finished tasks are not played again, except those with faults of the environment.

    Args:
        policy: None: the one that the configuration names, loaded once for all tasks.
    Returns:
        What `benchmark.json` holds.
    Raises:
        ConfigError: unknown tasks, or a folder with another policy, other settings or something else in it.
        VLAError: as `rollout`.
        KeyboardInterrupt: stopped. This and every error are raised after finished tasks are written.
    """
    configuration.check(config)
    sets = _task_sets()
    env_ids = chosen(config.tasks, sets)
    asked = {
        "policy": {"path": config.policy, "sha256": None if policy else hash_of(config.policy)},
        "config": configuration.to_dict(config),
    }
    _claim(RunFolder(config.out, config, free=_FREE), asked)
    try:
        for number, env_id in enumerate(env_ids, 1):
            folder = config.out / _place(env_id)
            info = results.finished(folder)
            if info and not _faults(info):
                continue
            print(f"task {number} of {len(env_ids)}: {env_id}", file=sys.stderr, flush=True)
            policy = policy or client.load(
                config.policy, config.device, config.unnorm_key, config.n_action_steps, config.decoding
            )
            shutil.rmtree(folder, ignore_errors=True)  # unfinished: a kill left it
            rollout(_of_task(config, env_id, folder), policy)
    finally:
        summary = _conclude(config, asked, env_ids, sets)
    return summary


def chosen(names: Sequence[str], sets: Mapping[str, Sequence[str]]) -> list[str]:
    """Environment ids, each once, of the sets and ids in `names`; ConfigError for what is neither."""
    env_ids: dict[str, None] = {}
    for name in names:
        if name in sets:
            env_ids |= dict.fromkeys(sets[name])
        elif name in sets[WHOLE]:
            env_ids[name] = None
        elif re.search(r"-v\d+$", name):
            raise ConfigError(unknown("task", name, sets[WHOLE]))
        else:
            raise ConfigError(unknown("set of tasks", name, sets, f"Or a task's id, such as {sets[WHOLE][0]}."))
    if not env_ids:
        raise ConfigError(f"tasks needs one or more of: {', '.join(sets)}; or ids, such as {sets[WHOLE][0]}.")
    return list(env_ids)


def score(counts: Mapping[str, Counts], sets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Success by tier, over tiers and over episodes.

    A tier pools the episodes of its tasks. "tier_average" is the unweighted mean of the tiers, which papers call Avg;
    it is None as long as a task of any tier is missing. "episode_average" counts every episode alike.

    Args:
        counts: environment id -> (successes, episodes).
    """
    tiers = {
        name.rpartition("/")[2]: (members, _pool(counts, members))
        for name, members in sets.items()
        if name.startswith(f"{WHOLE}/")
    }
    complete = all(env_id in counts for members, _ in tiers.values() for env_id in members)
    average = None
    if complete:
        pooled = [count for _, count in tiers.values()]
        limits = mean_interval(pooled)
        rate = sum(successes / episodes for successes, episodes in pooled) / len(pooled)
        average = {"pc_success": 100 * rate, "pc_success_ci95": [100 * limit for limit in limits]}
    return {
        "tiers": {
            name: {"n_tasks": sum(m in counts for m in members), "n_tasks_of": len(members)} | _rate(count)
            for name, (members, count) in tiers.items()
        },
        "tier_average": average,
        "episode_average": {"n_tasks": len(counts), "n_tasks_of": len(sets[WHOLE])} | _rate(_pool(counts, counts)),
    }


def _task_sets() -> Mapping[str, Sequence[str]]:
    try:
        return importlib.import_module(SETS_MODULE).SETS
    except Exception as error:  # the suite opens a GL library, and each fails in its own way
        raise SimulatorError(f"cannot import {SETS_MODULE!r} ({error}). `vla doctor` says what is wrong.") from error


def _claim(folder: RunFolder, asked: Mapping[str, Any]) -> None:
    """Start or continue a benchmark in `folder`; ConfigError when what it holds was measured in another way."""
    played = any((folder.path / TASKS).glob(f"*/{results.FILE}"))  # if none was, the policy or the adapter was wrong
    folder.check(resume=True, has_results=played)
    if played and folder.read_json(FILE).get("policy") != asked["policy"]:
        raise ConfigError(
            f"{folder.path} holds a benchmark of another policy (the files of {asked['policy']['path']} are not the "
            "ones that were measured). Choose another --out."
        )
    folder.begin()
    if not played:
        folder.write_json(FILE, asked)


def _place(env_id: str) -> Path:
    """Folder of a task's rollout, relative to the benchmark's."""
    return Path(TASKS) / env_id.rpartition("/")[2]


def _faults(info: Mapping[str, Any]) -> int:
    return info["overall"]["outcomes"].get("fault", 0)


def _of_task(config: BenchmarkConfig, env_id: str, folder: Path) -> RolloutConfig:
    shared = {field.name for field in dataclasses.fields(RolloutConfig)} & set(vars(config))
    return RolloutConfig(**{name: getattr(config, name) for name in shared} | {"env": (env_id,), "out": folder})


def _conclude(
    config: BenchmarkConfig,
    asked: Mapping[str, Any],
    env_ids: Sequence[str],
    sets: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Aggregate the finished tasks from their folders; write and print the result."""
    infos = {env_id: info for env_id in env_ids if (info := results.finished(config.out / _place(env_id)))}
    tasks = {env_id: info["per_task"][0] for env_id, info in infos.items()}
    scores = score({env_id: (task["n_successes"], task["n_episodes"]) for env_id, task in tasks.items()}, sets)
    summary = {
        **asked,
        "interrupted": len(infos) < len(env_ids),
        "n_tasks_asked": len(env_ids),
        "n_faults": sum(map(_faults, infos.values())),
        **scores,
        "tasks": {
            env_id: {key: task[key] for key in ("n_episodes", "n_successes", "pc_success", "pc_success_ci95")}
            | {"tier": _tier(env_id, sets), "seconds": infos[env_id]["overall"]["eval_s"]}
            for env_id, task in tasks.items()
        },
        "published": [entry._asdict() | {"tiers": entry.tiers and list(entry.tiers)} for entry in PUBLISHED],
        "machine": next((info["machine"] for info in infos.values()), None),
    }
    RunFolder(config.out).write_json(FILE, summary)
    if infos:
        whole = _merge(infos, summary) | {
            "benchmark": scores | {"published": summary["published"]},
            "command": f"vla benchmark metaworld --config {config.out / 'config.yaml'}",
        }
        results.write(whole, config.out)
        report.write(whole, config.out)
        _print(summary, config.out)
    if summary["interrupted"]:
        print(f"{len(infos)} of {len(env_ids)} tasks are finished; the same command plays the others.", file=sys.stderr)
    if summary["n_faults"]:
        print(
            f"{summary['n_faults']} episodes failed in the environment and count as failures; the same command plays "
            "their tasks again.",
            file=sys.stderr,
        )
    return summary


def _merge(infos: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The rollouts of all tasks as one: what `eval_info.json` of a rollout over these environments holds."""
    records = [
        episode | {"video_path": episode["video_path"] and (_place(env_id) / episode["video_path"]).as_posix()}
        for env_id, info in infos.items()
        for episode in info["per_episode"]
    ]
    records = [record | {"episode_ix": i} for i, record in enumerate(records)]
    episodes = [Episode(**{key: record[key] for key in _KEPT}) for record in records]
    seconds = sum(info["overall"]["eval_s"] for info in infos.values())
    first = next(iter(infos.values()))
    return {
        **results.evaluate(episodes, seconds),
        "per_episode": records,
        # Percentiles of several runs cannot be merged; the page of each task has its own.
        "decode_latency": {"n_forwards": sum(info["decode_latency"]["n_forwards"] for info in infos.values())},
        "interrupted": summary["interrupted"],
        "n_episodes_asked": summary["n_tasks_asked"] * summary["config"]["episodes"],
        "policy": summary["policy"],
        "n_action_steps": first["n_action_steps"],
        "machine": summary["machine"],
        "config": summary["config"],
    }


def _print(summary: Mapping[str, Any], out: Path) -> None:
    policy = summary["policy"]["path"]
    ours = {name: tier["pc_success"] for name, tier in summary["tiers"].items()}
    table = Table(title=f"{policy} on Meta-World, success in %")
    for column in ("", "tasks", "success", "95 % interval", "episodes"):
        table.add_column(column, justify="right" if column else "left")
    rows = {name.replace("_", " "): tier for name, tier in summary["tiers"].items() if tier["n_episodes"]}
    rows |= {"Avg (mean of the tiers)": summary["tier_average"], "all episodes": summary["episode_average"]}
    for name, row in rows.items():
        if row is not None:
            low, high = row["pc_success_ci95"]
            tasks = f"{row['n_tasks']}/{row['n_tasks_of']}" if "n_tasks" in row else ""
            episodes = f"{row['n_successes']}/{row['n_episodes']}" if "n_tasks" in row else ""
            table.add_row(name, tasks, f"{row['pc_success']:.1f}", f"{low:.1f} to {high:.1f}", episodes)
    Console().print(table)
    if summary["tier_average"] is not None:
        known = [(entry["policy"], entry["tiers"], entry["average"]) for entry in summary["published"]]
        known.append((f"{policy} (this)", tuple(ours.values()), summary["tier_average"]["pc_success"]))
        table = Table(title="as published, and this")
        for column in ("policy", *(name.replace("_", " ") for name in ours), "Avg"):
            table.add_column(column, justify="left" if column == "policy" else "right")
        for name, tiers, average in sorted(known, key=lambda row: row[2]):
            table.add_row(name, *(f"{rate:.1f}" for rate in tiers or ()), *[""] * (0 if tiers else 4), f"{average:.1f}")
        Console().print(table)
    print(f"report: {out / report.FILE}")


def _tier(env_id: str, sets: Mapping[str, Sequence[str]]) -> str:
    return next(name.rpartition("/")[2] for name in sets if name.startswith(f"{WHOLE}/") and env_id in sets[name])


def _pool(counts: Mapping[str, Counts], members: Sequence[str] | Mapping[str, Any]) -> Counts:
    """Successes and episodes of those `members` that were played."""
    played = [counts[env_id] for env_id in members if env_id in counts]
    return sum(successes for successes, _ in played), sum(episodes for _, episodes in played)


def _rate(count: Counts) -> dict[str, Any]:
    successes, episodes = count
    return {
        "n_episodes": episodes,
        "n_successes": successes,
        "pc_success": 100 * successes / episodes if episodes else None,
        "pc_success_ci95": [100 * limit for limit in wilson(successes, episodes)],
    }
