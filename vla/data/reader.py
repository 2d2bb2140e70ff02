"""Demonstrations read from a LeRobotDataset v3: checked once, then plain arrays and frames in order.

Owns: what the rest of the package sees of a dataset, whoever recorded it. It does not know how samples are drawn or
what a policy makes of them. Cameras go by their short name: "front" for `observation.images.front`.
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

# Of a large file these bytes at either end are hashed; an mp4's index and a parquet's footer are among them.
_HASHED = 1 << 16


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
        index: its number in the dataset.
        length: frames.
        start: its first frame's row in the arrays of `Demonstrations`.
        instructions: the instructions of its frames, in order of appearance (usually one).
        env_id, seed, success, noise: how it was made; None where the recorder did not say.
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
        """Its frames, as rows of the arrays of `Demonstrations`."""
        return slice(self.start, self.start + self.length)


class Demonstrations:
    """All episodes of a dataset. N frames, D action entries, S state entries.

    Attributes:
        root, info, robot: folder, `meta/info.json`, and whom it was recorded with.
        fps: frames per second.
        tasks: instruction of each task index.
        episodes: in the order of the arrays.
        actions: float32 [N, D]; the actions to learn.
        executed_actions: float32 [N, D], what was sent to the robot; None where that is `actions`.
        states: float32 [N, S], or None.
        task_index: int64 [N].
    Raises:
        DataError: no dataset, another version, missing or damaged files, values that cannot be trained on.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.info = v3.Info.load(self.root)
        self.robot: RobotSpec = self.info.describe_robot()
        self.fps = float(self.info.fps)
        self.tasks = tables.read_tasks(self.root)
        self._store = FrameStore(self.root, self.info)
        self._rows = tables.read_episodes(self.root, self.info, self._store.video_keys)
        for path in self._store.files(self._rows):
            if not path.is_file():
                raise DataError(f"{path} is missing. {tables.CUT_SHORT}")

        paths = list(dict.fromkeys(map(self._store.data_path, self._rows)))
        optional = [key for key in (v3.STATE, v3.EXECUTED, v3.SUCCESS) if key in self.info.features]
        table = tables.read_frames(self.root, paths, self._rows, [v3.ACTION, *optional])
        read = functools.partial(tables.vectors, self.root, self._rows, table)
        self.actions: np.ndarray = read(v3.ACTION, self.robot.action_names)
        self.states: np.ndarray | None = read(v3.STATE, self.robot.state_names) if self.robot.state_dim else None
        self.executed_actions: np.ndarray | None = (
            read(v3.EXECUTED, self.robot.action_names) if v3.EXECUTED in optional else None
        )
        self.task_index = table["task_index"].to_numpy().astype(np.int64)
        if len(bad := np.flatnonzero((self.task_index < 0) | (self.task_index >= len(self.tasks)))):
            raise DataError(
                f"{self.root}: {tables.locate(self._rows, bad[0])} has task_index {self.task_index[bad[0]]}, but "
                f"{v3.TASKS} has {len(self.tasks)} instructions. Copy the dataset again."
            )
        success = table[v3.SUCCESS].to_pylist() if v3.SUCCESS in table.column_names else [None] * len(table)
        self.episodes = [self._episode(row, success[row["start"] + row["length"] - 1]) for row in self._rows]

    @property
    def num_frames(self) -> int:
        return len(self.actions)

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.robot.cameras

    def frames(self, episode: int, camera: str) -> Iterator[np.ndarray]:
        """The images of the episode with that index, in order, exactly `length` of them, uint8 RGB [height, width, 3].

        Fastest when episodes are read in order: each video file is then decoded once, from front to back.

        Raises:
            DataError: unknown episode or camera; a video that is damaged or too short.
        """
        if camera not in self.cameras:
            raise DataError(f"{self.root}: {unknown('camera', camera, self.cameras)}")
        rows = [row for row in self._rows if row["episode_index"] == episode]
        if not rows:
            last = self.episodes[-1].index
            raise DataError(
                f"{self.root} has no episode {episode}; its episodes go from {self.episodes[0].index} to {last}."
            )
        yield from self._store.frames(rows[0], camera)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything a policy can see of the dataset: another one whenever the data changed."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.actions, self.executed_actions, self.states, self.task_index):
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

    def _episode(self, row: tables.Row, solved: bool | None) -> Episode:
        length, start = row["length"], row["start"]
        tasks = dict.fromkeys(self.task_index[start : start + length].tolist())
        success = row.get("success", solved)
        return Episode(
            index=row["episode_index"],
            length=length,
            start=start,
            instructions=tuple(self.tasks[task] for task in tasks),
            env_id=row.get("env_id"),
            seed=row.get("seed"),
            success=None if success is None else bool(success),
            noise=row.get("noise"),
        )
