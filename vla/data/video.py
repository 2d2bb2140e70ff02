"""Videos: frames in, exactly the same number of frames out, at exactly the places they were put.

Owns: encoding with x264, joining videos without encoding them again, and reading frames by number from any codec. It
does not know datasets or episodes. Frame `i` of a video at `fps` is shown at `i / fps` seconds.

Videos have no B-frames, so that packets lie in the order of the frames and joining two videos is a matter of adding an
offset to the time stamps; and a key frame every few frames, so that a frame in the middle is cheap to reach.
"""

from __future__ import annotations

import contextlib
import errno
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
    # One thread: workers run side by side, and the same frames give the same bytes.
    "x264-params": "scenecut=0:threads=1",
}
# Flags of FFmpeg's scaler: bicubic, accurate rounding, full chroma. Its defaults darken every channel by one level.
_ACCURATE = 0x4 | 0x40000 | 0x2000
_SCALER_BT601 = 5
_BT601, _STUDIO_RANGE = 6, 1  # written into the stream: a decoder that has to guess shifts the colours

# Decoding onwards is cheaper than seeking when the wanted frame is this close.
_NEAR = 2 * KEY_FRAME_EVERY


class VideoWriter:
    """Encodes uint8 RGB frames of one size into an mp4, one by one. A context manager; `close` completes the file."""

    def __init__(self, path: Path, height: int, width: int, fps: float) -> None:
        self.path, self.shape, self.frames = path, (height, width, 3), 0
        # 4:2:0 halves the chroma resolution, which odd sizes do not allow.
        self._pixel_format = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
        self._time_base = 1 / _rate(fps)
        self._reformatter = VideoReformatter()  # kept: making one per frame costs ten times the conversion
        # PyAV's stubs give every stream the union of all kinds; here it is always video.
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
        """Append a frame, uint8 [height, width, 3]; DataError for another size or type."""
        if image.shape != self.shape or image.dtype != np.uint8:
            raise DataError(
                f"frame {self.frames} of {self.path.stem!r}: expected uint8 {list(self.shape)} like the first one, "
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


class VideoReader:
    """Frames of a video file by number. In order they are decoded once; a jump seeks to the key frame before.

    Any codec that the installed PyAV decodes will do. A frame's number is its time stamp times `fps`.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self._fps = path, float(fps)
        with _errors(path):
            self._container: Any = av.open(str(path))
            if not self._container.streams.video:
                raise DataError(f"{path} has no video stream.")
            self._stream: Any = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
        self._reformatter = VideoReformatter()
        self._decoded = self._decode()
        self._next = 0  # number of the frame that the decoder gives next, as far as is known

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self._stream.height, self._stream.width

    def frame(self, number: int) -> np.ndarray:
        """Frame `number` as uint8 RGB [height, width, 3]; DataError if the video does not have it."""
        if not self._next <= number <= self._next + _NEAR:
            self._seek(number)
        with _errors(self.path):
            for frame in self._decoded:
                self._next = self._number(frame) + 1
                if self._next > number:
                    break
            else:
                self._seek(0)
                raise DataError(f"{self.path} ends before frame {number}: the file was cut short. Copy it again.")
            if self._next != number + 1:
                raise DataError(f"{self.path} has no frame {number} (at {number / self._fps:.3f} s). Copy it again.")
            return self._reformatter.reformat(frame, format="rgb24", interpolation=_ACCURATE).to_ndarray()

    def close(self) -> None:
        self._container.close()

    def _decode(self) -> Iterator[av.VideoFrame]:
        return (frame for frame in self._container.decode(self._stream) if frame.pts is not None)

    def _number(self, frame: Any) -> int:
        return round(float(frame.pts * frame.time_base) * self._fps)

    def _seek(self, number: int) -> None:
        with _errors(self.path):
            # Half a frame early: time stamps in the container's units may be rounded either way.
            seconds = Fraction(max(number - 0.5, 0)) / Fraction(self._fps)
            self._container.seek(int(seconds / self._stream.time_base), stream=self._stream)
            self._decoded, self._next = self._decode(), 0


def concatenate(parts: Sequence[Path], path: Path, fps: float) -> list[int]:
    """Join videos that `VideoWriter` made into one file, without encoding again. Returns the frames of each part.

    Raises:
        DataError: a part cannot be read, or was encoded with other settings than the first.
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
                    raise DataError(f"{part} was encoded with other settings than {parts[0]}; they cannot be joined.")
                step = round(1 / (_rate(fps) * source.time_base))
                count = 0
                for packet in container.demux(source):
                    if packet.size == 0:  # the demuxer's end mark
                        continue
                    packet.pts = packet.dts = (offset + count) * step
                    packet.stream = stream
                    out.mux(packet)
                    count += 1
            counts.append(count)
            offset += count
    return counts


def header(stream: Any) -> tuple[Any, ...]:
    """What two streams must share to be joined."""
    codec = stream.codec_context
    return codec.name, codec.width, codec.height, codec.pix_fmt, bytes(codec.extradata or b""), stream.time_base


def describe(path: Path, fps: float) -> dict[str, Any]:
    """Properties of a video that this module wrote, under the names that LeRobot gives them in `info.json`."""
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
    """FFmpeg's errors as a DataError that names the file and the likely reason."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy the dataset again, with its videos.") from None
    except (av.FFmpegError, EOFError, IndexError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:  # while writing: nothing is wrong with what was read
            raise
        raise DataError(f"{path} cannot be decoded ({error}): it is damaged or was cut short. Copy it again.") from None
