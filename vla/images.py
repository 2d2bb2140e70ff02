"""Pure transforms of images: resizing to the network's input, and augmentation.

Owns: what happens to pixels before they become a tensor. uint8 in, uint8 out, so that training and serving share the
same bytes. It does not know cameras, models or files.
"""

from __future__ import annotations

import cv2
import numpy as np

from vla.config import AugmentConfig

# One thread per call: images are small, and callers parallelise over samples.
cv2.setNumThreads(0)

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


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
