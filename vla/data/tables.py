"""Reading and checking the parquet files of a LeRobotDataset v3.

Owns: instructions, episode rows and frame columns, and the errors for missing, damaged or contradictory files and
invalid values. It does not know images, or the use of the columns.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vla.data import format as v3
from vla.errors import DataError

TRUNCATED = "The recording was interrupted, or the copy is incomplete."

TIME = "timestamp"
OFF_GRID = 0.4  # maximum distance of a timestamp from a multiple of 1 / fps, in frames
OTHER_RATE = 1.25  # maximum factor between the frame interval and 1 / fps
KEYS = ("episode_index", "frame_index", "task_index")

Row = dict[str, Any]  # a row of meta/episodes without statistics; `start` is the episode's first row in the frame table


def read_tasks(root: Path) -> dict[int, str]:
    """Task index -> instruction, in ascending order of the index. Tasks without an instruction are omitted."""
    path = root / v3.TASKS
    table = read_table(path)
    column = _instruction_column(path, table)
    found: dict[int, str] = {}
    for index, text in zip(integers(path, table, "task_index").tolist(), plain(table[column]).to_pylist(), strict=True):
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        if text is not None and found.setdefault(index, text) != text:
            raise DataError(
                f"{path}: task_index {index} has two instructions, {found[index]!r} and {text!r}. Keep one of them."
            )
    return dict(sorted(found.items()))


def _instruction_column(path: Path, table: pa.Table) -> str:
    """Name of the column with the instructions: the index in the pandas metadata, else a column with one of the usual
    index names, else the only text column."""
    text = [field.name for field in table.schema if _is_text(field.type) and field.name != "task_index"]
    try:
        index = [name for name in table.schema.pandas_metadata["index_columns"] if name in text]
    except (ValueError, TypeError, KeyError):  # no pandas metadata, or damaged metadata
        index = []
    for names in (index, [name for name in ("task", "__index_level_0__") if name in text][:1], text):
        if len(names) == 1:
            return names[0]
    found = f"{len(text)} text columns" if text else "no text column"
    raise DataError(f"{path}: expected the columns task_index and task, got {table.column_names} with {found}.")


def read_episodes(root: Path, info: v3.Info, video_keys: Sequence[str]) -> list[Row]:
    """The checked rows of meta/episodes in ascending order."""
    folder = root / "meta/episodes"
    rows: list[Row] = []
    for path in sorted(folder.glob("*/*.parquet")):
        names = [name for name in open_table(path).schema_arrow.names if not name.startswith("stats/")]
        rows += read_table(path, names).to_pylist()
    if not rows and not info.total_episodes:
        raise DataError(f"{root} is empty: it has no episodes. Record some first.")
    if len(rows) != info.total_episodes:
        raise DataError(
            f"{root}: {v3.INFO} counts {info.total_episodes!r} episodes, meta/episodes lists {len(rows)}. {TRUNCATED}"
        )
    whole = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    whole += [f"videos/{key}/{name}" for key in video_keys for name in ("chunk_index", "file_index")]
    for row in rows:
        episode = f"{folder}: episode {row.get('episode_index')}"
        for name in (*whole, *(f"videos/{key}/from_timestamp" for key in video_keys)):
            value = row.get(name)
            if value is None:
                raise DataError(f"{episode} has no {name!r}. Copy it again.")
            number = isinstance(value, int | float) and np.isfinite(value) and value >= 0
            if not number or (name in whole and value != int(value)):
                kind = "a whole number" if name in whole else "a time in seconds"
                raise DataError(f"{episode}: {name!r} must be {kind} >= 0, got {value!r}. Copy it again.")
            row[name] = int(value) if name in whole else float(value)
        if not row["length"]:
            raise DataError(f"{episode} has length 0. Remove it from the list, and decrease the counts in {v3.INFO}.")
    rows.sort(key=lambda row: row["episode_index"])
    for before, after in itertools.pairwise(rows):
        if before["episode_index"] == after["episode_index"]:
            raise DataError(f"{folder} lists episode {after['episode_index']} twice. Renumber the episodes.")
    start = 0
    for row in rows:
        row["start"] = start
        start += row["length"]
    if start < 2:
        raise DataError(f"{root} has {start} frame in total, which is too few for training. Record complete episodes.")
    return rows


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of the listed episodes in order, from all data files.

    Attributes:
        task: int64 [N], the task index.
        time: float64 [N], seconds since the start of the episode; None if a file lacks this column.
        success: float64 [N], NaN if unknown; None if a file lacks this column.
        vectors: column -> float32 [N, D].
        unlisted: number of rows of episodes that meta/episodes does not list.
    """

    task: np.ndarray
    time: np.ndarray | None
    success: np.ndarray | None
    vectors: dict[str, np.ndarray]
    unlisted: int


def read_frames(root: Path, paths: Sequence[Path], rows: Sequence[Row], wanted: Mapping[str, Sequence[str]]) -> Frames:
    """Read all frames of the listed episodes.

    Args:
        root: the dataset folder, for error messages.
        paths: the data files.
        rows: the rows of meta/episodes.
        wanted: the vector columns to read, column -> names of its dimensions.
    Raises:
        DataError: a column is missing or has the wrong type, frames are missing, or values are not finite.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for path in paths:
        have = open_table(path).schema_arrow.names
        for name in (*KEYS, *wanted):
            if name not in have:
                raise DataError(f"{path}: column {name!r} is missing. Copy the file again.")
        scalars = [name for name in (TIME, v3.SUCCESS) if name in have]
        table = read_table(path, [*KEYS, *wanted, *scalars])
        for name in KEYS:
            parts[name].append(integers(path, table, name))
        for name in scalars:
            parts[name].append(numbers(path, table, name, ["value"], np.float64)[:, 0])
        for name, entries in wanted.items():
            parts[name].append(numbers(path, table, name, entries))
    columns = {name: np.concatenate(values) for name, values in parts.items() if len(values) == len(paths)}
    chosen = _rows_of(root, rows, columns["episode_index"], columns["frame_index"])
    unlisted = len(columns["episode_index"]) - len(chosen)
    if unlisted or (chosen != np.arange(len(chosen))).any():
        columns = {name: values[chosen] for name, values in columns.items()}
    for name, entries in wanted.items():
        _check_finite(root, rows, name, entries, columns[name])
    return Frames(
        columns["task_index"],
        columns.get(TIME),
        columns.get(v3.SUCCESS),
        {name: columns[name] for name in wanted},
        unlisted,
    )


def _rows_of(root: Path, rows: Sequence[Row], episode: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Row indices of the listed episodes' frames, in order. DataError if an episode's length differs from the list."""
    order = np.lexsort((frame, episode))
    indices = np.array([row["episode_index"] for row in rows])
    first, last = (np.searchsorted(episode[order], indices, side) for side in ("left", "right"))
    parts = []
    for row, begin, end in zip(rows, first, last, strict=True):
        part = order[begin:end]
        if len(part) != row["length"]:
            why = TRUNCATED if len(part) < row["length"] else "Correct its length, or copy the dataset again."
            raise DataError(
                f"{root}: episode {row['episode_index']} should have frames 0 to {row['length'] - 1}; its data file "
                f"has {len(part)} frames. {why}"
            )
        if len(twice := np.flatnonzero(np.diff(frame[part]) == 0)):
            raise DataError(
                f"{root}: episode {row['episode_index']} has frame_index {frame[part[twice[0]]]} twice. "
                "Renumber its frames, or remove the episode."
            )
        parts.append(part)
    return np.concatenate(parts)


def frame_steps(rows: Sequence[Row], time: np.ndarray | None, fps: float) -> tuple[np.ndarray, str]:
    """Time of each frame, in frames since the start of its episode: int64 [N], ascending within an episode.

    The steps are 0, 1, 2, ... if the timestamps are unusable, or if no frames were removed from the tables.

    Args:
        rows: the rows of meta/episodes.
        time: seconds since the start of the episode [N]; None if there are no timestamps.
        fps: frames per second of the dataset.
    Returns:
        The steps, and the reason why the timestamps are unusable ("" if they are usable).
    Raises:
        DataError: the timestamps contradict `fps`.
    """
    counted = np.concatenate([np.arange(row["length"]) for row in rows])
    if time is None:
        return counted, ""
    exact, follows = time * fps, np.diff(counted) == 1
    pace = np.median(np.diff(exact)[follows]) if follows.any() else 1.0
    if np.isfinite(pace) and pace > 0 and not 1 / OTHER_RATE < pace < OTHER_RATE:
        raise DataError(
            f"the timestamps are {pace / fps:.4g} s apart, but {v3.INFO} has fps {fps:g}. Correct the wrong one."
        )
    steps = np.round(exact)
    with np.errstate(invalid="ignore"):
        off = ~(np.abs(exact - steps) <= OFF_GRID) | (steps < 0)
        off[1:] |= (np.diff(steps) < 1) & follows
    if not off.any():
        return steps.astype(np.int64), ""
    row = int(np.flatnonzero(off)[0])
    return counted, (
        f"{locate(rows, row)}: the timestamp {time[row]:.4f} s is not a multiple of 1/{fps:g} s past the previous one."
    )


def integers(path: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column as int64 [N]. DataError if it is missing or contains other values."""
    if name not in table.column_names:
        raise DataError(f"{path}: column {name!r} is missing. Copy the file again.")
    values = numbers(path, table, name, ["value"], np.float64)[:, 0]
    if len(bad := np.flatnonzero(~(np.isfinite(values) & (values == np.floor(values))))):
        raise DataError(f"{path}: row {bad[0]}: {name} must be a whole number, got {values[bad[0]]}. Copy it again.")
    return values.astype(np.int64)


def numbers(path: Path, table: pa.Table, name: str, entries: Sequence[str], dtype: type = np.float32) -> np.ndarray:
    """A column as [N, len(entries)], from lists of any Arrow type, or from single numbers if there is one entry.

    Missing numbers become NaN.

    Raises:
        DataError: a row has the wrong length, lists are nested, or the values are not numbers.
    """
    size, done = len(entries), 0
    chunks: list[np.ndarray] = [np.zeros((0, size), dtype)]
    for chunk in plain(table[name]).chunks:
        if is_list(chunk.type):
            lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
            if len(bad := np.flatnonzero(lengths != size)):
                raise DataError(_other_size(path, table, name, entries, lengths, done, int(bad[0])))
            chunk = chunk.flatten()
        elif size != 1:
            raise DataError(f"{path}: {name} is one number per frame, but {v3.INFO} has {size}. Correct {v3.INFO}.")
        chunks.append(_cast(path, name, chunk, dtype).reshape(-1, size))
        done += len(chunks[-1])
    return np.concatenate(chunks)


def _other_size(
    path: Path, table: pa.Table, name: str, entries: Sequence[str], lengths: np.ndarray, done: int, bad: int
) -> str:
    """Error message for a list of the wrong length: row `bad` of a chunk that starts at row `done`."""
    if (lengths == lengths[0]).all():
        return f"{path}: {name} has {lengths[0]} entries, but {v3.INFO} has {len(entries)}. Correct the shape there."
    at = f"row {done + bad}"
    if name not in KEYS:
        episode, frame = (integers(path, table, key)[done + bad] for key in KEYS[:2])
        at = f"episode {episode}, frame {frame}"
    return (
        f"{path}: {at}: {name} has {lengths[bad]} entries instead of {len(entries)} ({', '.join(entries)}). "
        f"Remove the episode, or correct the shape in {v3.INFO}."
    )


def _cast(path: Path, name: str, values: pa.Array, dtype: type) -> np.ndarray:
    kind = values.type
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        values = values.cast(pa.float64())
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        nested = " Flatten it to one list per frame." if is_list(kind) else ""
        raise DataError(f"{path}: {name} contains values of type {kind}, not numbers.{nested}")
    with np.errstate(over="ignore"):  # an overflow becomes inf, which `_check_finite` reports
        array: np.ndarray = values.to_numpy(zero_copy_only=False).astype(dtype)
    return array


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values without dictionary, run-end or extension encoding."""
    while True:
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        elif pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        elif pa.types.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        else:
            return column


def is_list(kind: pa.DataType) -> bool:
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _check_finite(root: Path, rows: Sequence[Row], key: str, names: Sequence[str], values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        row, entry = np.argwhere(~np.isfinite(values))[0]
        where = f"{locate(rows, row)}: {key}[{names[entry]}]"
        raise DataError(f"{root}: {where} is {values[row, entry]}. Remove or repair that episode.")


def locate(rows: Sequence[Row], row: int) -> str:
    """The episode and frame of a row of the frame table, as text."""
    place = rows[bisect.bisect_right(rows, row, key=lambda place: place["start"]) - 1]
    return f"episode {place['episode_index']}, frame {row - place['start']}"


def open_table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing. {TRUNCATED}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a complete parquet file ({error}). {TRUNCATED}") from None


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    file = open_table(path)
    try:
        return file.read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged ({error}). Copy it again.") from None
