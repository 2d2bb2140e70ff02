"""Image transforms: conversion of camera formats, resizing to the network's input size, and augmentation.

Owns: all pixel operations before the conversion to a tensor. Images are uint8, so that training and serving use
identical values. It does not know environments, models or files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

from vla.config import AugmentConfig
from vla.errors import SpecError
from vla.spec import check_image

# One thread per call: images are small, and callers parallelise over samples.
cv2.setNumThreads(0)

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_SMALLEST = 8  # minimum height and width in pixels


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """The image format of a camera, inferred from its first image. All later images must have the same format.

    * Shape: [height, width, c] or [c, height, width] with c = 1 or 3, RGBA as [height, width, 4], or greyscale as
      [height, width]. Height and width are at least 8, so the channel axis is unambiguous. [4, height, width] is
      rejected, because it could also be four stacked greyscale frames.
    * Values: uint8; 32-bit or 64-bit integers in 0..255; booleans; floats in 0..1. For floats in 0..255, the
      observation space must declare that range, because one image does not determine it.

    Greyscale is expanded to three equal channels, and alpha is dropped.

    Attributes:
        shape, dtype: shape and type of the camera's arrays.
        channel_axis: index of the channel axis; None for [height, width].
        scale: factor from the camera's values to 0..255.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    channel_axis: int | None
    scale: int

    @classmethod
    def of(cls, image: np.ndarray, camera: str, bounds: tuple[float, float] | None = None) -> ImageFormat:
        """Infer the format from the first image of a camera.

        Args:
            image: the first image.
            camera: the camera name, for error messages.
            bounds: lowest and highest value of the camera's observation space, if known.
        Raises:
            SpecError: this is not an image, or its format is ambiguous.
        """
        axis = _channel_axis(image.shape, camera)
        height, width = (side for i, side in enumerate(image.shape) if i != axis)
        check_image(np.broadcast_to(np.uint8(0), (height, width, 3)), camera)
        return cls(image.shape, image.dtype, axis, _scale(image.dtype, camera, bounds))

    def convert(self, image: np.ndarray, camera: str) -> np.ndarray:
        """A copy as uint8 [height, width, 3]. SpecError if shape, type or range do not match this format."""
        if (image.shape, image.dtype) != (self.shape, self.dtype):
            raise SpecError(
                f"camera {camera!r}: expected {self.dtype} {list(self.shape)} as in its first image, got {image.dtype} "
                f"{list(image.shape)}. A camera must keep its image size and type."
            )
        if image.dtype != np.uint8:
            levels = np.rint(image * self.scale)
            if not (levels.min() >= 0 and levels.max() <= 255):  # also False for NaN
                raise SpecError(
                    f"camera {camera!r}: {image.dtype} images must be in 0..{255 // self.scale}, got {image.min():g} "
                    f"to {image.max():g}. Use uint8. For floats in 0..255, declare the space Box(0, 255)."
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
        stack = (
            " Pass a single frame: for a batch, one of its images; for a frame stack, remove the wrapper."
            if len(shape) > 3
            else ""
        )
        raise SpecError(f"camera {camera!r}: expected an image [height, width, 3], got shape {list(shape)}.{stack}")
    if shape[0] in (1, 3) and min(shape[1:]) >= _SMALLEST:
        return 0
    if shape[2] in (1, 3, 4):
        return 2
    hint = " If these are stacked frames, pass a single one. If this is RGBA, move the channels last."
    stack = hint if shape[0] < _SMALLEST else ""
    raise SpecError(
        f"camera {camera!r}: expected 3 colour channels (or 1, or 4 with alpha last), got shape {list(shape)}.{stack}"
    )


def _scale(dtype: np.dtype, camera: str, bounds: tuple[float, float] | None) -> int:
    if dtype == np.uint8 or (dtype.kind in "iu" and dtype.itemsize >= 4):  # wide integers come from arithmetic on uint8
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
        f"camera {camera!r}: the observation space declares {dtype} images in {bounds[0]:g}..{bounds[1]:g}, which is "
        "ambiguous. Use uint8 in 0..255 or floats in 0..1."
    )


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [size, size, 3], by area interpolation to shrink and cubic interpolation to enlarge."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = image.shape[0] >= size and image.shape[1] >= size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def lanczos(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [size, size, 3], by an antialiased Lanczos filter with three lobes.

    Equal to `tf.image.resize(method="lanczos3", antialias=True)`, as for OpenVLA's training images.
    """
    if image.shape[:2] == (size, size):
        return image
    filtered = _separable(image, *(_lanczos_weights(side, size) for side in image.shape[:2]))
    return np.clip(np.rint(filtered), 0, 255).astype(np.uint8, order="C")


def lanczos_crop(image: np.ndarray, size: int, area: float = 0.9) -> np.ndarray:
    """`lanczos`, then a central crop of the fraction `area`, enlarged to `size` by linear interpolation.

    Equal to `tf.image.crop_and_resize`, as in OpenVLA's evaluation of networks trained with random crops of that area.
    """
    weights = _crop_weights(size, math.sqrt(area))
    cropped = _separable(lanczos(image, size), weights, weights)
    return np.clip(np.floor(cropped * (255.5 / 255)), 0, 255).astype(np.uint8, order="C")


def _separable(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Apply weights [H, h] and [W, w] to the two axes of an image [h, w, 3]: float32 [H, W, 3]."""
    height, width, channels = image.shape
    first = rows @ image.astype(np.float32).reshape(height, -1)
    by_channel = np.ascontiguousarray(first.reshape(-1, width, channels).transpose(0, 2, 1)).reshape(-1, width)
    return (by_channel @ columns.T).reshape(len(rows), channels, -1).transpose(0, 2, 1)


@functools.lru_cache(maxsize=16)
def _lanczos_weights(length: int, size: int) -> np.ndarray:
    """Weights [size, length] of a Lanczos filter. Pixel centres are at half-integers; rows sum to 1."""
    scale = length / size
    offsets = (np.arange(length) + 0.5) - (np.arange(size)[:, None] + 0.5) * scale
    x = offsets / max(scale, 1.0)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _crop_weights(size: int, side: float) -> np.ndarray:
    """Weights [size, size] that enlarge the central fraction `side` of an axis by linear interpolation."""
    places = (np.linspace((1 - side) / 2, (1 + side) / 2, size) * (size - 1))[:, None]
    return np.maximum(0.0, 1 - np.abs(np.arange(size) - places)).astype(np.float32)


#: Transforms of a camera image to the network's input, by name. Checkpoints store the name, so its meaning must never
#: change.
TRANSFORMS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "area": resize,
    "lanczos": lanczos,
    "lanczos-crop": lanczos_crop,
}


def augment(images: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Random shift and colour jitter for the images of one sample, uint8 [C, S, S, 3].

    Each camera has its own shift; the colour jitter is the same for all cameras.
    """
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
    # One affine map: saturation blends with greyscale, contrast scales around mid-grey, brightness scales.
    pixels *= saturation * contrast * brightness
    pixels += ((1 - saturation) * contrast * brightness) * grey + 127.5 * (1 - contrast) * brightness
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
