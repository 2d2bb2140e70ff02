"""Frames decoded from the videos when they are drawn are those of the cache, in any order and process."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.recordings import record
from tests.data.test_foreign import as_images, png
from tests.data.test_foreign import root as root  # a fixture
from vla.data import format as v3
from vla.data import frames as frames_module
from vla.data import samples as samples_module
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, Mixture, VideoFrames, open_frames
from vla.errors import ConfigError, DataError


@pytest.fixture
def many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(v3.Info, "video_files_size_in_mb", 0.003)
    return record(tmp_path / "set", [12, 1, 17, 9, 12, 12, 5])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 67), min_size=1, max_size=30), transform=st.sampled_from(["area", "lanczos"]))
def test_frames_equal_the_cached_ones_in_any_order(many_files, rows, transform):
    cached, decoded = (open_frames(many_files, ("front",), 24, transform, source) for source in ("cache", "video"))
    for row in rows:
        np.testing.assert_array_equal(decoded[row], cached[row])


def test_a_bounded_number_of_videos_stays_open(many_files):
    videos = len(list(many_files.root.glob("videos/*/*/*.mp4")))
    frames_module._open_video.cache_clear()
    for row in np.random.default_rng(0).permutation(many_files.num_frames).tolist():
        many_files.frame(row, "front")
    assert 3 < videos == frames_module._open_video.cache_info().misses <= frames_module.OPEN_VIDEOS


def test_loader_processes_read_what_the_training_process_reads(many_files):
    """They are forked while the training process has videos open, or started anew."""
    samples = ChunkSamples(many_files, ("front",), 24, 4, 0, frames="video")
    mixture = Mixture([samples], [np.arange(many_files.num_frames)], None, 0, 40, None)
    expected = [mixture[draw].images for draw in range(len(mixture))]
    loader = torch.utils.data.DataLoader(mixture, batch_size=4, num_workers=2, collate_fn=list)
    for wanted, sample in zip(expected, (sample for batch in loader for sample in batch), strict=True):
        np.testing.assert_array_equal(sample.images, wanted)
    again = pickle.loads(pickle.dumps(mixture))
    np.testing.assert_array_equal(again[7].images, expected[7])


_DROP_READERS = """
import gc, os, signal, sys
from pathlib import Path
from vla.data.video import VideoReader

gc.disable()
dropped, kept = (VideoReader(Path(sys.argv[1]), fps=10) for _ in range(2))
dropped.at(0), kept.at(0)
del dropped  # its container is a reference cycle, which waits for the collector
if child := os.fork():
    sys.exit(os.waitpid(child, 0)[1])
signal.alarm(30)
del kept
gc.collect()
os._exit(0)
"""


def test_a_forked_process_can_drop_the_readers_of_its_parent(many_files):
    """As in a loader process that opens more videos than are kept open. Their decoder threads are not forked."""
    path = next(many_files.root.glob("videos/*/*/*.mp4"))
    subprocess.run([sys.executable, "-c", _DROP_READERS, path], check=True, timeout=60)


def test_videos_are_read_if_the_frames_do_not_fit_into_memory(tmp_path, monkeypatch):
    demos, size = record(tmp_path / "set"), 36 * 24 * 24 * 3
    for processes, available, kind in (
        (1, 2 * size, np.ndarray),
        (1, 2 * size - 1, VideoFrames),
        (2, 2 * size, VideoFrames),
    ):
        monkeypatch.setattr(samples_module.psutil, "virtual_memory", lambda a=available: SimpleNamespace(available=a))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert isinstance(ChunkSamples(demos, ("front",), 24, 4, 0).frames, kind)


def test_images_in_data_files_need_the_cache(root, monkeypatch):
    as_images(root, png)
    demos = Demonstrations(root)
    monkeypatch.setattr(samples_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert isinstance(open_frames(demos, ("front",), 24), np.ndarray)
    with pytest.raises(ConfigError, match=r"has the images of front in its data files\. Set frames to 'cache'"):
        open_frames(demos, ("front",), 24, source="video")


def test_a_damaged_video_is_named_with_its_episode(many_files):
    path = next(iter(sorted(many_files.root.glob("videos/*/*/*.mp4"))))
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    frames_module._open_video.cache_clear()
    with pytest.raises(DataError, match=r"Episode \d+ is .* s of that video"):
        for row in range(12):
            many_files.frame(row, "front")
