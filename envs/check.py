"""`python -m envs.check --seeds 50`: measure success rate and episode length of the experts, and simulation speed.

Runs all tabletop environments, or the environments of `--env`, which may be ids of Meta-World and LIBERO (`--env
vla-metaworld/drawer-open-v3`) or task sets (`--env mt50`, `--env libero/object`).

Owns the measurement and its table. Uses only the public interface of the environments.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from envs import ENV_IDS, LIBERO_IDS, METAWORLD_IDS
from envs.libero import suites
from envs.metaworld_sets import SETS as METAWORLD_SETS

SETS = METAWORLD_SETS | {f"libero/{suite}": suites.ids(suite) for suite in suites.SIZES}
WIDTH = max(map(len, ENV_IDS + METAWORLD_IDS)) + 1


@dataclass(frozen=True)
class Report:
    """Result of running the expert of `env_id` once per seed."""

    env_id: str
    successes: int
    lengths: tuple[int, ...]  # of all episodes
    failed_seeds: tuple[int, ...]
    steps_per_second: float  # physics, expert and bookkeeping, without rendering

    def row(self) -> str:
        """One line of the table."""
        p50, p90 = np.percentile(self.lengths, (50, 90))
        failed = f"  failed seeds {list(self.failed_seeds)}" if self.failed_seeds else ""
        return (
            f"{self.env_id:<{WIDTH}}{self.successes:>4}/{len(self.lengths):<4}{np.mean(self.lengths):>7.1f}{p50:>6.0f}"
            f"{p90:>6.0f}{max(self.lengths):>6d}{self.steps_per_second:>9.0f}"
        ) + failed


def run_expert(env_id: str, seeds: range, noise: float = 0.0, **kwargs: Any) -> Report:
    """Run the expert once per seed, without rendering unless `cameras` is passed."""
    env = gym.make(env_id, **{"cameras": (), **kwargs})
    make_expert = env.get_wrapper_attr("make_expert")
    lengths, failed = [], []
    start = time.perf_counter()
    for seed in seeds:
        _, info = env.reset(seed=seed)
        expert = make_expert(noise=noise, seed=seed)
        steps, over = 0, False
        while not over:
            _, _, terminated, truncated, info = env.step(expert.act())
            steps, over = steps + 1, terminated or truncated
        lengths.append(steps)
        if not info["is_success"]:
            failed.append(seed)
    rate = sum(lengths) / (time.perf_counter() - start)
    env.close()
    return Report(env_id, len(lengths) - len(failed), tuple(lengths), tuple(failed), rate)


def rendering_rate(env_id: str, steps: int = 150, **kwargs: Any) -> float:
    """Environment steps per second with the expert and all cameras rendered."""
    env = gym.make(env_id, **kwargs)
    env.reset(seed=0)
    expert = env.get_wrapper_attr("make_expert")()
    start, seed = time.perf_counter(), 0
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(expert.act())
        if terminated or truncated:
            seed += 1
            env.reset(seed=seed)
    rate = steps / (time.perf_counter() - start)
    env.close()
    return rate


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(prog="python -m envs.check", description=__doc__)
    parser.add_argument("--seeds", type=int, default=50, help="episodes per task (default 50)")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--noise", type=float, default=0.0, help="strength of the expert's noise, 0 to 1 (default 0)")
    parser.add_argument(
        "--env",
        action="append",
        choices=[*ENV_IDS, *METAWORLD_IDS, *LIBERO_IDS, *SETS],
        metavar="ID",
        help="environment id or task set; may be repeated",
    )
    parser.add_argument("--pairs", default="train", help="colour-shape pairs: train, heldout or all (default train)")
    parser.add_argument("--objects", type=int, default=3, help="number of target candidates, 2 to 4 (default 3)")
    parser.add_argument("--no-rendering", action="store_true", help="do not measure the speed with cameras")
    flags = parser.parse_args()
    seeds = range(flags.first_seed, flags.first_seed + flags.seeds)
    print(f"{'task':<{WIDTH}}{'success':>8} {'mean':>7}{'p50':>6}{'p90':>6}{'max':>6}{'steps/s':>9}{'':2}with images")
    reports = []
    for env_id in [env_id for name in flags.env or ENV_IDS for env_id in SETS.get(name, [name])]:
        options = {"pairs": flags.pairs, "objects": flags.objects} if env_id in ENV_IDS else {}
        report = run_expert(env_id, seeds, flags.noise, **options)
        rendering = "" if flags.no_rendering else f"  {rendering_rate(env_id, **options):.0f}"
        print(report.row() + rendering, flush=True)
        reports.append(report)
    successes, episodes = sum(report.successes for report in reports), len(reports) * len(seeds)
    low, high = wilson(successes, episodes)
    print(f"{successes} of {episodes} episodes (95 % interval {low:.1%} to {high:.1%})")


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    rate, scale = successes / trials, 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z / scale * np.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return float(centre - half), float(centre + half)


if __name__ == "__main__":
    main()
