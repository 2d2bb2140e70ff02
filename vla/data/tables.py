"""The parquet files of a LeRobotDataset v3, read and checked against each other.

Owns: instructions, episode rows and frame columns, and what is said when they are missing, damaged, contradict each
other or hold values that cannot be trained on. It does not know images, nor what the columns are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data import format as v3
from vla.errors import DataError

CUT_SHORT = "The recording was cut short, or the copy is incomplete."

Row = dict[str, Any]  # of meta/episodes, without statistics; `start` is the episode's first row in the frame table


def read_tasks(root: Path) -> list[str]:
    """The instruction of each task index."""
    path = root / v3.TASKS
    table = read_table(path)
    # The instruction is the index of a data frame: depending on the writer it is called "task" or has no name.
    text = [
        field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    if "task_index" not in table.column_names or not text:
        raise DataError(f"{path}: expected the columns task_index and task, got {table.column_names}.")
    by_index = dict(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True))
    return [str(by_index.get(i, "")) for i in range(max(by_index, default=-1) + 1)]


def read_episodes(root: Path, info: v3.Info, video_keys: Sequence[str]) -> list[Row]:
    """The rows of meta/episodes, ascending; complete as far as the reader needs them."""
    folder = root / "meta/episodes"
    rows: list[Row] = []
    for path in sorted(folder.glob("*/*.parquet")):
        names = [name for name in open_table(path).schema_arrow.names if not name.startswith("stats/")]
        rows += read_table(path, names).to_pylist()
    if not rows and not info.total_episodes:
        raise DataError(f"{root} is empty: it has no episodes. Record some first.")
    if len(rows) != info.total_episodes:
        raise DataError(
            f"{root}: {v3.INFO} counts {info.total_episodes} episodes, meta/episodes lists {len(rows)}. {CUT_SHORT}"
        )
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in video_keys:
        needed += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    for row in rows:
        for name in needed:
            if row.get(name) is None:
                raise DataError(f"{folder}: episode {row.get('episode_index')} has no {name!r}. Copy it again.")
    rows.sort(key=lambda row: row["episode_index"])
    start = 0
    for row in rows:
        row["start"] = start
        start += row["length"]
    if start < 2:
        raise DataError(f"{root} has {start} frame in all: nothing can be learned from it. Record whole episodes.")
    return rows


def read_frames(root: Path, paths: Sequence[Path], rows: Sequence[Row], columns: Sequence[str]) -> pa.Table:
    """All frames of all episodes in order, with those of `columns` that the files have.

    Raises:
        DataError: a column of the bookkeeping or the actions is missing; an episode's frames are not all there.
    """
    keys = ["episode_index", "frame_index", "task_index"]
    tables = []
    for path in paths:
        have = open_table(path).schema_arrow.names
        for name in (*keys, v3.ACTION):
            if name not in have:
                raise DataError(f"{path}: column {name!r} is missing. Copy the file again.")
        tables.append(read_table(path, [name for name in (*keys, *columns) if name in have]))
    table = pa.concat_tables(tables, promote_options="permissive")
    episode, frame = (table[name].to_numpy() for name in keys[:2])
    order = np.lexsort((frame, episode))
    if (order != np.arange(len(order))).any():
        table, episode, frame = table.take(order), episode[order], frame[order]
    for row in rows:
        index, length, start = row["episode_index"], row["length"], row["start"]
        part = slice(start, start + length)
        there = len(episode[part]) == length and (episode[part] == index).all()
        if not (there and (frame[part] == np.arange(length)).all()):
            raise DataError(
                f"{root}: episode {index} should have frames 0 to {length - 1}; its data file has "
                f"{int((episode == index).sum())} frames of it. {CUT_SHORT}"
            )
    return table.slice(0, rows[-1]["start"] + rows[-1]["length"])


def vectors(root: Path, rows: Sequence[Row], table: pa.Table, key: str, names: Sequence[str]) -> np.ndarray:
    """A column as float32 [N, len(names)]; DataError names the frame that has another size or is not finite."""
    size = len(names)
    if key not in table.column_names:
        raise DataError(f"{root}: {v3.INFO} lists {key!r}, but the data files do not have it. Copy the dataset again.")
    chunks: list[np.ndarray] = []
    for chunk in table[key].chunks:
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            lengths = np.diff(chunk.offsets.to_numpy())
            if len(bad := np.flatnonzero(lengths != size)):
                row = sum(len(part) for part in chunks) + int(bad[0])
                raise DataError(
                    f"{root}: {locate(rows, row)}: {key} has {lengths[bad[0]]} entries instead of {size} "
                    f"({', '.join(names)}). Remove the episode, or correct the shape in {v3.INFO}."
                )
            chunk = chunk.flatten()
        elif pa.types.is_fixed_size_list(chunk.type):
            if chunk.type.list_size != size:
                raise DataError(
                    f"{root}: {key} has {chunk.type.list_size} entries; {v3.INFO} says {size}. Correct it there."
                )
            chunk = chunk.flatten()
        chunks.append(chunk.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, size))
    values = np.concatenate(chunks)
    if len(values) != len(table):
        raise DataError(f"{root}: {key} is missing in {len(table) - len(values)} frames. Remove those episodes.")
    if not np.isfinite(values).all():
        row, entry = np.argwhere(~np.isfinite(values))[0]
        where = f"{locate(rows, row)}: {key}[{names[entry]}]"
        raise DataError(f"{root}: {where} is {values[row, entry]}. Remove or repair that episode.")
    return values


def locate(rows: Sequence[Row], row: int) -> str:
    """The episode and frame of a row of the frame table, in words."""
    place = next(place for place in rows if row < place["start"] + place["length"])
    return f"episode {place['episode_index']}, frame {row - place['start']}"


def open_table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing. {CUT_SHORT}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a complete parquet file ({error}). {CUT_SHORT}") from None


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    file = open_table(path)
    try:
        return file.read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged ({error}). Copy it again.") from None
