"""Frame-exact video encoding, concatenation and decoding.

Owns: encoding with x264, concatenating videos without re-encoding, and reading frames by time from any codec. Frame `i`
has the timestamp `i / fps` in seconds. It does not know datasets or episodes.

Videos are encoded without B-frames, so that concatenation only adds an offset to the timestamps, and with frequent key
frames, so that seeking is fast.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vla.errors import DataError

CODEC = "libx264"
KEY_FRAME_EVERY = 5
CRF = 16
PRESET = "veryfast"
_OPTIONS = {
    "crf": str(CRF),
    "preset": PRESET,
    "g": str(KEY_FRAME_EVERY),
    "bf": "0",
    # One thread, because workers run in parallel, and so that equal frames give equal bytes.
    "x264-params": "scenecut=0:threads=1",
}
# FFmpeg scaler flags: bicubic, accurate rounding, full chroma. The defaults darken every channel by one level.
_ACCURATE = 0x4 | 0x40000 | 0x2000
_SCALER_BT601 = 5
_BT601, _STUDIO_RANGE = 6, 1  # stored in the stream; otherwise, decoders guess, and colours may shift

_NEAR = 2 * KEY_FRAME_EVERY  # up to this many frames ahead, decoding is faster than seeking
_SAME = 1e-4  # tolerance for equal timestamps, in seconds (as in LeRobot)
_ANOTHER = 0.4  # maximum distance of a frame from the requested time, in frames

#: Marks a depth feature in `meta/info.json`.
DEPTH_FLAG = '"info": {"is_depth_map": true}'


class VideoWriter:
    """Encodes uint8 RGB frames of one size into an mp4. A context manager; `close` completes the file."""

    def __init__(self, path: Path, height: int, width: int, fps: float) -> None:
        self.path, self.shape, self.frames = path, (height, width, 3), 0
        # 4:2:0 chroma subsampling needs even sides.
        self._pixel_format = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        self._time_base = 1 / _rate(fps)
        self._reformatter = VideoReformatter()  # creating one takes ten times as long as a conversion
        # In PyAV's stubs, a stream is a union of all kinds.
        self._container: Any = av.open(str(path), "w", format="mp4")
        stream: Any = self._container.add_stream(CODEC, rate=_rate(fps), options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, self._pixel_format
        stream.codec_context.colorspace, stream.codec_context.color_range = _BT601, _STUDIO_RANGE
        self._stream = stream

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, image: np.ndarray) -> None:
        """Append a frame, uint8 [height, width, 3]. DataError for any other size or type."""
        if image.shape != self.shape or image.dtype != np.uint8:
            raise DataError(
                f"frame {self.frames} of {self.path.stem!r}: expected uint8 {list(self.shape)} as in the first frame, "
                f"got {image.dtype} {list(image.shape)}."
            )
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = self._reformatter.reformat(
            rgb, format=self._pixel_format, dst_colorspace=_SCALER_BT601, interpolation="BICUBIC"
        )
        frame.pts, frame.time_base = self.frames, self._time_base
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        if self._container is not None:
            container, self._container = self._container, None
            try:
                container.mux(self._stream.encode())
            finally:
                container.close()


_readers: weakref.WeakSet[VideoReader] = weakref.WeakSet()  # all readers of this process
_inherited: list[VideoReader] = []


def _keep_inherited() -> None:
    """In a forked process, keep the parent's readers forever: freeing one would wait for decoder threads that were not
    forked."""
    _inherited.extend(_readers)
    gc.freeze()  # PyAV's containers are reference cycles: those of freed readers may still wait for the collector


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


class VideoReader:
    """Reads frames of a video file by time. Sequential reads decode each frame once. Other reads seek to a key frame.

    All codecs of the installed PyAV are supported. Images are rotated as specified in the file (usual for phones).
    Frames are identified by their timestamps, so the file's own frame rate may differ from `fps` or be missing.

    Args:
        path: the video file.
        fps: frames per second of the dataset.
        threads: threads of the decoder; 0: one per core, which delays the first frame after a seek.
    """

    def __init__(self, path: Path, fps: float, threads: int = 0) -> None:
        self.path, self._fps = path, float(fps)
        with _errors(path):
            self._container: Any = av.open(str(path))
            self._stream: Any = self._container.streams.best("video")
            if self._stream is None:
                raise DataError(f"{path} has no video stream: it is not a video, or it is truncated.")
            if self._stream.codec_context is None:
                raise DataError(f"{path} cannot be decoded: FFmpeg does not know its codec. Encode it as H.264.")
            self._stream.thread_type = "AUTO"
            self._stream.codec_context.thread_count = threads
        self._reformatter = VideoReformatter()
        _readers.add(self)
        self._restart()

    def _restart(self) -> None:
        self._decoded = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._last: Any = None  # the last decoded frame, and the previous one
        self._before: Any = None

    @functools.cached_property
    def is_depth(self) -> bool:
        """Whether it is a depth video: pixels have one channel with more than 8 bits."""
        components = self._stream.codec_context.format.components
        return len(components) == 1 and components[0].bits > 8

    def at(self, seconds: float) -> np.ndarray:
        """The frame at that time as uint8 RGB [height, width, 3]. DataError if the video has no such frame."""
        with _errors(self.path):
            sought = not self._reaches(seconds)
            if sought:
                self._seek(seconds)
            frame = self._nearest(seconds)
            if sought and not self._fits(frame, seconds):  # the file's index of key frames may be wrong
                self._seek(0.0)
                frame = self._nearest(seconds)
            if not self._fits(frame, seconds):
                raise DataError(self._missing(frame, seconds))
            if frame.is_corrupt:
                raise DataError(f"{self.path} is damaged at {seconds:.3f} s. Copy it again.")
            if self.is_depth:
                raise DataError(f"{self.path} is a depth video, not RGB. Declare it in meta/info.json: {DEPTH_FLAG}.")
            rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=_ACCURATE)
            return self._as_displayed(frame, rgb.to_ndarray())

    def close(self) -> None:
        self._container.close()

    def _reaches(self, seconds: float) -> bool:
        """Whether to decode up to that time instead of seeking."""
        if self._last is None:
            return seconds <= _NEAR / self._fps
        first = self._last if self._before is None else self._before
        return bool(first.time - _SAME <= seconds <= self._last.time + _NEAR / self._fps)

    def _nearest(self, seconds: float) -> Any:
        """Decode up to that time and return the nearest frame; None if the video has no frames."""
        while self._last is None or self._last.time < seconds - _SAME:
            frame = next(self._decoded, None)
            if frame is None:
                break
            self._before, self._last = self._last, frame
        frames = [frame for frame in (self._last, self._before) if frame is not None]
        return min(frames, key=lambda frame: abs(frame.time - seconds), default=None)

    def _fits(self, frame: Any, seconds: float) -> bool:
        return frame is not None and abs(frame.time - seconds) <= _ANOTHER / self._fps

    def _missing(self, frame: Any, seconds: float) -> str:
        if frame is None:
            return f"{self.path} has no frames: it is damaged or truncated. Copy it again."
        if frame.time < seconds and frame is self._last:
            return f"{self.path} ends before {seconds:.3f} s, at {frame.time:.3f} s: it is truncated. Copy it again."
        return (
            f"{self.path} has no frame at {seconds:.3f} s; the nearest is at {frame.time:.3f} s. "
            f"Encode it at {self._fps:g} frames per second, starting at 0 s, or copy it again."
        )

    def _as_displayed(self, frame: Any, image: np.ndarray) -> np.ndarray:
        """The image as displayed by video players: rotated and mirrored by the file's display matrix."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return image
        # A pixel at (x, y) is displayed at (a x + c y, b x + d y).
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
        if a == d == 0 and b and c:
            image, across, down = image.transpose(1, 0, 2), c, b
        elif b == c == 0 and a and d:
            across, down = a, d
        else:
            raise DataError(
                f"{self.path} is rotated by an angle that is not a multiple of 90 degrees. Encode it upright."
            )
        return np.ascontiguousarray(image[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1])

    def _seek(self, seconds: float) -> None:
        # Half a frame early, because timestamps in the container may be rounded up.
        early = Fraction(max(seconds - 0.5 / self._fps, 0))
        self._container.seek(int(early / self._stream.time_base), stream=self._stream)
        self._restart()


def concatenate(parts: Sequence[Path], path: Path, fps: float) -> list[int]:
    """Concatenate videos of `VideoWriter` into one file without re-encoding. Returns the frame count of each part.

    Raises:
        DataError: a part cannot be read, or its encoder settings differ from those of the first part.
    """
    counts, offset = [], 0
    first_header = None
    with av.open(str(path), "w", format="mp4") as out:
        stream = None
        for part in parts:
            with _errors(part), av.open(str(part)) as container:
                source: Any = container.streams.video[0]
                if stream is None:
                    stream = out.add_stream_from_template(source)
                    stream.time_base, first_header = source.time_base, header(source)
                elif header(source) != first_header:
                    raise DataError(f"{part} and {parts[0]} have different encoder settings; they cannot be joined.")
                step = round(1 / (_rate(fps) * source.time_base))
                count = 0
                for packet in container.demux(source):
                    if packet.size == 0:  # marks the end of the stream
                        continue
                    packet.pts = packet.dts = (offset + count) * step
                    packet.stream = stream
                    out.mux(packet)
                    count += 1
            counts.append(count)
            offset += count
    return counts


def header(stream: Any) -> tuple[Any, ...]:
    """The properties that must be equal for two streams to be concatenated."""
    codec = stream.codec_context
    return codec.name, codec.width, codec.height, codec.pix_fmt, bytes(codec.extradata or b""), stream.time_base


def describe(path: Path, fps: float) -> dict[str, Any]:
    """Properties of a video written by this module, with LeRobot's names."""
    with _errors(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return {
            "video.height": context.height,
            "video.width": context.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": context.pix_fmt,
            "video.fps": int(fps) if float(fps).is_integer() else fps,
            "video.channels": 3,
            "video.g": KEY_FRAME_EVERY,
            "video.crf": CRF,
            "video.preset": PRESET,
            "has_audio": False,
            "is_depth_map": False,
        }


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Convert FFmpeg's errors to a DataError with the file and the likely cause."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing. Copy the dataset again, with its videos.") from None
    except (av.FFmpegError, EOFError, IndexError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:  # the disk is full; the input is not damaged
            raise
        raise DataError(f"{path} cannot be decoded ({error}): it is damaged or truncated. Copy it again.") from None
