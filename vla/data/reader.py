"""Reading demonstrations from a LeRobotDataset v3, as arrays and image iterators.

Owns: the validated contents of a dataset, independent of the recorder. It does not know how samples are drawn or used.
Cameras have short names: "front" for `observation.images.front`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vla.data import format as v3
from vla.data import tables
from vla.data.frames import FrameStore
from vla.errors import DataError, unknown
from vla.spec import RobotSpec

# Number of bytes hashed at each end of a file. They include the index of an mp4 and the footer of a parquet file.
_HASHED = 1 << 16


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
        index: episode index in the dataset.
        length: number of frames.
        start: row of the first frame in the arrays of `Demonstrations`.
        instructions: the different instructions of its frames (usually one), in order of appearance.
        env_id, seed, success, noise: how the episode was recorded; None if unknown.
    """

    index: int
    length: int
    start: int
    instructions: tuple[str, ...]
    env_id: str | None = None
    seed: int | None = None
    success: bool | None = None
    noise: float | None = None

    @property
    def instruction(self) -> str:
        return self.instructions[0]

    @property
    def rows(self) -> slice:
        """The episode's rows in the arrays of `Demonstrations`."""
        return slice(self.start, self.start + self.length)


class Demonstrations:
    """All episodes of a dataset, with N frames in total, action dimension D and state dimension S.

    Attributes:
        root: the dataset folder.
        info: `meta/info.json`.
        robot: the recorded robot.
        fps: frames per second.
        tasks: the instructions.
        episodes: the episodes, in the order of the arrays.
        actions: float32 [N, D], the actions to learn.
        executed_actions: float32 [N, D], the actions sent to the robot; None if they equal `actions`.
        states: float32 [N, S]; None without a state.
        task_index: int64 [N], index into `tasks`.
        steps: int64 [N], time of each frame, in frames since the start of its episode. It is the frame's index in the
            episode unless earlier frames were removed.
        timing: why the timestamps are unusable (images are then not looked up by time); "" if they are usable.
        renamed: episodes with different instructions in meta/episodes and meta/tasks.parquet.
        unlisted: number of frames of episodes that meta/episodes does not list; they are ignored.
    Raises:
        DataError: there is no dataset, its version is not supported, files are missing or damaged, or values cannot be
            used for training.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.info = v3.Info.load(self.root)
        self._rows = tables.read_episodes(self.root, self.info, self.info.video_keys)
        if hidden := FrameStore(self.root, self.info).hidden_depth(self._rows[0]):
            self.info = self.info.with_depth(hidden)
        self.robot: RobotSpec = self.info.describe_robot()
        self.fps = float(self.info.fps)
        self._store = FrameStore(self.root, self.info)
        for path in self._store.files(self._rows):
            if not path.is_file():
                raise DataError(f"{path} is missing. {tables.TRUNCATED}")

        paths = list(dict.fromkeys(map(self._store.data_path, self._rows)))
        wanted = {v3.ACTION: self.robot.action_names}
        if self.robot.state_dim:
            wanted[v3.STATE] = self.robot.state_names
        if v3.EXECUTED in self.info.features:
            wanted[v3.EXECUTED] = self.robot.action_names
        frames = tables.read_frames(self.root, paths, self._rows, wanted)
        self.actions: np.ndarray = frames.vectors[v3.ACTION]
        self.states: np.ndarray | None = frames.vectors.get(v3.STATE)
        self.executed_actions: np.ndarray | None = frames.vectors.get(v3.EXECUTED)
        self.unlisted = frames.unlisted
        try:
            self.steps, self.timing = tables.frame_steps(self._rows, frames.time, self.fps)
        except DataError as error:
            raise DataError(f"{self.root}: {error}") from None
        if self.timing and self.info.video_keys:
            raise DataError(
                f"{self.root}: {self.timing} Video frames are looked up by time. If no frames are missing, set "
                f'"{tables.TIME}" to frame_index / fps.'
            )
        tasks = tables.read_tasks(self.root)
        self.tasks = list(tasks.values())
        self.task_index = np.searchsorted(list(tasks), frames.task).astype(np.int64)
        if len(bad := np.flatnonzero(~np.isin(frames.task, list(tasks)))):
            raise DataError(
                f"{self.root}: {tables.locate(self._rows, bad[0])} has task_index {frames.task[bad[0]]}, but "
                f"{v3.TASKS} has no instruction with that index ({len(tasks)} instructions). Copy the dataset again."
            )
        self.episodes = [self._episode(row, frames.success) for row in self._rows]
        self.renamed = tuple(
            episode.index
            for row, episode in zip(self._rows, self.episodes, strict=True)
            if isinstance(named := row.get("tasks"), list) and named and set(named) != set(episode.instructions)
        )
        self._starts = np.array([episode.start for episode in self.episodes])
        self._row_of = dict(zip((episode.index for episode in self.episodes), self._rows, strict=True))
        for row, episode in zip(self._rows, self.episodes, strict=True):
            self._store.check_span(row, self.steps[episode.rows])

    @property
    def num_frames(self) -> int:
        return len(self.actions)

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.robot.cameras

    def frames(self, episode: int, camera: str) -> Iterator[np.ndarray]:
        """All images of an episode in order, uint8 RGB [height, width, 3]. It is fastest to read episodes in order.

        Args:
            episode: the episode index.
            camera: the camera name.
        Raises:
            DataError: the episode or camera does not exist, or the video is damaged or too short.
        """
        if camera not in self.cameras:
            raise DataError(f"{self.root}: {unknown('camera', camera, self.cameras)}")
        row = self._row_of.get(episode)
        if row is None:
            last = self.episodes[-1].index
            raise DataError(
                f"{self.root} has no episode {episode}; its episodes are {self.episodes[0].index} to {last}."
            )
        yield from self._store.frames(row, camera, self.steps[row["start"] : row["start"] + row["length"]])

    def frame(self, index: int, camera: str) -> np.ndarray:
        """The image at row `index` of the arrays, as in `frames`. The camera must be stored as videos.

        Only the frames since the last key frame are decoded, and few videos are open at a time, so that random access
        needs little memory for any number of frames.
        """
        episode = self.episodes[int(np.searchsorted(self._starts, index, side="right")) - 1]
        row = self._row_of[episode.index]
        return self._store.frame(row, camera, self.steps[episode.rows], index - episode.start)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of states, actions, instructions and metadata, and of the size and ends of every file."""
        digest = hashlib.blake2b(digest_size=16)
        starts = np.array([row[f"videos/{key}/from_timestamp"] for row in self._rows for key in self.info.video_keys])
        for array in (self.actions, self.executed_actions, self.states, self.task_index, self.steps, starts):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).data)
        digest.update(repr((self.tasks, self.episodes, self.robot, sorted(self.info.features.items()))).encode())
        for path in self._store.files(self._rows):
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{path.relative_to(self.root)} {size}".encode())
                digest.update(file.read(_HASHED))
                file.seek(max(size - _HASHED, 0))
                digest.update(file.read(_HASHED))
        return digest.hexdigest()

    def _episode(self, row: tables.Row, success: np.ndarray | None) -> Episode:
        length, start = row["length"], row["start"]
        tasks = dict.fromkeys(self.task_index[start : start + length].tolist())
        solved = row.get("success") if "success" in row or success is None else success[start + length - 1]
        return Episode(
            index=row["episode_index"],
            length=length,
            start=start,
            instructions=tuple(self.tasks[task] for task in tasks),
            env_id=row.get("env_id"),
            seed=row.get("seed"),
            success=_flag(solved),
            noise=row.get("noise"),
        )


def _flag(value: object) -> bool | None:
    """A recorded flag as a bool; None if it is not a bool, 0 or 1."""
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
