"""List of the tasks, and their registration with Gymnasium.

Owns ids and episode lengths. Each task is defined in its own file in this folder.
"""

from __future__ import annotations

import gymnasium as gym

#: Class name -> (module, max_episode_steps). The limit is about 3.5 times the mean episode length of the expert, so
#: that the noisy expert nearly always has time to recover.
_TASKS: dict[str, tuple[str, int]] = {
    "Reach": ("reach", 40),
    "Push": ("push", 90),
    "PickUp": ("pick_up", 70),
    "PickPlace": ("pick_place", 130),
    "Stack": ("stack", 120),
    "PressButton": ("press_button", 50),
    "OpenDrawer": ("open_drawer", 80),
    "CloseDrawer": ("close_drawer", 70),
}
#: Questions about the image instead of robot tasks, for language grounding. An episode is one step.
_QUESTIONS: dict[str, tuple[str, int]] = {
    name: ("point", 1) for name in ("Point", "PointZone", "PointButton", "PointDrawer")
}
#: A task with two equally good ways to solve it.
_AMBIGUOUS: dict[str, tuple[str, int]] = {"PickEither": ("pick_either", 70)}
ENV_IDS: tuple[str, ...] = tuple(f"vla/{name}-v0" for name in _TASKS)


def register_all() -> None:
    """Register every task as `vla/<Task>-v0`; repeated calls have no effect."""
    for name, (module, steps) in (_TASKS | _QUESTIONS | _AMBIGUOUS).items():
        env_id = f"vla/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=f"envs.tasks.{module}:{name}", max_episode_steps=steps)
