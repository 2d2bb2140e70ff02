"""Resizing and augmentation: the pixels that training and serving share."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.config import AugmentConfig
from vla.transforms.images import augment, resize

NONE = AugmentConfig(shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(st.integers(8, 80), st.integers(8, 80), st.integers(8, 64))
def test_an_image_of_any_size_becomes_square_and_keeps_its_values(height, width, size):
    assert resize(picture(height, width), size).shape == (size, size, 3)
    flat = np.full((height, width, 3), (10, 120, 250), np.uint8)
    np.testing.assert_array_equal(resize(flat, size), np.full((size, size, 3), (10, 120, 250)))


def test_an_image_of_the_right_size_is_untouched():
    image = picture(32, 32)
    assert resize(image, 32) is image


def test_shrinking_averages_areas():
    image = picture(64, 64)
    means = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(resize(image, 16), means, atol=0.51)


def test_no_augmentation_is_the_identity():
    images = np.stack([picture(24, 24, seed) for seed in range(2)])
    np.testing.assert_array_equal(augment(images, NONE, np.random.default_rng(0)), images)


def test_a_shift_moves_each_camera_by_itself_and_repeats_the_edge():
    image = np.zeros((20, 20, 3), np.uint8)
    image[9:11, 9:11] = 255
    places = set()
    for seed in range(20):
        shifted = augment(np.stack([image] * 2), dataclasses.replace(NONE, shift=0.1), np.random.default_rng(seed))
        rows, columns = zip(*(np.argwhere(camera[..., 0]).min(0) for camera in shifted), strict=True)
        assert max(abs(place - 9) for place in rows + columns) <= 2
        assert (shifted > 0).sum() == 2 * 4 * 3  # nothing is lost or added
        places.add((rows[0], columns[0]) == (rows[1], columns[1]))
    assert False in places


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_jitter_is_one_map_for_all_cameras(name):
    config, change = dataclasses.replace(NONE, **{name: 0.3}), []
    for seed in range(8):
        image = picture(12, 12, seed) // 2 + 60  # far from black and white, so that nothing is clipped
        first, second = augment(np.stack([image, image[::-1]]), config, np.random.default_rng(seed)).astype(float)
        np.testing.assert_array_equal(first, second[::-1])
        pixels = image.astype(float)
        luma = pixels @ [0.299, 0.587, 0.114]
        match name:
            case "brightness":
                kept, moved = pixels, first
            case "contrast":
                kept, moved = pixels - 127.5, first - 127.5
            case "saturation":
                kept, moved = pixels - luma[..., None], first - luma[..., None]
        factor = (kept * moved).sum() / (kept * kept).sum()
        assert 0.69 < factor < 1.31
        np.testing.assert_allclose(moved, factor * kept, atol=1.6)  # rounding
        change.append(factor)
    assert max(change) > 1.05 and min(change) < 0.95
