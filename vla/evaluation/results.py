"""Results of a rollout, as data.

Owns: the record of an episode and the contents of `eval_info.json` (LeRobot's names, and intervals). It does not know
how episodes are run or compared, or how a report looks.

An episode is a success if the task is solved at its last step. Environment faults are failures. Success at any step
("ever") and the number of environment faults are also reported.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import DataError
from vla.support.run_folder import RunFolder
from vla.support.statistics import percentiles, wilson

FILE = "eval_info.json"

OUTCOMES = {
    "success": "success at the last step",
    "lost": "solved at an earlier step only",
    "wrong_target": "went to another object",
    "timeout": "ran out of time",
    "ended": "ended by the environment without success",
    "fault": "environment fault",
}


@dataclasses.dataclass
class Episode:
    """One episode. Rewards are the environment's own; times are in milliseconds."""

    episode_ix: int
    env_id: str
    seed: int
    instruction: str = ""
    success: bool = False
    success_ever: bool = False
    sum_reward: float = 0.0
    max_reward: float = 0.0
    length: int = 0
    truncated: bool = False
    fault: str | None = None
    reached: int | str | None = None
    target: int | str | None = None
    n_chunks: int = 0
    decode_ms: list[float] = dataclasses.field(default_factory=list)
    image_hash: str = ""
    video_path: str | None = None
    rerun_path: str | None = None

    @property
    def outcome(self) -> str:
        """A key of `OUTCOMES`."""
        if self.fault is not None:
            return "fault"
        if self.success:
            return "success"
        if self.success_ever:
            return "lost"
        if None not in (self.reached, self.target) and self.reached != self.target:
            return "wrong_target"
        return "timeout" if self.truncated else "ended"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        decode_ms = values.pop("decode_ms")
        values["decode_ms_p50"] = statistics.median(decode_ms) if decode_ms else None
        values["decode_ms_max"] = max(decode_ms, default=None)
        return values | {"outcome": self.outcome}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Episode:
        """Inverse of `to_dict`, except for `decode_ms`, which `to_dict` summarises."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "decode_ms"]
        return cls(**{name: values[name] for name in names if name in values})  # older files lack some values


def evaluate(episodes: Sequence[Episode], seconds: float) -> dict[str, Any]:
    """The part of eval_info.json that is computed from episodes: per episode, task and group, and overall."""
    tasks, groups = collections.defaultdict(list), collections.defaultdict(list)
    for episode in episodes:
        tasks[episode.env_id].append(episode)
        groups[task_group(episode.env_id)].append(episode)
    overall = summarise(episodes) | {"eval_s": seconds, "eval_ep_s": seconds / max(1, len(episodes))}
    return {
        "per_episode": [episode.to_dict() for episode in episodes],
        "per_task": [
            {"task_group": task_group(env_id), "task_id": i, "env_id": env_id, "metrics": _metrics(of_task)}
            | summarise(of_task)
            for i, (env_id, of_task) in enumerate(tasks.items())
        ],
        "per_group": {group: summarise(of_group) for group, of_group in groups.items()},
        # LeRobot uses both names.
        "overall": overall,
        "aggregated": overall,
    }


def merge(infos: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the results of several rollouts.

    Args:
        infos: folder of a rollout, relative to the common report folder -> its results.
    """
    records = [
        record | {name: f"{folder}/{record[name]}" for name in ("video_path", "rerun_path") if record.get(name)}
        for folder, info in infos.items()
        for record in info["per_episode"]
    ]
    records = [record | {"episode_ix": i} for i, record in enumerate(records)]
    return evaluate(
        list(map(Episode.from_dict, records)), sum(info["overall"]["eval_s"] for info in infos.values())
    ) | {
        "per_episode": records,
        # Percentiles cannot be merged; each rollout's report has its own.
        "decode_latency": {"n_forwards": sum(info["decode_latency"]["n_forwards"] for info in infos.values())},
    }


def rate(successes: int, episodes: int) -> dict[str, Any]:
    """The counts, and the success rate in percent (None without episodes) with its 95 % interval."""
    return {
        "n_episodes": episodes,
        "n_successes": successes,
        "pc_success": 100 * successes / episodes if episodes else None,
        "pc_success_ci95": [100 * limit for limit in wilson(successes, episodes)],
    }


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success with its interval, rewards, lengths and outcomes. Averages over no episodes are None."""
    trials, successes = len(episodes), sum(episode.success for episode in episodes)
    outcomes = collections.Counter(episode.outcome for episode in episodes)
    return rate(successes, trials) | {
        "pc_success_ever": _mean([100 * episode.success_ever for episode in episodes]),
        "avg_sum_reward": _mean([episode.sum_reward for episode in episodes]),
        "avg_max_reward": _mean([episode.max_reward for episode in episodes]),
        "avg_length": _mean([episode.length for episode in episodes]),
        "outcomes": {name: outcomes[name] for name in OUTCOMES if outcomes[name]},
        "video_paths": [episode.video_path for episode in episodes if episode.video_path],
    }


def latency(forwards: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Percentiles of a batch's decoding time in ms. The first batch, a warm-up, is reported separately.

    Args:
        forwards: batch size and seconds of each batch.
    """
    if not forwards:
        return {"n_forwards": 0}
    steady = forwards[1:] or forwards
    milliseconds = [1e3 * seconds for _, seconds in steady]
    counts, edges = np.histogram(milliseconds, bins=min(24, max(4, len(steady) // 2)))
    by_batch: dict[int, list[float]] = collections.defaultdict(list)
    for batch_size, seconds in steady:
        by_batch[batch_size].append(1e3 * seconds)
    return {
        "n_forwards": len(forwards),
        "first_ms": 1e3 * forwards[0][1],
        "ms": percentiles(milliseconds),
        "per_batch_size": {
            str(size): {"n_forwards": len(of_size)} | percentiles(of_size) for size, of_size in sorted(by_batch.items())
        },
        "histogram": {"edges_ms": edges.tolist(), "counts": counts.tolist()},
    }


def short(env_id: str) -> str:
    """The id without its module: "vla/PickUp-v0" for "envs:vla/PickUp-v0"."""
    return env_id.rpartition(":")[2]


def task_group(env_id: str) -> str:
    """The namespace of an environment id: "vla" for "envs:vla/PickUp-v0"."""
    return short(env_id).rpartition("/")[0] or "gymnasium"


def write(info: Mapping[str, Any], folder: Path) -> Path:
    """Write `eval_info.json` atomically."""
    return RunFolder(folder).write_json(FILE, info)


def finished(folder: Path) -> dict[str, Any] | None:
    """The results in `folder`; None if there are none or the rollout was interrupted."""
    return read(folder) if RunFolder(folder).is_finished(FILE) else None


def read(run: str | Path) -> dict[str, Any]:
    """The results in a report folder or an `eval_info.json`. DataError if there are none."""
    path = Path(run) / FILE if Path(run).is_dir() else Path(run)
    try:
        info = json.loads(path.read_text())
        info["per_episode"][0]["env_id"], info["overall"]["pc_success"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise DataError(f"{run} has no results of `vla rollout`: {FILE} is missing, unreadable or empty.") from None
    return info


def _metrics(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    return {
        "sum_rewards": [episode.sum_reward for episode in episodes],
        "max_rewards": [episode.max_reward for episode in episodes],
        "successes": [episode.success for episode in episodes],
        "video_paths": [episode.video_path for episode in episodes if episode.video_path],
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
