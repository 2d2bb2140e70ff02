"""Recording demonstrations.

Owns: converting observations and actions to staged episodes. Each finished episode is a folder in the staging folder:

    .partial/episode-000012/episode.json     instruction, environment, seed, success, robot, image histograms
    .partial/episode-000012/frames.parquet   states, actions, success per frame
    .partial/episode-000012/<camera>.mp4

The folder gets this name when the episode is complete, so that finished episodes survive a killed process, and
unfinished ones are never read. `finalise` (see `packing`) packs the episodes into a LeRobotDataset v3. Several
processes may record in parallel. It does not know the dataset format, or the source of the episodes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data.format import ACTION, EXECUTED, STATE, SUCCESS, write_json
from vla.data.packing import finalise, vector_column
from vla.data.staging import EPISODE, finished, guard_disk, open_staging
from vla.data.stats import histogram
from vla.data.video import VideoWriter
from vla.errors import DataError, SpecError
from vla.spec import Observation, RobotSpec

_COUNT_EVERY = 8  # image statistics use every eighth frame of an episode, from the first on


class DemonstrationWriter:
    """Records episodes into the folder `root`. Leaving the context without an error packs them into a dataset.

    After an error or a killed process, the finished episodes stay in `root`; continue with `resume=True`.

    >>> with DemonstrationWriter("datasets/mine", robot) as writer:                        # doctest: +SKIP
    ...     with writer.episode() as episode:
    ...         episode.record(observation, action)
    ...         episode.finish(instruction="pick up the red cube", success=True)

    Args:
        root: the dataset folder.
        robot: the recorded robot.
        executed_actions: store the executed action with every frame, in addition to the action to learn.
        resume: continue an unfinished recording.
    Raises:
        DataError: `root` contains unrelated files, a finished dataset or, without `resume`, an unfinished recording.
    """

    def __init__(
        self, root: str | Path, robot: RobotSpec, *, executed_actions: bool = False, resume: bool = False
    ) -> None:
        self.root, self.robot, self.executed_actions = Path(root), robot, executed_actions
        self.staging = open_staging(self.root, resume)

    def __enter__(self) -> DemonstrationWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            finalise(self.root)

    @property
    def finished(self) -> list[int]:
        """Numbers of the finished episodes."""
        return finished(self.staging)

    def episode(self, number: int | None = None) -> EpisodeRecorder:
        """A recorder for the episode `number`; None: the next number."""
        if number is None:
            number = max(self.finished, default=-1) + 1
        return EpisodeRecorder(self.staging, number, self.robot, executed_actions=self.executed_actions)

    def add_episode(
        self,
        observations: Iterable[Observation],
        actions: np.ndarray,
        instruction: str,
        *,
        executed_actions: np.ndarray | None = None,
        env_id: str | None = None,
        seed: int | None = None,
        success: bool | None = None,
        noise: float = 0.0,
    ) -> None:
        """Record a whole episode: one observation per row of `actions` [T, D], each taken before its action."""
        with self.episode() as episode:
            executed = actions if executed_actions is None else executed_actions
            for observation, action, sent in zip(observations, actions, executed, strict=True):
                episode.record(observation, action, executed_action=sent if self.executed_actions else None)
            episode.finish(instruction=instruction, env_id=env_id, seed=seed, success=success, noise=noise)


class EpisodeRecorder:
    """Records one episode. Leaving its context without `finish` discards the episode.

    Raises (all methods):
        SpecError: an observation or action does not fit the robot.
        DataError: the image size of a camera changes, or the disk is full.
    """

    def __init__(self, staging: Path, number: int, robot: RobotSpec, *, executed_actions: bool = False) -> None:
        self.robot, self.executed_actions = robot, executed_actions
        self._place = staging / EPISODE.format(number)
        self._folder = staging / f".{self._place.name}-{os.getpid()}"
        self._videos: dict[str, VideoWriter] = {}
        self._counts = {camera: np.zeros((3, 256), np.int64) for camera in robot.cameras}
        self._states: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []
        self._executed: list[np.ndarray] = []
        self._success: list[bool] = []

    def __enter__(self) -> EpisodeRecorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def __len__(self) -> int:
        return len(self._actions)

    def record(
        self, observation: Observation, action: np.ndarray, *, executed_action: np.ndarray | None = None
    ) -> None:
        """Append a frame. Call it before executing the action, because an environment may reuse the observation's
        arrays.

        Args:
            observation: the observation before the action.
            action: the action to learn [D].
            executed_action: the action sent to the robot [D]; required if the recording stores executed actions.
        """
        self.robot.check_observation(observation)
        self.robot.check_action(action)
        if self.executed_actions != (executed_action is not None):
            raise SpecError(
                "`executed_action` is required for every frame if `executed_actions` is set, and not allowed otherwise."
            )
        if executed_action is not None:
            self.robot.check_action(executed_action)
            self._executed.append(np.asarray(executed_action, np.float32))
        with guard_disk(self._place):
            for camera in self.robot.cameras:
                image = np.asarray(observation["pixels"][camera])
                self._video(camera, image).add(image)
                if len(self) % _COUNT_EVERY == 0:
                    self._counts[camera] += histogram(image)
        if self.robot.state_dim:
            self._states.append(np.array(observation["agent_pos"], np.float32))
        self._actions.append(np.array(action, np.float32))
        self._success.append(False)

    def outcome(self, success: bool) -> None:
        """Set whether the task is solved after the last recorded action."""
        self._success[-1] = bool(success)

    def finish(
        self,
        *,
        instruction: str,
        env_id: str | None = None,
        seed: int | None = None,
        success: bool | None = None,
        noise: float = 0.0,
    ) -> int:
        """Complete the episode and return its length.

        Args:
            instruction: the task instruction.
            env_id: id of the environment, if any.
            seed: seed of the episode, if any.
            success: whether the episode solved its task; None if unknown.
            noise: strength of the expert's action noise.
        """
        if not self._actions:
            raise DataError("an episode needs at least one frame; call `record` first.")
        if not instruction.strip():
            raise DataError("an episode needs an instruction, got an empty one.")
        columns = {ACTION: vector_column(np.stack(self._actions)), SUCCESS: pa.array(self._success)}
        if self._states:
            columns[STATE] = vector_column(np.stack(self._states))
        if self.executed_actions:
            columns[EXECUTED] = vector_column(np.stack(self._executed))
        about: dict[str, Any] = {
            "length": len(self),
            "instruction": instruction,
            "env_id": env_id,
            "seed": seed,
            "success": success,
            "noise": float(noise),
            "robot": self.robot.to_dict(),
            "image_shapes": {camera: list(video.shape[:2]) for camera, video in self._videos.items()},
            "counted_frames": -(-len(self) // _COUNT_EVERY),
            "histograms": {camera: counts.tolist() for camera, counts in self._counts.items()},
        }
        with guard_disk(self._place):
            with contextlib.suppress(FileNotFoundError):  # the check below reports missing files
                for video in self._videos.values():
                    video.close()
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), self._folder / "frames.parquet")
            write_json(self._folder / "episode.json", about)
            for camera in self._videos:
                if not (self._folder / f"{camera}.mp4").is_file():
                    raise DataError(
                        f"{self._folder} was removed during the recording: another process has resumed it. This "
                        "episode is not stored."
                    )
            try:
                self._folder.rename(self._place)
            except OSError:
                if not self._place.exists():
                    raise
                shutil.rmtree(self._folder)  # this episode was already finished, possibly by another process
        return len(self)

    def discard(self) -> None:
        """Remove the recorded frames unless the episode was finished."""
        for video in self._videos.values():
            with contextlib.suppress(Exception):  # the frames are discarded in any case
                video.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _video(self, camera: str, image: np.ndarray) -> VideoWriter:
        if camera not in self._videos:
            if "/" in camera:
                raise SpecError(f"camera {camera!r}: a dataset's camera names cannot contain '/'.")
            self._folder.mkdir(parents=True, exist_ok=True)
            height, width = image.shape[:2]
            self._videos[camera] = VideoWriter(self._folder / f"{camera}.mp4", height, width, self.robot.control_hz)
        return self._videos[camera]
