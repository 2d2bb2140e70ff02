"""Sets of Meta-World tasks on which benchmark results are reported.

Owns the names of the sets and their environment ids. Does not import Meta-World.

`mt50` has all tasks; `mt10` and the two `ml45` sets are Meta-World's own (Yu et al., 2019). The four tiers `mt50/...`
rank tasks by their difficulty for visual policies: Seo et al., "Masked World Models for Visual Control" (2022),
appendix. TinyVLA, SmolVLA and LeRobot, and the papers that compare with them, use the same 28, 11, 6 and 5 tasks.
"""

from __future__ import annotations

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
