"""Training samples: inputs, targets, and the choice of frames."""

import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.config import AugmentConfig
from vla.data import samples as samples_module
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, Mixture, cached_frames, split_episodes
from vla.transforms.images import TRANSFORMS


def test_a_sample_with_an_action_prefix(dataset, robot, monkeypatch):
    """The prefix contains the executed actions of the sample's own frames. The following actions of the expert are
    learned."""
    demos = Demonstrations(dataset("squares", robot))
    executed = demos.actions + np.random.default_rng(1).normal(size=demos.actions.shape).astype(np.float32)
    monkeypatch.setattr(demos, "executed_actions", executed)
    samples, rng = ChunkSamples(demos, robot.cameras, 48, 4, source=0), np.random.default_rng(0)
    for frame in (9, 12, 17):  # episodes are nine frames long
        plain, counts = samples[frame], set()
        for _ in range(40):
            given = samples.with_action_prefix(frame, rng)
            count = int((plain.valid & ~given.valid).sum()) if frame < 17 else 1
            counts.add(count)
            np.testing.assert_array_equal(given.chunk[:count], executed[frame : frame + count])
            np.testing.assert_array_equal(given.chunk[2:], plain.chunk[2:] if frame < 17 else given.chunk[2:])
            np.testing.assert_array_equal(given.valid[2:], plain.valid[2:])
            assert not given.valid[0]
        assert counts == ({1, 2} if frame < 17 else {1})
        np.testing.assert_array_equal(samples[frame].chunk, plain.chunk)  # the original is unchanged


def test_the_share_of_samples_with_an_action_prefix(dataset, robot):
    demos = Demonstrations(dataset("squares", robot))
    samples = ChunkSamples(demos, robot.cameras, 48, 4, source=0)
    early = np.array([frame for frame in range(demos.num_frames) if frame % 9 < 5])  # complete chunks only
    for share, low, high in ((0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)):
        mixture = Mixture([samples], [early], None, seed=1, draws=200, augmentation=AugmentConfig(prefix=share))
        given = sum(not mixture[draw].valid[0] for draw in range(200))
        assert low <= given <= high


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(0, 0.99), st.integers(0, 5))
def test_train_and_validation_episodes_are_disjoint_and_not_empty(lengths, val_fraction, seed):
    starts = np.cumsum([0, *lengths[:-1]])
    episodes = [SimpleNamespace(start=start, length=n) for start, n in zip(starts.tolist(), lengths, strict=True)]
    training, validation = split_episodes(SimpleNamespace(episodes=episodes), val_fraction, seed)
    assert sorted([*training, *validation]) == list(range(sum(lengths)))
    for episode in episodes:
        frames = np.arange(episode.start, episode.start + episode.length)
        assert np.isin(frames, validation).mean() in (0, 1)
    assert (len(validation) > 0) == (val_fraction > 0 and len(lengths) > 1) and len(training) > 0


def test_frames_are_in_memory_if_the_copies_of_all_processes_fit(dataset, robot, monkeypatch):
    demos = Demonstrations(dataset("squares", robot))
    size = cached_frames(demos, robot.cameras, 48).nbytes
    monkeypatch.setattr(samples_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * size))
    for processes, mapped in ((1, False), (8, True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert isinstance(cached_frames(demos, robot.cameras, 48), np.memmap) == mapped


def test_several_processes_decode_a_dataset_once(dataset, robot, capfd):
    root = dataset("squares", robot)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_read_frames, args=(root, robot.cameras)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert capfd.readouterr().out.count("decoded") == 1
    assert len(list((root / ".cache").glob("frames-*.npy"))) == 1


def _read_frames(root, cameras) -> None:
    decode = samples_module._decode

    def told(*arguments):
        print("decoded", flush=True)
        time.sleep(0.5)  # by now, the other process waits
        decode(*arguments)

    samples_module._decode = told
    assert len(cached_frames(Demonstrations(root), cameras, 48)) == 45


def test_frames_are_resized_by_the_transform_of_the_policy(dataset, robot):
    """Each transform has its own cache."""
    demos = Demonstrations(dataset("squares", robot, episodes=1))
    recorded = next(iter(demos.frames(0, "front")))
    shown = {name: ChunkSamples(demos, ("front",), 32, 1, 0, name)[0].images[0] for name in TRANSFORMS}
    for name, image in shown.items():
        np.testing.assert_array_equal(image, TRANSFORMS[name](recorded, 32))
    assert (shown["area"] != shown["lanczos"]).any() and (shown["lanczos"] != shown["lanczos-crop"]).any()


def test_state_mask_and_state_noise(dataset, robot):
    samples = ChunkSamples(Demonstrations(dataset("squares", robot)), robot.cameras, 48, 4, source=0)

    def drawn(**options: float) -> list[samples_module.Sample]:
        mixture = Mixture([samples], [np.arange(20)], None, 1, 400, AugmentConfig(**options))
        return [mixture[draw] for draw in range(400)]

    plain, masked, noisy = drawn(), drawn(state_mask=0.25), drawn(state_noise=0.3)
    assert not any(sample.state_masked for sample in plain) and all(sample.state_noise == 0 for sample in plain)
    assert 70 <= sum(sample.state_masked for sample in masked) <= 130
    assert np.std([sample.state_noise for sample in noisy]) == pytest.approx(0.3, rel=0.1)
    for one, other in zip(plain, masked, strict=True):  # the rest of a sample is unchanged
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.state, other.state)


def test_hard_frames_are_drawn_in_proportion_to_their_errors(dataset, robot):
    samples = ChunkSamples(Demonstrations(dataset("squares", robot)), robot.cameras, 48, 4, source=0)
    frames, errors = np.arange(4, 8), np.array([0.0, 1.0, 0.0, 3.0])

    def counts(share: float) -> list[int]:
        mixture = Mixture([samples], [frames], None, 1, 800, None, hard_frames=share, errors=[errors])
        chunks = [mixture[draw].chunk[0].tobytes() for draw in range(800)]
        return [chunks.count(samples[frame].chunk[0].tobytes()) for frame in frames]

    assert counts(1.0) == pytest.approx([0, 200, 0, 600], abs=60)
    assert counts(0.5) == pytest.approx([100, 200, 100, 400], abs=60)
    assert counts(0.0) == pytest.approx([200] * 4, abs=60)
    errors[:] = 0  # all errors are equal
    assert counts(1.0) == pytest.approx([200] * 4, abs=60)
