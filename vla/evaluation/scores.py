"""Benchmark scores: success per tier, over tiers and over episodes.

Owns: the averages and their intervals. It does not know how episodes are run or how a report looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vla.evaluation import results
from vla.evaluation.suites import Suite
from vla.support.statistics import mean_interval

Counts = tuple[int, int]  # successes, episodes


def score(counts: Mapping[str, Counts], suite: Suite) -> dict[str, Any]:
    """Success rates in percent, with 95 % intervals.

    Args:
        counts: environment id -> (successes, episodes).
    Returns:
        A dict with
        tiers: success of each tier, over all episodes of its tasks.
        variants: the same for each variant with results.
        tier_average: unweighted mean over the tiers ("Avg" in papers); None while results of a task are missing.
        episode_average: success over all episodes.
    """
    tiers = {name: (members, _pool(counts, members)) for name, members in suite.tier_sets.items()}
    average = None
    if all(env_id in counts for members, _ in tiers.values() for env_id in members):
        pooled = [count for _, count in tiers.values()]
        limits = mean_interval(pooled)
        rate = sum(successes / episodes for successes, episodes in pooled) / len(pooled)
        average = {"pc_success": 100 * rate, "pc_success_ci95": [100 * limit for limit in limits]}
    return {
        "tiers": {
            name: {"n_tasks": sum(m in counts for m in members), "n_tasks_of": len(members)} | results.rate(*count)
            for name, (members, count) in tiers.items()
        },
        "variants": {
            variant: {
                name: results.rate(*_pool(counts, suite.sets[members]))
                for name, members in zip(tiers, sets, strict=True)
            }
            for variant, sets in suite.variants.items()
            if any(env_id in counts for members in sets for env_id in suite.sets[members])
        },
        "tier_average": average,
        "episode_average": {"n_tasks": len(counts), "n_tasks_of": len(suite.tasks)}
        | results.rate(*_pool(counts, counts)),
    }


def _pool(counts: Mapping[str, Counts], members: Iterable[str]) -> Counts:
    """Total successes and episodes of the `members` with results."""
    finished = [counts[env_id] for env_id in members if env_id in counts]
    return sum(successes for successes, _ in finished), sum(episodes for _, episodes in finished)
