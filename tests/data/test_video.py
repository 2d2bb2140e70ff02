"""Videos: frames are read back in the same number and order, with nearly the same pixels."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.data.video import VideoReader, VideoWriter, concatenate, describe
from vla.errors import DataError


def numbered(number: int, height: int = 32, width: int = 80) -> np.ndarray:
    """An image whose upper half encodes the number in ten binary blocks."""
    image = np.full((height, width, 3), 60, np.uint8)
    for bit in range(10):
        if number >> bit & 1:
            image[: height // 2, bit * 8 : bit * 8 + 8] = 220
    return image


def number_of(image: np.ndarray) -> int:
    return sum(int(image[4, bit * 8 + 4, 0] > 140) << bit for bit in range(10))


def write(path: Path, numbers: range, fps: float, size: tuple[int, int] = (32, 80)) -> Path:
    with VideoWriter(path, *size, fps) as video:
        for number in numbers:
            video.add(numbered(number, *size))
    return path


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=5),
    fps=st.sampled_from([5, 7, 10, 12.5, 15, 20, 29.97, 30, 50, 60]),
    size=st.sampled_from([(32, 80), (33, 81), (40, 90)]),
    order=st.randoms(use_true_random=False),
)
def test_joined_videos_have_every_frame_at_its_place(tmp_path, lengths, fps, size, order):
    parts, start = [], 0
    for i, length in enumerate(lengths):
        parts.append(write(tmp_path / f"{i}.mp4", range(start, start + length), fps, size))
        start += length
    joined = tmp_path / "joined.mp4"
    assert concatenate(parts, joined, fps) == lengths
    video = VideoReader(joined, fps)
    assert video.at(0).shape[:2] == size
    assert [number_of(video.at(i / fps)) for i in range(start)] == list(range(start))
    jumps = [order.randrange(start) for _ in range(20)]
    assert [number_of(video.at(i / fps)) for i in jumps] == jumps
    with pytest.raises(DataError, match=f"ends before {start / fps:.3f} s"):
        video.at(start / fps)
    assert number_of(video.at(0)) == 0  # still usable after an error


def test_pixels_survive(tmp_path):
    across, down = np.meshgrid(*[np.sin(np.arange(96) / 96 * 2 * np.pi)] * 2)  # smooth also across the borders
    image = (128 + 110 * np.stack([across, down, -across], axis=-1)).astype(np.uint8)
    with VideoWriter(tmp_path / "v.mp4", 96, 96, 10) as video:
        for shift in range(12):
            video.add(np.roll(image, shift, axis=1))
    reader = VideoReader(tmp_path / "v.mp4", 10)
    for shift in range(12):
        error = reader.at(shift / 10).astype(int) - np.roll(image, shift, axis=1)
        assert np.abs(error).mean() < 3 and np.abs(error).max() < 24
        assert np.abs(error.mean(axis=(0, 1))).max() < 1  # no colour shift


def test_the_same_frames_give_the_same_bytes(tmp_path):
    first, second = (write(tmp_path / f"{name}.mp4", range(30), 10) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_properties_under_lerobots_names(tmp_path):
    about = describe(write(tmp_path / "v.mp4", range(3), 20), 20)
    assert (about["video.codec"], about["video.pix_fmt"], about["video.fps"]) == ("h264", "yuv420p", 20)
    assert (about["video.height"], about["video.width"], about["is_depth_map"]) == (32, 80, False)


def test_frames_of_another_size_are_rejected(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", 32, 80, 10) as video:
        video.add(numbered(0))
        with pytest.raises(DataError, match=r"expected uint8 \[32, 80, 3\]"):
            video.add(numbered(0, 34, 80))


def test_incompatible_videos_are_not_joined(tmp_path):
    parts = [write(tmp_path / "a.mp4", range(3), 10), write(tmp_path / "b.mp4", range(3), 10, (40, 90))]
    with pytest.raises(DataError, match="different encoder settings"):
        concatenate(parts, tmp_path / "joined.mp4", 10)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_damaged_video_is_named(tmp_path, keep):
    path = write(tmp_path / "v.mp4", range(60), 10)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(DataError, match=r"v\.mp4"):
        reader = VideoReader(path, 10)
        [reader.at(i / 10) for i in range(60)]


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.mp4 is missing"):
        VideoReader(tmp_path / "gone.mp4", 10)
