"""The tokenizer `digits`: integers, digit by digit."""

import numpy as np
import pytest

from vla.errors import ConfigError
from vla.transforms.tokenizers.digits import Digits


def test_numbers_are_written_with_leading_zeros():
    tokenizer = Digits(2, 2)
    chunk = np.array([[-1, 1], [0.001, -0.99]])
    ids = tokenizer.encode(chunk)
    assert ids.reshape(4, 3).tolist() == [[0, 0, 0], [9, 9, 9], [5, 0, 0], [0, 0, 5]]
    np.testing.assert_allclose(tokenizer.decode(ids), chunk, atol=1 / 999)
    np.testing.assert_array_equal(tokenizer.decode(ids[:6]), tokenizer.decode(ids)[:1])  # only the first action


def test_round_trip():
    tokenizer = Digits(1, 1)
    ids = np.arange(1000)[:, None] // [100, 10, 1] % 10
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)


def test_invalid_arguments_are_rejected():
    with pytest.raises(ConfigError, match="has 10 ids, not 255"):
        Digits.fit(np.zeros((3, 2)), 4, 255)
    with pytest.raises(ValueError, match="between 1 and 6, got 7"):
        Digits(1, 1, 7)
