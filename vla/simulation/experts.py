"""Experts that collect demonstrations in workers.

Owns: an attempt at an episode, from the reset to the recorded episode. Workers write finished episodes themselves, so
that frames are not sent between processes. It does not know which attempts make up a dataset, or when collecting stops.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from vla.data.writer import EpisodeRecorder
from vla.errors import SimulatorError
from vla.simulation import adapter as simulator
from vla.simulation.pool import EnvServer, check_shared

EXPERT_SEED = 1_000_000_000  # added to the seed, so that the expert's noise is independent of the scene layout
PATIENCE_S = 900.0  # timeout per episode


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at an episode of the dataset; `turn` counts the attempts."""

    episode: int
    turn: int
    env_id: str
    seed: int
    noise: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of an attempt that reached the end of its episode.

    Attributes:
        kind: "kept": the episode was written. "failed": the expert did not solve the task.
        message: the reason for "failed".
        frames, success: number of frames and success of a kept episode.
    """

    kind: Literal["kept", "failed"]
    message: str = ""
    frames: int = 0
    success: bool = False


@dataclasses.dataclass(frozen=True)
class Recording:
    """Options of the recording.

    Attributes:
        staging: absolute path of the staging folder.
        keep_all: also keep episodes in which the expert failed.
        executed_actions: record the executed actions in addition to the labels.
    """

    staging: Path
    keep_all: bool
    executed_actions: bool


class ExpertServer(EnvServer):
    """A worker that runs an environment's expert and records its episodes."""

    def attempt(self, tried: Attempt, recording: Recording) -> Outcome:
        """Run the expert for one episode, and write the episode if the expert succeeds or all episodes are kept."""
        check_shared(recording.staging)
        executed_actions = recording.executed_actions
        env = self._ready(tried.env_id)
        observation, info = env.reset(seed=tried.seed)
        expert = env.make_expert(noise=tried.noise, seed=EXPERT_SEED + tried.seed)
        instruction, success, over = info["instruction"], False, False
        with EpisodeRecorder(recording.staging, tried.episode, env.robot, executed_actions=executed_actions) as episode:
            while not over:
                executed, label = consult(expert, env.action_space)
                episode.record(observation, label, executed_action=executed if executed_actions else None)
                observation, _, terminated, truncated, info = env.step(executed)
                success = info["is_success"]
                episode.outcome(success)
                over = terminated or truncated
                if not over:
                    env.check_length(len(episode))
            if not (success or recording.keep_all):
                return Outcome("failed", f"not solved after {len(episode)} steps")
            frames = episode.finish(
                instruction=instruction, env_id=tried.env_id, seed=tried.seed, success=success, noise=tried.noise
            )
        return Outcome("kept", frames=frames, success=success)


def consult(expert: simulator.Expert, space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """The expert's action, and its clean action for the same state. Call it once per step: experts may have state."""
    executed = executable(expert.act(), space)
    return executed, executable(getattr(expert, "label", executed), space)


def executable(action: Any, space: spaces.Space) -> np.ndarray:
    """`action` clipped to the limits of `space`, float32 [D]."""
    assert isinstance(space, spaces.Box)
    action = np.asarray(action, np.float32)
    if action.shape != space.shape:
        raise SimulatorError(
            f"the expert's action has shape {list(action.shape)}, the environment expects {list(space.shape)}."
        )
    return simulator.within(action, space).astype(np.float32)
