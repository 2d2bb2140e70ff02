"""LIBERO's tasks as Gymnasium environments with the interface of `envs`, e.g. `vla-libero/object-0`.

Owns the registration. A task has the id `vla-libero/<suite>-<number>`; tasks of LIBERO's own five suites also have the
id `vla-libero/<task name>`. LIBERO is imported when the first environment is created.
"""

from __future__ import annotations

import gymnasium as gym

from envs.libero.names import NAMES
from envs.libero.suites import SIZES, ids, max_steps

LIBERO_IDS: tuple[str, ...] = tuple(env_id for suite in SIZES for env_id in ids(suite))


def register_all() -> None:
    """Register every task, without importing LIBERO; repeated calls have no effect."""
    for suite, size in SIZES.items():
        for number in range(size):
            for name in (f"{suite}-{number}", *NAMES.get(suite, ())[number : number + 1]):
                if f"vla-libero/{name}" not in gym.registry:
                    gym.register(
                        f"vla-libero/{name}",
                        entry_point="envs.libero.environment:LiberoEnv",
                        max_episode_steps=max_steps(suite),
                        kwargs={"suite": suite, "task": number},
                    )
