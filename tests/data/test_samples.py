"""Training samples: what a policy is shown, and what of it is learned."""

from collections import Counter

import numpy as np

from vla.config import AugmentConfig
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, Mixture


def test_a_continued_sample_begins_with_another_plan(dataset, robot):
    """Its first actions are those of another moment of the same episode, in order, and are not learned."""
    demos = Demonstrations(dataset("squares", robot))
    samples, rng = ChunkSamples(demos, robot.cameras, 48, 4, source=0), np.random.default_rng(0)
    plain, moments = samples[12], Counter()  # episodes are nine frames long
    for _ in range(200):
        given = samples.continued(12, rng)
        count = int((~given.valid).sum())
        assert 1 <= count <= 2 and given.valid[count:].all()
        np.testing.assert_array_equal(given.chunk[count:], plain.chunk[count:])
        begin = next(frame for frame in range(9, 18) if np.array_equal(demos.actions[frame], given.chunk[0]))
        np.testing.assert_array_equal(given.chunk[:count], demos.actions[np.minimum(begin + np.arange(count), 17)])
        moments[begin] += 1
    assert set(moments) == set(range(9, 18))  # any moment, and more often a little before
    assert sum(moments[frame] for frame in (10, 11, 12)) > 100
    np.testing.assert_array_equal(samples[12].chunk, plain.chunk)  # the original is left alone


def test_a_mixture_continues_the_share_that_it_is_asked_for(dataset, robot):
    demos = Demonstrations(dataset("squares", robot))
    samples = ChunkSamples(demos, robot.cameras, 48, 4, source=0)
    early = np.array([frame for frame in range(demos.num_frames) if frame % 9 < 5])  # whole chunks only
    for share, low, high in ((0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)):
        mixture = Mixture([samples], [early], None, seed=1, draws=200, augmentation=AugmentConfig(committed=share))
        given = sum(not mixture[draw].valid[0] for draw in range(200))
        assert low <= given <= high
