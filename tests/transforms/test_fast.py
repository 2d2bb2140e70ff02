"""FAST: the published transform, and valid sequences."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers.decoders import ByteLevel

from tests.fast_files import publish, texts
from vla.config import ModelConfig
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.model.sources.fast_files import load_fast
from vla.policy import Policy, checkpoint
from vla.transforms.tokenizers.base import TOKENIZERS, build
from vla.transforms.tokenizers.fast import Fast, dct_matrix


def smooth(rng, count, horizon, dims=3):
    """Chunks of slow sine waves."""
    time, phase = np.linspace(0, 1, horizon)[:, None], rng.uniform(0, 6, (count, 1, dims))
    return np.sin(rng.uniform(1, 4, (count, 1, dims)) * time + phase) * rng.uniform(0.2, 1, (count, 1, dims))


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    return Fast.fit(smooth(np.random.default_rng(0), 300, 16).reshape(-1, 3), 16)


@pytest.mark.parametrize("horizon", [1, 2, 8, 50])
def test_the_transform_is_the_published_one(horizon):
    """DCT-II, orthonormal: C_k = s_k sum_n x_n cos(pi (2n + 1) k / 2N), s_0 = sqrt(1/N), s_k = sqrt(2/N)."""
    signal = np.random.default_rng(1).uniform(-1, 1, horizon)
    for k, coefficient in enumerate(dct_matrix(horizon) @ signal):
        total = sum(signal[n] * np.cos(np.pi * (2 * n + 1) * k / (2 * horizon)) for n in range(horizon))
        assert coefficient == pytest.approx(total * np.sqrt((1 if k == 0 else 2) / horizon))
    assert_allclose(dct_matrix(horizon) @ dct_matrix(horizon).T, np.eye(horizon), atol=1e-12)


def test_coefficients_are_ordered_by_frequency(tokenizer):
    """A wave with the lowest frequency in one dimension has one nonzero coefficient."""
    chunk = np.zeros((16, 3))
    chunk[:, 1] = 0.8
    ids = tokenizer.encode(chunk)
    codes = [code + tokenizer._lowest for id in ids if id != tokenizer.end for code in tokenizer._pieces[id]]
    assert codes == [0, 32, *[0] * 46]  # 10 * 0.8 * sqrt(16)
    assert_allclose(tokenizer.decode(ids), chunk, atol=1e-6)


def test_the_error_is_that_of_rounding_the_coefficients(tokenizer):
    chunks = smooth(np.random.default_rng(2), 200, 16)
    decoded = tokenizer.decode(tokenizer.encode(chunks))
    coefficients = np.rint(10 * dct_matrix(16) @ chunks) / 10
    assert_allclose(decoded, np.clip(dct_matrix(16).T @ coefficients, -1, 1), atol=1e-6)
    assert np.abs(decoded - chunks).max() < 0.15


def test_smooth_chunks_are_short(tokenizer):
    tokens = (tokenizer.encode(smooth(np.random.default_rng(3), 100, 16)) != tokenizer.end).sum(-1)
    assert tokenizer.max_tokens == 48 and tokens.mean() < 24


@given(st.integers(0, 10_000))
def test_every_chunk_has_a_sequence_and_every_sequence_a_chunk(seed):
    rng = np.random.default_rng(seed)
    tokenizer = Fast.fit(rng.uniform(-1, 1, (60, 2)), 3, 60)
    corners = rng.choice([-1.0, 1.0], (8, 3, 2))  # these have the largest coefficients
    assert np.abs(tokenizer.decode(tokenizer.encode(corners)) - corners).max() < 0.2
    ids = np.zeros((8, 0), np.int64)
    while ids.shape[1] < tokenizer.max_tokens:
        allowed = tokenizer.allowed(ids)[:, -1]
        ids = np.concatenate([ids, np.where(allowed, rng.random(allowed.shape), -1).argmax(-1)[:, None]], axis=1)
    assert np.isfinite(tokenizer.decode(ids)).all()


def test_sequences_with_too_few_or_too_many_coefficients_are_rejected(tokenizer):
    ids = tokenizer.encode(np.zeros((16, 3)))
    length = int((ids != tokenizer.end).sum())
    early = ids.copy()
    early[length - 1] = tokenizer.end
    with pytest.raises(ValueError, match=f"is not allowed at position {length - 1}"):
        tokenizer.decode(early)
    with pytest.raises(ValueError, match=f"is not allowed at position {length}"):
        tokenizer.decode(np.concatenate([ids[:length], [0], ids[length + 1 :]]))


def test_invalid_arguments():
    values = Fast.fit(np.random.default_rng(0).uniform(-1, 1, (100, 2)), 4).to_dict()
    assert_array_equal(build(values).encode(np.full((4, 2), 0.3)), build(values).encode(np.full((4, 2), 0.3)))
    for change, message in (
        ({"scale": 0}, "scale must be positive"),
        ({"merges": [[0, 900]]}, r"merge \(0, 900\) refers to an id"),
        ({"merges": [[0, 1], [0, 1]]}, "same coefficients"),
    ):
        with pytest.raises(ValueError, match=message):
            build(values | change)
    with pytest.raises(ConfigError, match=r"at least 144 ids .* for chunks of 50 actions, got 100"):
        TOKENIZERS.get("fast").fit(np.zeros((100, 2)), 50, 100)


# Published files ------------------------------------------------------------------------------------------------------


def test_a_published_tokenizer_splits_chunks_into_the_same_pieces(tmp_path):
    rng = np.random.default_rng(4)
    published = publish(tmp_path / "fast", smooth(rng, 2000, 16))
    ours, chunks = load_fast(str(tmp_path / "fast"), 16, 3, 2048), smooth(rng, 100, 16)
    assert_allclose(ours.decode(ours.encode(chunks)), chunks, atol=0.15)
    same = 0
    for text, ids in zip(texts(chunks, -354), ours.encode(chunks), strict=True):
        pieces = [ByteLevel().decode([token]) for token in published.encode(text).tokens]
        if not any("\ufffd" in piece for piece in pieces):
            expected = [[ord(character) - 354 for character in piece] for piece in pieces]
            own = [[code + ours._lowest for code in ours._pieces[id]] for id in ids if id != ours.end]
            assert own == expected
            same += 1
    assert same > 60
    few = load_fast(str(tmp_path / "fast"), 16, 3, 100)
    assert few.vocab_size == 100 and few.merges == ours.merges[: len(few.merges)]
    rebuilt = build(json.loads(json.dumps(ours.to_dict())))
    assert_array_equal(rebuilt.encode(chunks), ours.encode(chunks))


def test_published_files_that_are_missing_or_damaged(tmp_path):
    folder = tmp_path / "fast"
    publish(folder, smooth(np.random.default_rng(5), 100, 8), vocab_size=300)
    with pytest.raises(ConfigError, match="needs at least 60 ids"):
        load_fast(str(folder), 8, 3, 59)
    with pytest.raises(ConfigError, match=r"no action tokenizer .*fist.*Did you mean .*fast"):
        load_fast(str(tmp_path / "fist"), 8, 3, 256)
    (folder / "processor_config.json").write_text('{"scale": 10}')
    with pytest.raises(ConfigError, match=r"processor_config\.json has no min_token"):
        load_fast(str(folder), 8, 3, 256)
    (folder / "tokenizer.json").write_text('{"model": {}')
    (folder / "processor_config.json").write_text('{"min_token": -354}')
    with pytest.raises(ConfigError, match="is not a FAST tokenizer"):
        load_fast(str(folder), 8, 3, 256)
    (folder / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="is not a FAST tokenizer"):
        load_fast(str(folder), 8, 3, 256)


@pytest.mark.parametrize("backbone", ["nano-init", "nano"])
def test_a_policy_with_a_published_tokenizer(backbone, facts, observations, tmp_path):
    publish(tmp_path / "fast", smooth(np.random.default_rng(6), 500, 8))
    network, processor = build_policy(ModelConfig(backbone=backbone, tokenizer=str(tmp_path / "fast")), facts)
    checkpoint.save(network, processor, tmp_path / "policy")
    shutil.rmtree(tmp_path / "fast")  # the checkpoint is complete
    policy = Policy.from_pretrained(str(tmp_path / "policy"), device="cpu")
    assert policy.processor.action_tokenizer.vocab_size == 256
    ids = policy.predict(observations(2), ["reach", "open"]).ids
    np.testing.assert_array_equal(ids, Policy(network, processor).predict(observations(2), ["reach", "open"]).ids)


def test_a_folder_named_like_a_tokenizer_is_not_read(facts, tmp_path, monkeypatch):
    (tmp_path / "fast").mkdir()
    monkeypatch.chdir(tmp_path)
    _, processor = build_policy(ModelConfig(backbone="nano-init", tokenizer="fast"), facts)
    assert isinstance(processor.action_tokenizer, Fast)
