"""Images of a dataset's episodes, from its videos or from its data files.

Owns: which file holds an episode's images and how they are decoded in order, each file once when episodes are read in
order. It does not know states, actions or instructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from vla.data import format as v3
from vla.data.tables import read_table
from vla.data.video import VideoReader
from vla.errors import DataError

Row = Mapping[str, Any]  # a row of meta/episodes


class FrameStore:
    """The images of the dataset at `root`. Keeps one video open per camera."""

    def __init__(self, root: Path, info: v3.Info) -> None:
        self.root, self.info = root, info
        self._videos: dict[str, VideoReader] = {}
        self._table: tuple[tuple[Path, str] | None, pa.Table | None] = (None, None)

    def files(self, rows: Iterable[Row]) -> list[Path]:
        """All data and video files that hold frames of these episodes."""
        paths = set()
        for row in rows:
            paths |= {self.data_path(row), *(self.video_path(row, key) for key in self.video_keys)}
        return sorted(paths)

    def frames(self, row: Row, camera: str) -> Iterator[np.ndarray]:
        """An episode's images in order, uint8 RGB [height, width, 3]; DataError if the files do not have them."""
        key = self.info.cameras[camera]
        source = self._from_video if key in self.video_keys else self._from_table
        expected = self.info.image_shape(camera)
        for step, image in enumerate(source(row, key)):
            if image.shape[:2] != expected:
                raise DataError(
                    f"{self.root}: episode {row['episode_index']}, frame {step}, camera {camera!r}: the image is "
                    f"{list(image.shape[:2])}, but {v3.INFO} says {list(expected)}. Correct the shape there."
                )
            yield image

    @property
    def video_keys(self) -> list[str]:
        return [key for key in self.info.cameras.values() if self.info.features[key]["dtype"] == "video"]

    def data_path(self, row: Row) -> Path:
        return self.root / self.info.data_path.format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )

    def video_path(self, row: Row, key: str) -> Path:
        return self.root / (self.info.video_path or v3.VIDEO).format(
            video_key=key,
            chunk_index=row[f"videos/{key}/chunk_index"],
            file_index=row[f"videos/{key}/file_index"],
        )

    def _from_video(self, row: Row, key: str) -> Iterator[np.ndarray]:
        path, fps = self.video_path(row, key), float(self.info.fps)
        first = round(row[f"videos/{key}/from_timestamp"] * fps)
        last = first + row["length"] - 1
        for number in range(first, last + 1):
            try:
                yield self._video(path, key, fps).frame(number)
            except DataError as error:
                raise DataError(
                    f"{error} (Episode {row['episode_index']} is frames {first} to {last} of that video.)"
                ) from None

    def _video(self, path: Path, key: str, fps: float) -> VideoReader:
        video = self._videos.get(key)
        if video is None or video.path != path:
            if video is not None:
                video.close()
            video = self._videos[key] = VideoReader(path, fps)
        return video

    def _from_table(self, row: Row, key: str) -> Iterator[np.ndarray]:
        path = self.data_path(row)
        if self._table[0] != (path, key):
            table = read_table(path, ["episode_index", "frame_index", key])
            self._table = (path, key), table.sort_by([("episode_index", "ascending"), ("frame_index", "ascending")])
        table = self._table[1]
        assert table is not None
        rows = np.flatnonzero(table.column("episode_index").to_numpy() == row["episode_index"])
        for step, stored in enumerate(table.column(key).slice(rows[0], len(rows))):
            what = f"{path}: episode {row['episode_index']}, frame {step}, {key!r}"
            yield self._decode(stored.as_py(), what)

    def _decode(self, stored: Any, what: str) -> np.ndarray:
        """An image from its encoded bytes, or from the file that it names: {"bytes", "path"}."""
        data = stored.get("bytes") if isinstance(stored, dict) else stored
        named = self.root / (stored.get("path") or "") if isinstance(stored, dict) else self.root
        if data is None and named.is_file():
            data = named.read_bytes()
        if not data:
            raise DataError(f"{what}: neither the image nor its file is there. Copy the dataset again.")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(f"{what}: the stored image cannot be decoded. Copy the dataset again.")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
