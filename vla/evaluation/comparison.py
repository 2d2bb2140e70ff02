"""Comparison of two runs: which policy is better, and whether the difference is significant.

Owns: pairing the episodes of two runs, and the difference of success rates with its interval, an exact test and a
verdict in words. It does not know how episodes are run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vla.errors import DataError
from vla.evaluation.results import read, short
from vla.support.statistics import difference, fisher, mcnemar, paired_difference

Key = tuple[str, int]  # (environment id without the module prefix, seed)


def compare(run_a: Mapping[str, Any] | str | Path, run_b: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Compare the success rates of runs A and B, with the interval of their difference and an exact test.

    If the runs have episodes with the same environment and seed, only these are compared, in pairs (exact McNemar
    test). Otherwise, the episodes of common environments are compared as independent samples (Fisher's exact test).
    Rates are in percent, differences A - B in percentage points.

    Raises:
        DataError: a run has no results, or the runs have no environment in common.
    """
    info_a, info_b = (dict(run) if isinstance(run, Mapping) else read(run) for run in (run_a, run_b))
    a, b = ({_key(episode): episode for episode in info["per_episode"]} for info in (info_a, info_b))
    common = common_environments([env_id for env_id, _ in a], [env_id for env_id, _ in b])
    shared = a.keys() & b.keys()
    paired = bool(shared)

    def kept(run: Mapping[Key, Any]) -> dict[Key, Any]:
        return {key: run[key] for key in run if (key in shared if paired else key[0] in common)}

    a, b = kept(a), kept(b)
    name_a, name_b = _names(info_a, info_b)
    whole = _contrast(a, b, paired)
    left_out = len(info_a["per_episode"]) + len(info_b["per_episode"]) - len(a) - len(b)
    return {
        "name_a": name_a,
        "name_b": name_b,
        "paired": paired,
        "n_left_out": left_out,
        **whole,
        "per_task": [
            {"env_id": env_id} | _contrast(_of(env_id, a), _of(env_id, b), paired)
            for env_id in common
            if _of(env_id, a) and _of(env_id, b)
        ],
        "n_different_images": sum(a[k].get("image_hash") != b[k].get("image_hash") for k in a if k in b),
        "words": _words(name_a, name_b, whole, paired),
    }


def common_environments(a: Iterable[str], b: Iterable[str]) -> list[str]:
    """The environment ids, without modules, that two runs have in common. DataError if there are none."""
    of_b = {short(env_id) for env_id in b}
    common = [env_id for env_id in dict.fromkeys(map(short, a)) if env_id in of_b]
    if not common:
        raise DataError("the two runs cannot be compared, because they have no environment in common.")
    return common


def _of(env_id: str, episodes: Mapping[Key, Any]) -> dict[Key, Any]:
    return {key: episode for key, episode in episodes.items() if key[0] == env_id}


def _contrast(a: Mapping[Key, Any], b: Mapping[Key, Any], paired: bool) -> dict[str, Any]:
    wins_a, wins_b = ({key for key, episode in run.items() if episode["success"]} for run in (a, b))
    counts: dict[str, Any] = {"n_a": len(a), "n_b": len(b), "n_successes_a": len(wins_a), "n_successes_b": len(wins_b)}
    if paired:
        only_a, only_b, both = len(wins_a - wins_b), len(wins_b - wins_a), len(wins_a & wins_b)
        interval = paired_difference(both, only_a, only_b, len(a) - both - only_a - only_b)
        counts |= {"only_a": only_a, "only_b": only_b, "test": "exact McNemar", "p_value": mcnemar(only_a, only_b)}
    else:
        sides = (len(wins_a), len(a), len(wins_b), len(b))
        interval = difference(*sides)
        counts |= {"test": "Fisher's exact", "p_value": fisher(*sides)}
    rate_a, rate_b = 100 * len(wins_a) / len(a), 100 * len(wins_b) / len(b)
    counts |= {"pc_success_a": rate_a, "pc_success_b": rate_b, "difference": rate_a - rate_b}
    return counts | {"difference_ci95": [100 * limit for limit in interval]}


def _words(name_a: str, name_b: str, found: Mapping[str, Any], paired: bool) -> str:
    low, high = found["difference_ci95"]
    share = f"{name_a} succeeded in {found['n_successes_a']} of {found['n_a']} episodes, "
    if paired:
        share += f"{name_b} in {found['n_successes_b']} of the same {found['n_b']}: "
    else:
        share += f"{name_b} in {found['n_successes_b']} of {found['n_b']} other episodes: "
    gap = f"a difference of {found['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}). "
    if paired:
        gap += f"{found['only_a']} episodes succeeded only with {name_a}, {found['only_b']} only with {name_b}. "
    if found["p_value"] >= 0.05:
        verdict = "The difference is not significant"
    else:
        verdict = f"{name_a if found['difference'] > 0 else name_b} is better"
    return f"{share}{gap}{verdict} ({found['test']} test, p = {found['p_value']:.2g})."


def _names(info_a: Mapping[str, Any], info_b: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the two runs: the policies, or the report folders if the policy is the same."""
    for part, key in (("policy", "path"), ("config", "out")):
        names = [info.get(part, {}).get(key) for info in (info_a, info_b)]
        if all(names) and names[0] != names[1]:
            return str(names[0]), str(names[1])
    return "A", "B"


def _key(episode: Mapping[str, Any]) -> Key:
    return short(episode["env_id"]), episode["seed"]
