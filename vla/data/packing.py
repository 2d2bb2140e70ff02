"""Packing the staged episodes of a recording into a LeRobotDataset v3, atomically.

Owns: the conversion of staged episodes into the files of the format. All files are first written inside the staging
folder, and `meta` is moved out last: a folder without `meta` is not a dataset. If the process is killed before, the
staged episodes are unchanged. It does not know how episodes are recorded (see `writer`).

Each data file has one row group per episode, so that reading a single episode is fast.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data import format as v3
from vla.data.card import dataset_card
from vla.data.staging import EPISODE, finished, guard_disk
from vla.data.stats import image_stats, vector_stats
from vla.data.video import concatenate, describe
from vla.errors import DataError
from vla.spec import RobotSpec

CARD = "README.md"
_MB = 1024 * 1024


def vector_column(values: np.ndarray) -> pa.Array:
    """float32 [N, D] as a column of lists of length D, or of single numbers if D = 1 (LeRobot's convention)."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def finalise(root: Path, numbers: Sequence[int] | None = None) -> None:
    """Pack the episodes staged in `root` into a dataset, in ascending order and renumbered from 0.

    Args:
        numbers: the episodes to include; None: all.
    Raises:
        DataError: there are no episodes, or they were recorded with different robots or image sizes.
    """
    staging = root / v3.STAGING
    numbers = finished(staging) if numbers is None else sorted(numbers)
    if not numbers:
        raise DataError(f"{root}: no episode is finished, so no dataset can be written.")
    folders = [staging / EPISODE.format(number) for number in numbers]
    packed = staging / ".packed"
    shutil.rmtree(packed, ignore_errors=True)
    packed.mkdir()
    with guard_disk(root):
        _Packing(packed, folders).write(root.resolve().name)
    for name in (CARD, "data", "videos", "meta"):  # `meta` last: only then is the folder a dataset
        shutil.rmtree(root / name, ignore_errors=True)
        if (packed / name).exists():
            (packed / name).rename(root / name)
    shutil.rmtree(staging)


class _Packing:
    """Writes the files of one dataset below `out`."""

    def __init__(self, out: Path, folders: Sequence[Path]) -> None:
        self.out, self.folders = out, folders
        self.abouts = [_about(folder) for folder in folders]
        first = self.abouts[0]
        for folder, about in zip(folders, self.abouts, strict=True):
            for key in ("robot", "image_shapes"):
                if about[key] != first[key]:
                    raise DataError(
                        f"{folder.name} and {folders[0].name} cannot be in the same dataset: their {key} differ, "
                        f"{about[key]} and {first[key]}."
                    )
        self.robot = RobotSpec.from_dict(first["robot"])
        self.shapes = {camera: (shape[0], shape[1]) for camera, shape in first["image_shapes"].items()}
        self.tasks = list(dict.fromkeys(about["instruction"] for about in self.abouts))
        self.rows: list[dict[str, Any]] = []  # of meta/episodes

    def write(self, name: str) -> None:
        tables = self._data()
        videos = {camera: self._videos(camera) for camera in self.robot.cameras}
        features = v3.features_of(self.robot, self.shapes, videos, v3.EXECUTED in tables[0].column_names)
        self._statistics(tables, features)
        self._tasks()
        path = self.out / v3.EPISODES.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows, schema=_episode_schema(self.rows[0])), path)
        info = v3.Info(
            fps=self.robot.control_hz,
            features=features,
            total_episodes=len(self.rows),
            total_frames=self.rows[-1]["dataset_to_index"],
            total_tasks=len(self.tasks),
            splits={"train": f"0:{len(self.rows)}"},
            video_path=v3.VIDEO if self.robot.cameras else None,
            robot=self.robot.to_dict(),
        )
        v3.write_json(self.out / v3.INFO, info.to_dict())
        (self.out / CARD).write_text(dataset_card(name, info, self.rows))

    def _data(self) -> list[pa.Table]:
        """Write the data files. Returns one table per episode."""
        tables: list[pa.Table] = []
        start, files = 0, _Files(v3.Info.data_files_size_in_mb)
        writer: Any = None
        for number, (folder, about) in enumerate(zip(self.folders, self.abouts, strict=True)):
            table = self._frames(folder, about, number, start)
            place, opened = files.place(table.nbytes)
            if opened:
                if writer is not None:
                    writer.close()
                path = self.out / v3.DATA.format(**place)
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(path, table.schema, compression="snappy")
            writer.write_table(table)
            self.rows.append(
                {
                    "episode_index": number,
                    "tasks": [about["instruction"]],
                    "length": table.num_rows,
                    "data/chunk_index": place["chunk_index"],
                    "data/file_index": place["file_index"],
                    "dataset_from_index": start,
                    "dataset_to_index": start + table.num_rows,
                    **{key: about[key] for key in ("env_id", "seed", "success", "noise")},
                }
            )
            tables.append(table)
            start += table.num_rows
        if writer is not None:
            writer.close()
        return tables

    def _frames(self, folder: Path, about: dict[str, Any], number: int, start: int) -> pa.Table:
        try:
            staged = pq.read_table(folder / "frames.parquet")
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{folder} is damaged ({error}). Remove it and record that episode again.") from None
        length = staged.num_rows
        steps = np.arange(length)
        columns = {name: staged.column(name).combine_chunks() for name in staged.column_names}
        success = columns.pop(v3.SUCCESS)
        columns |= {
            v3.DONE: pa.array(steps == length - 1),
            v3.SUCCESS: success,
            "timestamp": pa.array((steps / self.robot.control_hz).astype(np.float32)),
            "frame_index": pa.array(steps),
            "episode_index": pa.array(np.full(length, number)),
            "index": pa.array(start + steps),
            "task_index": pa.array(np.full(length, self.tasks.index(about["instruction"]))),
        }
        return pa.table(columns)

    def _videos(self, camera: str) -> dict[str, Any]:
        """Concatenate the episodes' videos to files of limited size. Returns the video properties."""
        key, fps = v3.IMAGES + camera, self.robot.control_hz
        parts = [folder / f"{camera}.mp4" for folder in self.folders]
        files = _Files(v3.Info.video_files_size_in_mb)
        groups: list[tuple[Path, list[tuple[dict[str, Any], Path]]]] = []
        for row, part in zip(self.rows, parts, strict=True):
            place, opened = files.place(part.stat().st_size if part.exists() else 0)
            if opened:
                groups.append((self.out / v3.VIDEO.format(video_key=key, **place), []))
            groups[-1][1].append((row, part))
            row |= {f"videos/{key}/{name}": value for name, value in place.items()}
        for path, members in groups:
            path.parent.mkdir(parents=True, exist_ok=True)
            counts = concatenate([part for _, part in members], path, fps)
            start = 0
            for (row, part), count in zip(members, counts, strict=True):
                if count != row["length"]:
                    raise DataError(
                        f"{part} has {count} frames instead of {row['length']}. "
                        f"Remove {part.parent} and record that episode again."
                    )
                row[f"videos/{key}/from_timestamp"] = start / fps
                start += count
                row[f"videos/{key}/to_timestamp"] = start / fps
        return describe(groups[0][0], fps)

    def _statistics(self, tables: Sequence[pa.Table], features: dict[str, dict[str, Any]]) -> None:
        """Add each episode's statistics to its row, and write the statistics of all frames."""
        whole = pa.concat_tables(tables)
        stats: dict[str, Any] = {}
        for key, feature in features.items():
            if feature["dtype"] == "video":
                camera = key.removeprefix(v3.IMAGES)
                counts = np.array([about["histograms"][camera] for about in self.abouts])
                frames = [about["counted_frames"] for about in self.abouts]
                each = [image_stats(*pair) for pair in zip(counts, frames, strict=True)]
                stats[key] = image_stats(counts.sum(0), sum(frames))
            else:
                each = [vector_stats(_numbers(table, key)) for table in tables]
                stats[key] = vector_stats(_numbers(whole, key))
            for row, values in zip(self.rows, each, strict=True):
                row |= {f"stats/{key}/{name}": value for name, value in values.items()}
        for row in self.rows:
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        v3.write_json(self.out / v3.STATS, stats)

    def _tasks(self) -> None:
        """Write the instructions. As in LeRobot, pandas loads them as a data frame with the index "task"."""
        table = pa.table({"task_index": pa.array(range(len(self.tasks)), pa.int64()), "task": self.tasks})
        columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
        pandas = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
                for name, kind, numpy in columns
            ],
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "2.0.0",
        }
        path = self.out / v3.TASKS
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _about(folder: Path) -> dict[str, Any]:
    about = v3.read_json(folder / "episode.json")
    about["histograms"] = {camera: np.array(counts) for camera, counts in about["histograms"].items()}
    return about


class _Files:
    """Assigns episodes to files. A new file starts at the size limit, a new chunk after 1000 files."""

    def __init__(self, limit_mb: int) -> None:
        self._limit, self._filled, self._file = limit_mb * _MB, 0, -1

    def place(self, size: int) -> tuple[dict[str, int], bool]:
        """Chunk and file index for an episode of `size` bytes, and whether that file is new."""
        opened = self._file < 0 or self._filled + size > self._limit
        if opened:
            self._file, self._filled = self._file + 1, 0
        self._filled += size
        chunk, file = divmod(self._file, v3.Info.chunks_size)
        return {"chunk_index": chunk, "file_index": file}, opened


def _numbers(table: pa.Table, key: str) -> np.ndarray:
    """A column as [N] or [N, D]."""
    column = table.column(key).combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy().reshape(len(column), -1)
    return column.to_numpy(zero_copy_only=False)


def _episode_schema(row: dict[str, Any]) -> pa.Schema:
    """Column types of meta/episodes. They do not depend on the values: a seed may be missing, and statistics may be
    integers."""
    fixed = {"env_id": pa.string(), "seed": pa.int64(), "success": pa.bool_(), "noise": pa.float64()}
    fields = []
    for key, value in row.items():
        kind = fixed.get(key)
        if kind is None and key.startswith("stats/"):
            kind = pa.list_(pa.int64()) if key.endswith("/count") else pa.float64()
            while isinstance(value, list) and not key.endswith("/count"):
                kind, value = pa.list_(kind), value[0]
        fields.append(pa.field(key, kind or pa.array([value]).type))
    return pa.schema(fields)
