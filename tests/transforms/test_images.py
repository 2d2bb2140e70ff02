"""Resizing and augmentation of images."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.config import AugmentConfig
from vla.transforms.images import TRANSFORMS, augment, lanczos, lanczos_crop, resize

NONE = AugmentConfig(shift=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(st.integers(8, 80), st.integers(8, 80), st.integers(8, 64))
def test_an_image_of_any_size_becomes_square_and_keeps_its_values(height, width, size):
    assert resize(random_image(height, width), size).shape == (size, size, 3)
    flat = np.full((height, width, 3), (10, 120, 250), np.uint8)
    np.testing.assert_array_equal(resize(flat, size), np.full((size, size, 3), (10, 120, 250)))


def test_an_image_of_the_right_size_is_untouched():
    image = random_image(32, 32)
    assert resize(image, 32) is image


def test_shrinking_averages_areas():
    image = random_image(64, 64)
    means = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(resize(image, 16), means, atol=0.51)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(256, 256), (480, 640), (100, 90), (32, 32)])
def test_every_transform_keeps_a_flat_image(name, shape):
    flat = np.full((*shape, 3), (10, 120, 250), np.uint8)
    np.testing.assert_array_equal(TRANSFORMS[name](flat, 32), np.full((32, 32, 3), (10, 120, 250)))


@pytest.mark.parametrize("shape", [(256, 256), (480, 640), (120, 200), (224, 300)])
def test_lanczos_is_the_usual_filter(shape):
    """Pillow computes the same filter with integers, and rounds between the two axes."""
    image = random_image(*shape) // 2 + 50
    theirs = np.asarray(PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.LANCZOS))
    assert np.abs(lanczos(image, 224).astype(int) - theirs).max() <= 1


def test_the_centre_crop_covers_90_percent_of_the_area():
    """Equal to `tf.image.crop_and_resize` with the box of OpenVLA's evaluation, and its conversion to uint8."""
    image, size, half = random_image(224, 224), 224, (1 - 0.9**0.5) / 2
    cropped = lanczos_crop(image, size)
    for row, column in ((0, 0), (0, 223), (100, 37), (223, 223)):
        y, x = ((half + place / (size - 1) * (1 - 2 * half)) * (size - 1) for place in (row, column))
        top, left = int(y), int(x)
        block = image[top : top + 2, left : left + 2].astype(float)
        value = np.einsum("i,j,ijc->c", [1 - y + top, y - top], [1 - x + left, x - left], block)
        np.testing.assert_allclose(cropped[row, column], np.floor(value / 255 * 255.5), atol=0)


def test_no_augmentation_is_the_identity():
    images = np.stack([random_image(24, 24, seed) for seed in range(2)])
    np.testing.assert_array_equal(augment(images, NONE, np.random.default_rng(0)), images)


def test_cameras_are_shifted_independently_with_repeated_edges():
    image = np.zeros((20, 20, 3), np.uint8)
    image[9:11, 9:11] = 255
    places = set()
    for seed in range(20):
        shifted = augment(np.stack([image] * 2), dataclasses.replace(NONE, shift=0.1), np.random.default_rng(seed))
        rows, columns = zip(*(np.argwhere(camera[..., 0]).min(0) for camera in shifted), strict=True)
        assert max(abs(place - 9) for place in rows + columns) <= 2
        assert (shifted > 0).sum() == 2 * 4 * 3  # no pixel is lost or added
        places.add((rows[0], columns[0]) == (rows[1], columns[1]))
    assert False in places


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_jitter_is_one_map_for_all_cameras(name):
    config, change = dataclasses.replace(NONE, **{name: 0.3}), []
    for seed in range(8):
        image = random_image(12, 12, seed) // 2 + 60  # far from black and white, to avoid clipping
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
