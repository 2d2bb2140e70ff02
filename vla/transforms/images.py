"""Pure transforms of images: reading them in the forms that others use, resizing to the network's input, augmentation.

Owns: what happens to pixels before they become a tensor. After `ImageFormat.convert` uint8 in, uint8 out, so that
training and serving share the same bytes. It does not know environments, models or files.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

from vla.config import AugmentConfig
from vla.errors import SpecError
from vla.spec import check_image

# One thread per call: images are small, and callers parallelise over samples.
cv2.setNumThreads(0)

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_SMALLEST = 8  # pixels: a shorter side is a channel axis, or no camera's


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """How a camera delivers its images. It is decided once, and expected of every later image.

    * Shape: [height, width, c] or [c, height, width] with c = 1 or 3, RGBA as [height, width, 4], or grey as
      [height, width]. As a side has at least 8 pixels, only one reading is possible; [4, height, width] is refused,
      because it may as well be four stacked grey frames.
    * Values: uint8; integers of 32 or 64 bits in 0..255; booleans; floats in 0..1. Floats in 0..255 are read as such
      only where the observation space says so: the values of one image cannot tell.

    Grey becomes three equal channels, and alpha is dropped.

    Attributes:
        shape, dtype: of the arrays that the camera delivers.
        channel_axis: None for [height, width].
        scale: factor from the camera's values to 0..255.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    channel_axis: int | None
    scale: int

    @classmethod
    def of(cls, image: np.ndarray, camera: str, bounds: tuple[float, float] | None = None) -> ImageFormat:
        """The format that the first image of a camera has.

        Args:
            bounds: lowest and highest value in the camera's observation space, where there is one.
        Raises:
            SpecError: not an image, or one that could be read in two ways; says what to do.
        """
        axis = _channel_axis(image.shape, camera)
        height, width = (side for i, side in enumerate(image.shape) if i != axis)
        check_image(np.broadcast_to(np.uint8(0), (height, width, 3)), camera)
        return cls(image.shape, image.dtype, axis, _scale(image.dtype, camera, bounds))

    def convert(self, image: np.ndarray, camera: str) -> np.ndarray:
        """A copy as uint8 [height, width, 3]; SpecError for another shape, type or range than this format's."""
        if (image.shape, image.dtype) != (self.shape, self.dtype):
            raise SpecError(
                f"camera {camera!r}: expected {self.dtype} {list(self.shape)} as in its first image, got {image.dtype} "
                f"{list(image.shape)}. The images of a camera keep their size and type."
            )
        if image.dtype != np.uint8:
            levels = np.rint(image * self.scale)
            if not (levels.min() >= 0 and levels.max() <= 255):  # not a number fails, too
                raise SpecError(
                    f"camera {camera!r}: {image.dtype} images must be in 0..{255 // self.scale}, got {image.min():g} "
                    f"to {image.max():g}. Deliver uint8, or declare Box(0, 255) as the space of such floats."
                )
            image = levels.astype(np.uint8)
        if self.channel_axis is None:
            image = image[..., None]
        elif self.channel_axis == 0:
            image = image.transpose(1, 2, 0)
        if image.shape[2] == 1:
            image = np.broadcast_to(image, (*image.shape[:2], 3))
        return np.array(image[..., :3], order="C")


def _channel_axis(shape: tuple[int, ...], camera: str) -> int | None:
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        stack = " A batch, or stacked frames? Deliver one frame: leave out what stacks them." if len(shape) > 3 else ""
        raise SpecError(f"camera {camera!r}: expected an image [height, width, 3], got shape {list(shape)}.{stack}")
    if shape[0] in (1, 3) and min(shape[1:]) >= _SMALLEST:
        return 0
    if shape[2] in (1, 3, 4):
        return 2
    stack = " Stacked frames, or RGBA? Deliver one frame, [height, width, 3]." if shape[0] < _SMALLEST else ""
    raise SpecError(
        f"camera {camera!r}: expected 3 colour channels (or 1, or 4 with alpha as the last), got shape {list(shape)}."
        f"{stack}"
    )


def _scale(dtype: np.dtype, camera: str, bounds: tuple[float, float] | None) -> int:
    if dtype == np.uint8 or (dtype.kind in "iu" and dtype.itemsize >= 4):  # arithmetic on uint8 leads to the latter
        return 1
    if dtype.kind == "b":
        return 255
    if dtype.kind != "f":
        depth = " (a depth image?)" if dtype.kind == "u" else ""
        raise SpecError(f"camera {camera!r}: expected uint8 in 0..255 or floats in 0..1, got {dtype}{depth}.")
    if bounds is None or not all(map(math.isfinite, bounds)) or bounds == (0, 1):
        return 255
    if bounds == (0, 255):
        return 1
    raise SpecError(
        f"camera {camera!r}: {dtype} images in {bounds[0]:g}..{bounds[1]:g}, as the observation space declares, could "
        "mean several things. Deliver uint8 in 0..255 or floats in 0..1."
    )


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [size, size, 3]: area average when shrinking, cubic when growing (no letterbox)."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = image.shape[0] >= size and image.shape[1] >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def augment(images: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Randomly shift and recolour the images of one sample, uint8 [C, S, S, 3]; colours change alike in all cameras."""
    size = images.shape[1]
    reach = round(config.shift * size)
    brightness, contrast, saturation = (
        1 + width * rng.uniform(-1, 1) for width in (config.brightness, config.contrast, config.saturation)
    )
    shifted = []
    for image in images:
        if reach:
            top, left = rng.integers(0, 2 * reach + 1, 2)
            padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            image = padded[top : top + size, left : left + size]
        shifted.append(image)
    pixels = np.stack(shifted).astype(np.float32)
    grey = (pixels @ _LUMA)[..., None]
    # One affine map: saturation mixes with grey, contrast pivots on mid-grey, brightness scales.
    pixels *= saturation * contrast * brightness
    pixels += ((1 - saturation) * contrast * brightness) * grey + 127.5 * (1 - contrast) * brightness
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
