"""A Gymnasium environment as a benchmark of vla-eval: `benchmark: "gym_benchmark:GymBenchmark"`.

Runs in the Python environment of vla-eval with this folder on its path, and does not import `vla`. Episode k has the
seed `seed` + k. With `record`, the observations and actions of episode k are written to <record>/<k>.npz.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
from vla_eval import specs
from vla_eval.benchmarks.base import StepBenchmark, StepResult


class GymBenchmark(StepBenchmark):
    """A benchmark with one task, the environment `env`, e.g. "envs:vla/PickUp-v0"."""

    def __init__(self, env: str, seed: int = 0, record: str | None = None) -> None:
        super().__init__()
        self._env, self._seed, self._record = gym.make(env), seed, record
        self._instruction, self._played = "", []

    def get_tasks(self):
        return [{"name": self._env.spec.id, "suite": "gymnasium"}]

    def reset(self, task):
        observation, info = self._env.reset(seed=self._seed + task["episode_idx"])
        self._instruction, self._played = info["instruction"], []
        return observation

    def step(self, action):
        self._played.append((self._last_result.obs, action["actions"]))
        observation, reward, terminated, truncated, info = self._env.step(np.asarray(action["actions"], np.float32))
        return StepResult(observation, float(reward), terminated or truncated, info)

    def make_obs(self, raw_obs, task):
        return {
            "images": dict(raw_obs["pixels"]),
            "states": raw_obs["agent_pos"],
            "task_description": self._instruction,
        }

    def get_step_result(self, step_result):
        if self._record is not None:
            observations, actions = zip(*self._played, strict=True)
            kept = {camera: [seen["pixels"][camera] for seen in observations] for camera in observations[0]["pixels"]}
            kept |= {"agent_pos": [seen["agent_pos"] for seen in observations], "actions": actions}
            np.savez(Path(self._record, f"{self._task['episode_idx']}.npz"), instruction=self._instruction, **kept)
        return {"success": bool(step_result.info["is_success"])}

    def get_metadata(self):
        return {"max_steps": self._env.spec.max_episode_steps}

    def get_action_spec(self):
        return {
            "position": specs.POSITION_DELTA,
            "rotation": specs.ROTATION_EULER,
            "gripper": specs.GRIPPER_CLOSE_NEG,
        }

    def get_observation_spec(self):
        cameras = self._env.observation_space["pixels"]
        return {**dict.fromkeys(cameras, specs.IMAGE_RGB), "state": specs.RAW, "language": specs.LANGUAGE}

    def cleanup(self):
        self._env.close()
