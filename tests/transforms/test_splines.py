"""B-splines: the basis, and curves that are represented exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from vla.transforms.tokenizers.splines import DEGREE, Splines, basis


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 4))
def test_the_basis_is_a_clamped_partition_of_unity(n, points, degree):
    points = min(n, points)
    values = basis(n, points, degree)
    assert values.shape == (n, points) and (values >= 0).all()
    assert_allclose(values.sum(1), 1)
    assert values[0, 0] == 1 and (n == 1 or values[-1, -1] == pytest.approx(1))
    assert np.linalg.matrix_rank(values) == points


def test_four_points_are_the_bernstein_polynomials():
    t = np.linspace(0, 1, 9)
    expected = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    assert_allclose(basis(9, 4, DEGREE), expected, atol=1e-12)


def test_a_cubic_motion_is_represented_exactly():
    time = np.linspace(0, 1, 16)[:, None]
    chunk = np.concatenate([0.7 - 1.2 * time + 0.9 * time**3, -0.4 + 0 * time], axis=1)
    tokenizer = Splines(16, 2, 255, 6)
    decoded = tokenizer.decode(tokenizer.encode(chunk))
    assert tokenizer.max_tokens == 12
    assert np.abs(decoded - chunk).max() < 0.01
    assert np.abs(decoded[0] - chunk[0]).max() <= 1.5 / 255 + 1e-6


def test_as_many_points_as_actions_have_only_the_error_of_bins():
    chunks = np.random.default_rng(0).uniform(-0.15, 0.15, (50, 5, 2))  # the control points stay in range
    tokenizer = Splines(5, 2, 255, 5)
    assert np.abs(tokenizer.decode(tokenizer.encode(chunks)) - chunks).max() < 0.02
    with pytest.raises(ValueError, match="n_points must be between 1 and the horizon 5, got 6"):
        Splines(5, 2, 255, 6)


def test_a_gripper_is_piecewise_constant():
    rng = np.random.default_rng(0)
    actions = np.stack([np.sin(np.arange(400) / 9), np.repeat(rng.choice([-1.0, 1.0], 50), 8)], axis=1)
    tokenizer = Splines.fit(actions, 8)
    assert tokenizer.switches == [1] and tokenizer.n_points == 4
    chunk = np.stack([np.full(8, 0.2), [-1, -1, -1, -1, 1, 1, 1, 1]], axis=1)
    decoded = tokenizer.decode(tokenizer.encode(chunk))
    assert np.abs(decoded - chunk).max() < 0.02
    assert tokenizer.decode(tokenizer.encode(-chunk))[:, 1] == pytest.approx(-decoded[:, 1], abs=1e-2)
