"""Normalisation: exact statistics, inverse functions, and dimensions that are constant or rarely move."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla.errors import DataError
from vla.transforms.normalize import METHODS, Normalizer, compute_statistics


def test_statistics_are_exact_quantiles():
    values = np.random.default_rng(0).normal(size=(997, 3))
    stats = compute_statistics(values)
    ordered = np.sort(values, axis=0)
    position = 0.01 * (len(values) - 1)  # linear interpolation between order statistics
    low = int(position)
    expected = ordered[low] + (position - low) * (ordered[low + 1] - ordered[low])
    np.testing.assert_allclose(stats["q01"], expected, rtol=1e-12)
    np.testing.assert_allclose(stats["max"], ordered[-1])


@given(
    hnp.arrays(np.float64, (50, 2), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(METHODS),
)
def test_unnormalize_inverts_normalize_inside_the_range(values, method):
    normalizer = Normalizer.from_statistics(compute_statistics(values), method)
    scaled = normalizer.normalize(values)
    assert np.abs(scaled).max() <= 1
    inside = np.abs(scaled) < 1
    back = normalizer.unnormalize(scaled)
    tolerance = 1e-5 * (1 + np.abs(values).max())
    assert np.abs(back - values)[inside].max(initial=0) <= max(tolerance, 1e-4 * np.ptp(values))


def test_quantiles_map_to_minus_one_and_one():
    stats = compute_statistics(np.random.default_rng(0).normal(size=(1000, 2)))
    normalizer = Normalizer.from_statistics(stats)
    quantiles = np.array([stats["q01"], stats["q99"]])
    np.testing.assert_allclose(normalizer.normalize(quantiles), [[-1, -1], [1, 1]], atol=1e-6)


def test_a_constant_dimension_returns_its_constant():
    values = np.random.default_rng(0).normal(size=(100, 2))
    values[:, 1] = 0.3
    normalizer = Normalizer.from_statistics(compute_statistics(values))
    assert normalizer.constant.tolist() == [False, True]
    assert (normalizer.normalize(values)[:, 1] == 0).all()
    np.testing.assert_allclose(normalizer.unnormalize(np.array([[0.5, 0.9]]))[0, 1], 0.3, rtol=1e-6)


def test_a_dimension_that_rarely_moves():
    """If a dimension moves in 0.5 % of the frames, q99 equals q01. Dividing by their difference would give huge
    values."""
    values = np.zeros((1000, 1))
    values[:5] = 1.0
    normalizer = Normalizer.from_statistics(compute_statistics(values))
    np.testing.assert_allclose(normalizer.normalize(np.array([[0.0], [1.0]])), [[-1], [1]])


def test_a_dimension_that_almost_never_moves_is_constant():
    """Dimensions that move in less than one of a thousand frames have no tokens."""
    values = np.full((5000, 1), 0.2)
    values[:3] = 1.0
    normalizer = Normalizer.from_statistics(compute_statistics(values))
    assert normalizer.constant.all()
    assert normalizer.unnormalize(np.zeros((1, 1)))[0, 0] == np.float32(0.2)


def test_mask_leaves_a_dimension_untouched():
    stats = compute_statistics(np.random.default_rng(0).uniform(0, 5, (100, 2)))
    normalizer = Normalizer.from_statistics(stats, mask=[True, False])
    assert normalizer.normalize(np.array([[2.5, 0.25]]))[0, 1] == np.float32(0.25)
    assert normalizer.unnormalize(np.array([[0.0, 0.25]]))[0, 1] == np.float32(0.25)


def test_bad_values_are_named():
    with pytest.raises(DataError, match="frame 3, dimension 1 is nan"):
        values = np.zeros((5, 2))
        values[3, 1] = np.nan
        compute_statistics(values)
    with pytest.raises(DataError, match="at least one frame"):
        compute_statistics(np.zeros((0, 2)))
    with pytest.raises(DataError, match="Did you mean 'q01_q99'"):
        Normalizer.from_statistics(compute_statistics(np.zeros((5, 2))), "q1_q99")


def test_statistics_without_a_median_are_used_as_openvla_uses_them():
    """Also if the quantiles nearly coincide: OpenVLA has no exception for such entries."""
    theirs = {"q01": [-0.5, 0.0, 0.1, 0.0], "q99": [1.5, 1e-6, 0.1, 1.0], "mean": [0.0] * 4}
    normalizer = Normalizer.from_statistics(theirs, mask=[True, True, True, False])
    tokens = np.array([[-1.0] * 4, [0.5] * 4, [1.0] * 4])
    low, high = np.array(theirs["q01"]), np.array(theirs["q99"])
    expected = np.where([True, True, True, False], 0.5 * (tokens + 1) * (high - low) + low, tokens)
    np.testing.assert_allclose(normalizer.unnormalize(tokens), expected, rtol=1e-6)
    assert (normalizer.normalize(np.array([0.5, 5.0, 0.1, 0.0])) == [0.0, 1.0, 0.0, 0.0]).all()
    with pytest.raises(DataError, match="lack min, max"):
        Normalizer.from_statistics(theirs, "min_max")
    ours = compute_statistics(np.random.default_rng(0).normal(size=(10, 2)))
    with pytest.raises(DataError, match="lack median"):
        Normalizer.from_statistics({name: value for name, value in ours.items() if name != "median"})
