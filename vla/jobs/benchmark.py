"""`vla benchmark <suite>`: evaluate a policy on a benchmark suite with the protocol of its published results.

Owns: running and resuming the tasks. Each task is a rollout (`vla.jobs.rollout`) in its own folder; an interrupted
benchmark continues with its first unfinished task. Suites are defined in `vla.evaluation.suites`, averages are computed
in `vla.evaluation.scores`, and the page is written by `vla.evaluation.report`.

The folder of a benchmark is also a rollout report, which `vla rollout --compare` can read.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vla import config as configuration
from vla.config import BenchmarkConfig, RolloutConfig
from vla.errors import ConfigError
from vla.evaluation import report, results, suites
from vla.evaluation.scores import score
from vla.evaluation.suites import Suite
from vla.jobs.rollout import hash_of, rollout
from vla.serving import client
from vla.support.run_folder import RunFolder

if TYPE_CHECKING:
    from vla.policy import ChunkPolicy

FILE, TASKS = "benchmark.json", "tasks"
_FREE = ("n_envs", "videos", "hosts")  # may change when a benchmark is resumed


def benchmark(config: BenchmarkConfig, policy: ChunkPolicy | None = None) -> dict[str, Any]:
    """Run the unfinished tasks and those with environment faults; write `benchmark.json`, `eval_info.json` and the
    page.

    Args:
        policy: None: load `config.policy`, once for all tasks.
    Returns:
        The contents of `benchmark.json`.
    Raises:
        ConfigError: the suite or a task is unknown, or the folder has results of another policy or other settings, or
            unrelated files.
        SimulatorError: the suite's module cannot be imported.
        VLAError: as for `rollout`.
        KeyboardInterrupt: the run was stopped. This exception and errors of a task are raised after the finished tasks
            are written.
    """
    configuration.check(config)
    suite = suites.find(config.suite)
    config = _resolved(config, suite)
    out = config.out
    assert out is not None
    env_ids = suite.choose(config.tasks)
    header = {
        "policy": {"path": config.policy, "sha256": None if policy else hash_of(config.policy)},
        "config": configuration.to_dict(config),
    }
    _claim(RunFolder(out, config, free=_FREE), header)
    try:
        for number, env_id in enumerate(env_ids, 1):
            folder = out / _folder(env_id)
            info = results.finished(folder)
            if info and not _faults(info):
                continue
            print(f"task {number} of {len(env_ids)}: {env_id}", file=sys.stderr, flush=True)
            policy = policy or client.load(
                config.policy, config.device, config.unnorm_key, config.n_action_steps, config.decoding, config.dtype
            )
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process, or has faults
            rollout(_of_task(config, suite, env_id, folder), policy)
    finally:
        summary = _conclude(suite, env_ids, header, out)
    return summary


def _resolved(config: BenchmarkConfig, suite: Suite) -> BenchmarkConfig:
    """`config`, with None replaced by the values of the suite's protocol."""
    return dataclasses.replace(
        config,
        tasks=config.tasks or (suite.whole,),
        episodes=suite.episodes if config.episodes is None else config.episodes,
        seed=suite.seed if config.seed is None else config.seed,
        out=Path("runs") / f"{suite.name}-benchmark" if config.out is None else config.out,
    )


def _claim(folder: RunFolder, header: Mapping[str, Any]) -> None:
    """Start or continue a benchmark in `folder`. ConfigError if it has results of another policy or other settings."""
    has_results = any((folder.path / TASKS).glob(f"*/{results.FILE}"))
    folder.check(resume=True, has_results=has_results)
    if has_results and folder.read_json(FILE).get("policy") != header["policy"]:
        raise ConfigError(
            f"{folder.path} contains a benchmark of another policy, or the files of {header['policy']['path']} have "
            "changed since. Choose another --out."
        )
    folder.begin()
    if not has_results:
        folder.write_json(FILE, header)


def _folder(env_id: str) -> Path:
    """Folder of a task's rollout, relative to the benchmark's folder."""
    return Path(TASKS) / env_id.rpartition("/")[2]


def _faults(info: Mapping[str, Any]) -> int:
    return info["overall"]["outcomes"].get("fault", 0)


def _of_task(config: BenchmarkConfig, suite: Suite, env_id: str, folder: Path) -> RolloutConfig:
    assert config.episodes is not None and config.seed is not None
    adapter = config.adapter
    if adapter.max_steps is None:
        adapter = dataclasses.replace(adapter, max_steps=suite.max_steps_of(env_id))
    return RolloutConfig(
        policy=config.policy,
        env=(env_id,),
        episodes=config.episodes,
        seed=config.seed,
        n_envs=config.n_envs,
        n_action_steps=config.n_action_steps,
        unnorm_key=config.unnorm_key,
        decoding=config.decoding,
        videos=config.videos,
        out=folder,
        device=config.device,
        dtype=config.dtype,
        adapter=adapter,
        hosts=config.hosts,
    )


def _conclude(suite: Suite, env_ids: Sequence[str], header: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Aggregate the finished tasks from their folders; write and print the result."""
    infos = {env_id: info for env_id in env_ids if (info := results.finished(out / _folder(env_id)))}
    tasks = {env_id: info["per_task"][0] for env_id, info in infos.items()}
    scores = score({env_id: (task["n_successes"], task["n_episodes"]) for env_id, task in tasks.items()}, suite)
    published = [dataclasses.asdict(entry) | {"tiers": entry.tiers and list(entry.tiers)} for entry in suite.published]
    first = next(iter(infos.values()), None)
    summary = {
        **header,
        "interrupted": len(infos) < len(env_ids),
        "n_tasks_asked": len(env_ids),
        "n_faults": sum(map(_faults, infos.values())),
        **scores,
        "tasks": {
            env_id: {key: task[key] for key in ("n_episodes", "n_successes", "pc_success", "pc_success_ci95")}
            | {"tier": suite.tier_of(env_id), "seconds": infos[env_id]["overall"]["eval_s"]}
            for env_id, task in tasks.items()
        },
        "published": published,
        "machine": first and first["machine"],
    }
    RunFolder(out).write_json(FILE, summary)
    if first is not None:
        info = results.merge({_folder(env_id).as_posix(): info for env_id, info in infos.items()}) | {
            "interrupted": summary["interrupted"],
            "n_episodes_asked": len(env_ids) * header["config"]["episodes"],
            "policy": header["policy"],
            "n_action_steps": first["n_action_steps"],
            "machine": first["machine"],
            "config": header["config"],
            "benchmark": scores | {"title": suite.title, "published": published},
            "command": f"vla benchmark {header['config']['suite']} --config {out / 'config.yaml'}",
        }
        results.write(info, out)
        report.write(info, out)
        for table in report.tables(summary, suite.title):
            Console().print(table)
        print(f"report: {out / report.FILE}")
    if summary["interrupted"]:
        print(
            f"{len(infos)} of {len(env_ids)} tasks are finished. Run the same command again to continue.",
            file=sys.stderr,
        )
    if summary["n_faults"]:
        print(
            f"{summary['n_faults']} episodes ended in an environment fault and count as failures. Run the same command "
            "again to repeat their tasks.",
            file=sys.stderr,
        )
    return summary
