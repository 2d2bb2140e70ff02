"""Reading the images of episodes from videos or data files.

Owns: the mapping from an episode to its image files, sequential decoding, and random access to videos. If episodes are
read in order, each file is decoded once. It does not know states, actions or instructions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from vla.data import format as v3
from vla.data.tables import TRUNCATED, integers, open_table, plain, read_table
from vla.data.video import DEPTH_FLAG, VideoReader
from vla.errors import DataError

Row = Mapping[str, Any]  # a row of meta/episodes

# Videos that random access keeps open in each process. Each takes 3 MB at 224 px; opening one takes as long as a frame.
OPEN_VIDEOS = 32

_fill = functools.cache(v3.fill)  # thousands of episodes share a file


class FrameStore:
    """The images of the dataset at `root`. Per camera, it keeps one video open, or the images of one file in memory."""

    def __init__(self, root: Path, info: v3.Info) -> None:
        self.root, self.info = root, info
        self._videos: dict[str, VideoReader] = {}
        self._images: dict[str, tuple[Path, np.ndarray, pa.ChunkedArray]] = {}  # key -> file, episodes, images

    def files(self, rows: Iterable[Row]) -> list[Path]:
        """All data and video files that contain frames of these episodes."""
        paths = set()
        for row in rows:
            paths |= {self.data_path(row), *(self.video_path(row, key) for key in self.info.video_keys)}
        return sorted(paths)

    def frames(self, row: Row, camera: str, steps: np.ndarray) -> Iterator[np.ndarray]:
        """An episode's images in order, uint8 RGB [height, width, 3]. DataError if images are missing or damaged.

        Args:
            steps: times of the frames [length], in frames since the start of the episode.
        """
        key = self.info.cameras[camera]
        source = self._from_video(row, key, steps) if key in self.info.video_keys else self._from_table(row, key)
        for number, image in enumerate(source):
            yield self._checked(image, row, camera, number)

    def frame(self, row: Row, camera: str, steps: np.ndarray, number: int) -> np.ndarray:
        """Frame `number` of an episode, as in `frames`, decoded from the nearest key frame of the camera's video."""
        key = self.info.cameras[camera]
        video = _open_video(self.video_path(row, key), float(self.info.fps), os.getpid())
        return self._checked(self._at(video, row, key, steps, number), row, camera, number)

    def _checked(self, image: np.ndarray, row: Row, camera: str, number: int) -> np.ndarray:
        expected = self.info.image_shape(camera)
        if image.shape[:2] != expected:
            raise DataError(
                f"{self.root}: episode {row['episode_index']}, frame {number}, camera {camera!r}: the image is "
                f"{list(image.shape[:2])}, but {v3.INFO} has {list(expected)}. Correct the shape in {v3.INFO}."
            )
        return image

    def check_span(self, row: Row, steps: np.ndarray) -> None:
        """Raise DataError if the episode's timestamps exceed its video segment."""
        last = int(steps[-1])
        for key in self.info.video_keys:
            start, end = (row.get(f"videos/{key}/{name}") for name in ("from_timestamp", "to_timestamp"))
            # Some recorders store the time of the last frame as the end, which is one frame too early.
            if end is not None and last >= max(round((end - start) * self.info.fps), row["length"]):
                raise DataError(
                    f"{self.root}: the last timestamp of episode {row['episode_index']} is {last / self.info.fps:.3f} "
                    f"s, but its segment of the video {key!r} lasts {end - start:.3f} s. Copy the dataset again."
                )

    def hidden_depth(self, row: Row) -> list[str]:
        """Feature keys of single-channel cameras with depth images that are not declared as depth."""
        return [key for key in self.info.cameras.values() if self.info.channels(key) == 1 and self._is_depth(row, key)]

    def _is_depth(self, row: Row, key: str) -> bool:
        try:
            if key in self.info.video_keys:
                video = VideoReader(self.video_path(row, key), self.info.fps)
                try:
                    return video.is_depth
                finally:
                    video.close()
            first = next(open_table(self.data_path(row)).iter_batches(1, columns=[key])).column(0)[0].as_py()
            image = cv2.imdecode(np.frombuffer(self._bytes(first, key), np.uint8), cv2.IMREAD_UNCHANGED)
            return image is not None and image.dtype != np.uint8
        except (DataError, pa.ArrowInvalid, OSError, StopIteration):
            return False  # reading the images reports the error

    def data_path(self, row: Row) -> Path:
        chunk, file = row["data/chunk_index"], row["data/file_index"]
        return _fill(self.root, self.info.data_path, chunk_index=chunk, file_index=file)

    def video_path(self, row: Row, key: str) -> Path:
        chunk, file = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
        return _fill(self.root, self.info.video_template, video_key=key, chunk_index=chunk, file_index=file)

    def _from_video(self, row: Row, key: str, steps: np.ndarray) -> Iterator[np.ndarray]:
        path, fps = self.video_path(row, key), float(self.info.fps)
        for number in range(len(steps)):
            yield self._at(self._video(path, key, fps), row, key, steps, number)

    def _at(self, video: VideoReader, row: Row, key: str, steps: np.ndarray, number: int) -> np.ndarray:
        start, fps = row[f"videos/{key}/from_timestamp"], float(self.info.fps)
        try:
            return video.at(start + int(steps[number]) / fps)
        except DataError as error:
            raise DataError(
                f"{error} (Episode {row['episode_index']} is {start:.3f} to {start + int(steps[-1]) / fps:.3f} s "
                "of that video.)"
            ) from None

    def _video(self, path: Path, key: str, fps: float) -> VideoReader:
        video = self._videos.get(key)
        if video is None or video.path != path:
            if video is not None:
                video.close()
            video = self._videos[key] = VideoReader(path, fps)
        return video

    def _from_table(self, row: Row, key: str) -> Iterator[np.ndarray]:
        path, index = self.data_path(row), row["episode_index"]
        if key not in self._images or self._images[key][0] != path:
            table = read_table(path, ["episode_index", "frame_index", key])
            episode, frame = integers(path, table, "episode_index"), integers(path, table, "frame_index")
            order = np.lexsort((frame, episode))
            images = plain(table[key])
            if (order != np.arange(len(order))).any():
                images = images.take(order)
            self._images[key] = path, episode[order], images
        _, episode, images = self._images[key]
        first, last = np.searchsorted(episode, [index, index + 1])
        if last - first != row["length"]:
            raise DataError(
                f"{path} has {last - first} images {key!r} of episode {index} instead of {row['length']}. {TRUNCATED}"
            )
        for step, stored in enumerate(images.slice(first, last - first)):
            what = f"{path}: episode {index}, frame {step}, {key!r}"
            yield self._decode(stored.as_py(), what)

    def _decode(self, stored: Any, what: str) -> np.ndarray:
        """Decode an image to uint8 RGB. It may be stored as RGB, RGBA, greyscale or with a palette."""
        data = np.frombuffer(self._bytes(stored, what), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        if image is not None and image.dtype != np.uint8:
            if image.dtype != np.uint16 or (image == image[..., :1]).all():
                raise DataError(f"{what}: this is a depth image, not RGB. Declare it in {v3.INFO}: {DEPTH_FLAG}.")
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is None:
            raise DataError(f"{what}: the stored image cannot be decoded. Copy the dataset again.")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def _bytes(self, stored: Any, what: str) -> bytes:
        """The encoded image, stored as bytes, as {"bytes", "path"}, or as the path of a file in the dataset."""
        data, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
        if isinstance(data, str):
            data, path = None, data
        if data is None and path:
            named = v3.inside(self.root, path)
            data = named.read_bytes() if named.is_file() else None
        if not data:
            raise DataError(f"{what}: the image is missing. Copy the dataset again.")
        if not isinstance(data, bytes):
            raise DataError(f"{what}: expected an encoded image (PNG, JPEG), got {type(data).__name__}.")
        return data


@functools.lru_cache(OPEN_VIDEOS)
def _open_video(path: Path, fps: float, process: int) -> VideoReader:
    """A video for random access. A forked process must not use its parent's file position, hence `process`."""
    return VideoReader(path, fps, threads=1)
