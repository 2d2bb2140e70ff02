"""Short video clips of episodes for reports.

Owns: recording the frames of an episode and encoding them, in memory, as a small H.264 mp4 for browsers. The videos of
datasets are in `vla.data.video`. It does not know policies or pages.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import cv2
import numpy as np

from vla.spec import Observation

HEIGHT = 288  # height of the clip in pixels
MOST_FRAMES = 1200


class Recorder:
    """Records the camera images of one episode side by side.

    To limit memory, beyond `MOST_FRAMES` frames every second frame is dropped, and the recording rate is halved.
    """

    def __init__(self) -> None:
        self._frames: list[np.ndarray] = []
        self._stride = 1
        self._seen = 0

    def add(self, observation: Observation) -> None:
        """Record the images of `observation`."""
        if self._seen % self._stride == 0:
            images = list(observation["pixels"].values())
            tallest = max(image.shape[0] for image in images)
            self._frames.append(np.concatenate([_scale(image, tallest) for image in images], axis=1))
        self._seen += 1
        if len(self._frames) > MOST_FRAMES:
            self._frames, self._stride = self._frames[::2], self._stride * 2

    def mp4(self, fps: float) -> bytes:
        """The episode so far as mp4 bytes, playing `fps` observations per second; empty without frames."""
        return encode(self._frames, fps / self._stride) if self._frames else b""


def encode(frames: list[np.ndarray], fps: float) -> bytes:
    """Encode frames of equal shape, uint8 [height, width, 3] RGB, as mp4 (H.264, yuv420p)."""
    images = [_even(_scale(frame, HEIGHT)) for frame in frames]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "26", "preset": "veryfast"}
        stream.thread_count = 1  # clips are short, and several are encoded in parallel
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _scale(image: np.ndarray, height: int) -> np.ndarray:
    if image.shape[0] == height:
        return image
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    shrink = height < image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC)


def _even(image: np.ndarray) -> np.ndarray:
    """Crop to even sides, as required by yuv420p."""
    return np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
