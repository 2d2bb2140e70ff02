"""Questions about Meta-World's scenes: where is the hand, the object, or the goal?

`vla-metaworld-where/<task>` has the scenes and observations of `vla-metaworld/<task>`. An episode is one step, and its
action is the answer. In a demonstration, only the first images are needed to find the goal, so 50 demonstrations are
50 examples of goals. Questions provide thousands, for training only: the answers come from the simulator's state, but a
policy that is trained on them needs no additional input.

Owns the phrasing of the questions and the encoding of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from envs.errors import check_action, check_choice
from envs.metaworld import ACTION_NAMES, MetaWorldEnv, MetaWorldExpert
from envs.metaworld_instructions import TASKS

QUESTION_IDS: tuple[str, ...] = tuple(f"vla-metaworld-where/{task}" for task in TASKS)
CENTER = np.array([0.0, 0.65, 0.17])  # of the workspace in metres; an answer of 0
REACH = 0.35  # metres per action unit
_NEAR = 0.025  # metres
# Dimensions of Meta-World's observation vector.
_PLACES = {"hand": slice(0, 3), "object": slice(4, 7), "goal": slice(-3, None)}


def register_all() -> None:
    """Register a question environment for every task; repeated calls have no effect."""
    for env_id, task in zip(QUESTION_IDS, TASKS, strict=True):
        if env_id not in gym.registry:
            entry = "envs.metaworld_questions:MetaWorldQuestion"
            gym.register(env_id, entry_point=entry, max_episode_steps=1, kwargs={"task": task})


class MetaWorldQuestion(MetaWorldEnv):
    """A question about a scene of a Meta-World task.

    The seed determines the scene and the topic of the question: the hand, the object or the goal of the task. The
    answer is an action [4]: a position relative to the centre of the workspace, where 1 is 0.35 m, and an open gripper.
    Success: the answer is within 2.5 cm.

    Args:
        topics: topics to choose from.
        kwargs: those of `MetaWorldEnv`.
    """

    _topic = ""  # before the first reset

    def __init__(self, task: str, topics: Sequence[str] = tuple(_PLACES), **kwargs: Any) -> None:
        self.topics = (topics,) if isinstance(topics, str) else tuple(topics)
        for topic in self.topics or ("",):
            check_choice("topics", topic, _PLACES)
        super().__init__(task, **kwargs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Create a scene and ask a question about it."""
        observation, _ = super().reset(seed=seed, options=options)
        self._topic = str(self.np_random.choice(self.topics))
        self.task_description = f"where is the {self._topic} to {self.task_description}"
        return observation, self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Evaluate the answer, an action [4]. Only its first three dimensions are used; nothing moves."""
        answer = CENTER + REACH * check_action(action, ACTION_NAMES)[:3]
        if not self._topic:
            raise RuntimeError("step() was called before reset(): call reset() first.")
        success = bool(np.linalg.norm(answer - self._place()) < _NEAR)
        return self._observe(), float(success), success, False, self._info(success)

    def make_expert(self, noise: float = 0.0, seed: int | None = None) -> MetaWorldExpert:
        """Knows the answer."""
        return MetaWorldExpert(lambda: np.append((self._place() - CENTER) / REACH, -1.0), noise, seed)

    def _place(self) -> np.ndarray:
        return self._raw[_PLACES[self._topic]]
