"""Training samples: what a policy is shown, and what of it is learned."""

import numpy as np

from vla.config import AugmentConfig
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, Mixture


def test_a_continued_sample_begins_with_an_older_plan(dataset, robot):
    """Its first actions are those of some frames before, never of another episode, and are not learned."""
    demos = Demonstrations(dataset("squares", robot))
    samples = ChunkSamples(demos, robot.cameras, 48, 4, source=0)
    plain, older = samples[12], samples.continued(12, count=2, lag=2)  # episodes are nine frames long
    np.testing.assert_array_equal(older.chunk[:2], demos.actions[10:12])
    np.testing.assert_array_equal(older.chunk[2:], plain.chunk[2:])
    assert older.valid.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(samples.continued(10, count=2, lag=4).chunk[:2], demos.actions[9:11])
    np.testing.assert_array_equal(samples[12].chunk, plain.chunk)  # the original is left alone


def test_a_mixture_continues_the_share_that_it_is_asked_for(dataset, robot):
    demos = Demonstrations(dataset("squares", robot))
    samples = ChunkSamples(demos, robot.cameras, 48, 4, source=0)
    early = np.array([frame for frame in range(demos.num_frames) if frame % 9 < 5])  # whole chunks only
    for share, low, high in ((0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)):
        mixture = Mixture([samples], [early], None, seed=1, draws=200, augmentation=AugmentConfig(committed=share))
        given = sum(not mixture[draw].valid[0] for draw in range(200))
        assert low <= given <= high
