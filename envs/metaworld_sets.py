"""Meta-World as a benchmark: task sets, tiers, protocol and published results, as plain data.

Owns these data. Does not import Meta-World.

`mt50` contains all tasks. `mt10` and the two `ml45` sets are defined by Meta-World (Yu et al., 2019, arXiv:1910.10897).
The four tiers `mt50/...` group tasks by their difficulty for visual policies (Seo et al., "Masked World Models for
Visual Control", 2022, appendix). TinyVLA, SmolVLA, LeRobot and papers that compare with them use the same 28, 11, 6 and
5 tasks, 10 episodes per task, and at most 400 or 500 steps.
"""

from __future__ import annotations

from typing import Any

from envs.metaworld_instructions import TASKS


def _ids(tasks: str) -> tuple[str, ...]:
    return tuple(f"vla-metaworld/{task}-v3" for task in tasks.split())


_ALL = tuple(f"vla-metaworld/{task}" for task in TASKS)
_ML45_TEST = _ids("bin-picking box-close door-lock door-unlock hand-insert")

SETS: dict[str, tuple[str, ...]] = {
    "mt50": _ALL,
    "mt50/easy": _ids(
        "button-press button-press-topdown button-press-topdown-wall button-press-wall coffee-button dial-turn "
        "door-close door-lock door-open door-unlock drawer-close drawer-open faucet-close faucet-open handle-press "
        "handle-press-side handle-pull handle-pull-side lever-pull peg-unplug-side plate-slide plate-slide-back "
        "plate-slide-back-side plate-slide-side reach reach-wall window-close window-open"
    ),
    "mt50/medium": _ids(
        "basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep "
        "sweep-into"
    ),
    "mt50/hard": _ids("assembly hand-insert pick-out-of-hole pick-place push push-back"),
    "mt50/very_hard": _ids("disassemble pick-place-wall shelf-place stick-pull stick-push"),
    "mt10": _ids(
        "reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open "
        "window-close"
    ),
    "ml45-train": tuple(env_id for env_id in _ALL if env_id not in _ML45_TEST),
    "ml45-test": _ML45_TEST,
}


def _published(
    policy: str, average: float, source: str, tiers: tuple[float, ...] | None = None, note: str = ""
) -> dict[str, Any]:
    return {"policy": policy, "average": average, "source": source, "tiers": tiers, "note": note}


_SMOLVLA = "arXiv:2506.01844"  # its table of Meta-World results includes earlier policies

SUITE: dict[str, Any] = {
    "name": "metaworld",
    "title": "Meta-World",
    "sets": SETS,
    "whole": "mt50",
    "tiers": ("mt50/easy", "mt50/medium", "mt50/hard", "mt50/very_hard"),
    "episodes": 10,
    # Success in percent: the mean over the tiers, and the success per tier if it is published.
    "published": (
        _published("Diffusion Policy", 10.5, _SMOLVLA, (23.1, 10.7, 1.9, 6.1)),
        _published("TinyVLA-H 1.3B", 31.6, _SMOLVLA, (77.6, 21.5, 11.4, 15.8)),
        _published("pi0", 47.9, _SMOLVLA, (71.8, 48.2, 41.7, 30.0)),
        _published("SmolVLA 0.45B", 57.3, _SMOLVLA),
        _published("SmolVLA 2.25B", 68.2, _SMOLVLA, (87.1, 51.8, 70.0, 64.0)),
        _published(
            "pi0 + PPO", 78.1, "arXiv:2510.25889", (92.1, 74.6, 61.7, 84.0), "reinforcement learning in the simulator"
        ),
        _published("ProgVLA 0.1B", 78.5, "arXiv:2605.28231", (84.9, 72.7, 77.0, 79.6)),
        _published("Evo-1 0.77B", 80.6, "arXiv:2511.04555", (89.2, 76.8, 77.2, 79.2), "observes the object's position"),
        _published("ALAM + pi0", 85.0, "arXiv:2605.10819"),
        _published("FabriVLA 0.89B", 90.0, "arXiv:2607.08575"),
    ),
}
