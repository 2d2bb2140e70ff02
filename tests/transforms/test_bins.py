"""Bins: round trips within half a bin, valid ids, and OpenVLA's published values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla.errors import ConfigError
from vla.transforms.tokenizers.base import build
from vla.transforms.tokenizers.bins import OpenVLABins, QuantileBins, UniformBins

chunks = hnp.arrays(np.float64, (3, 4), elements=st.floats(-1.5, 1.5))


@given(chunks, st.integers(2, 300))
def test_uniform_round_trip_within_half_a_bin(chunk, n_bins):
    tokenizer = UniformBins(3, 4, n_bins)
    ids = tokenizer.encode(chunk)
    assert ids.shape == (12,) and ids.min() >= 0 and ids.max() < n_bins
    assert np.abs(tokenizer.decode(ids) - np.clip(chunk, -1, 1)).max() <= 1 / n_bins + 1e-6


@given(chunks)
def test_openvla_round_trip_within_half_a_bin(chunk):
    tokenizer = OpenVLABins(3, 4)
    ids = tokenizer.encode(chunk)
    assert ids.min() >= 0 and ids.max() < 256
    assert np.abs(tokenizer.decode(ids) - np.clip(chunk, -1, 1)).max() <= 1 / 255 + 1e-6


def test_openvla_golden_values():
    """Values of the published tokenizer: vocabulary 32000, ids 31999 (a = -1) to 31744 (a = 1), 0 at 31872."""
    tokenizer, begin = OpenVLABins(1, 4), 32000 - 256
    ids = tokenizer.encode(np.array([[-1.0, 0.0, 1.0, 2.0]])) + begin
    assert ids.tolist() == [31999, 31872, 31744, 31744]
    decoded = tokenizer.decode(ids - begin)[0]
    np.testing.assert_allclose(decoded, [-0.99608, 0.0, 0.99608, 0.99608], atol=5e-6)
    assert decoded[1] == 0.0


def test_openvla_equals_its_published_formula_everywhere():
    values = np.random.default_rng(0).uniform(-1, 1, (1000, 7))
    bins = np.linspace(-1, 1, 256)
    centres = (bins[:-1] + bins[1:]) / 2
    published = 32000 - np.digitize(np.clip(values, -1, 1), bins)
    tokenizer = OpenVLABins(1000, 7)
    ids = tokenizer.encode(values) + 31744
    np.testing.assert_array_equal(ids, published.ravel())
    expected = centres[np.clip(32000 - published - 1, 0, 254)]
    np.testing.assert_allclose(tokenizer.decode(ids - 31744), expected, atol=1e-7)


def test_inactive_dimensions_have_no_tokens():
    tokenizer = UniformBins(2, 7, 63, active=[0, 1, 2, 6])
    chunk = np.random.default_rng(0).uniform(-1, 1, (2, 7))
    ids = tokenizer.encode(chunk)
    assert ids.shape == (8,)
    assert (tokenizer.decode(ids)[:, 3:6] == 0).all()
    assert tokenizer.token_mask(ids, np.array([True, False])).tolist() == [True] * 4 + [False] * 4


def test_an_odd_number_of_bins_represents_0_exactly():
    tokenizer = UniformBins(1, 3, 63)
    assert (tokenizer.decode(tokenizer.encode(np.zeros((1, 3)))) == 0).all()


def test_quantile_bins_are_narrow_for_frequent_actions():
    rng = np.random.default_rng(0)
    values = np.clip(rng.normal(0, 0.1, (5000, 2)), -1, 1)
    tokenizer = QuantileBins.fit(values, horizon=1, n_bins=32)
    uniform = UniformBins(1, 2, 32)
    error = {t.name: np.abs(t.decode(t.encode(values[:, None]))[:, 0] - values).mean() for t in (tokenizer, uniform)}
    assert error["quantile"] < error["uniform"] / 2


@pytest.mark.parametrize(
    "tokenizer",
    [UniformBins(2, 3, 15, [0, 2]), OpenVLABins(2, 3), QuantileBins.fit(np.random.rand(99, 3), 2, 8, [1, 2])],
    ids=lambda t: t.name,
)
def test_a_stored_tokenizer_is_rebuilt_equal(tokenizer):
    chunk = np.random.default_rng(1).uniform(-1, 1, (2, 3))
    again = build(tokenizer.to_dict())
    np.testing.assert_array_equal(again.encode(chunk), tokenizer.encode(chunk))
    np.testing.assert_array_equal(again.decode(again.encode(chunk)), tokenizer.decode(tokenizer.encode(chunk)))


def test_centres_are_the_decoded_values():
    tokenizer = OpenVLABins(1, 2)
    for row in (0, 17, 255):
        assert tokenizer.centres()[1, row] == tokenizer.decode(np.array([row, row]))[0, 1]


def test_errors_name_the_value():
    tokenizer = UniformBins(1, 2, 8)
    with pytest.raises(ValueError, match=r"id 8 is not an action token; valid: 0\.\.7"):
        tokenizer.decode(np.array([3, 8]))
    with pytest.raises(ValueError, match="2 tokens, got 3"):
        tokenizer.decode(np.array([3, 1, 1]))
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.encode(np.array([[0.0, np.nan]]))
    with pytest.raises(ConfigError, match="Did you mean 'uniform'"):
        build({"name": "unifrom", "horizon": 1, "action_dim": 2, "n_bins": 8})


@pytest.mark.parametrize("sigma", [0.5, 4.0])
def test_soft_targets_are_gaussians_around_each_id(sigma):
    targets = UniformBins(2, 3, 31).soft_targets(sigma).astype(np.float64)
    assert targets.shape == (31, 31) and (targets.argmax(1) == np.arange(31)).all()
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[15, 15 + 2] / targets[15, 15], np.exp(-2 / sigma**2), rtol=1e-5)
    if sigma == 4.0:  # far from the ends, the standard deviation is sigma
        assert np.sqrt(targets[15] @ (np.arange(31) - 15.0) ** 2) == pytest.approx(sigma, rel=0.01)
