"""Principal components: optimal patterns, ordered sequences, and decoding with a deadline."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList

from vla.config import DecodingConfig, ModelConfig
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.policy import Policy
from vla.transforms.tokenizers.components import RESIDUAL, Components

H = 8


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    """Slow sine waves in two dimensions with a little noise, and a constant third dimension."""
    rng, time = np.random.default_rng(0), np.arange(2000)[:, None]
    waves = np.sin(time / [7.0, 13.0, 1.0] + [0, 1, 2]) * [0.9, 0.4, 0.0]
    return np.clip(waves + rng.normal(0, 0.003, waves.shape), -1, 1)


@pytest.fixture(scope="module")
def tokenizer(actions) -> Components:
    return Components.fit(actions, H, active=[0, 1])


def windows(actions: np.ndarray) -> np.ndarray:
    return np.stack([actions[i : i + H] for i in range(0, len(actions) - H, 11)])


def test_patterns_are_the_first_singular_vectors(actions, tokenizer):
    steps = np.minimum(np.arange(len(actions))[:, None] + np.arange(H), len(actions) - 1)
    chunks = actions[steps][..., [0, 1]].reshape(-1, 2 * H)
    _, values, right = np.linalg.svd(chunks - chunks.mean(0), full_matrices=False)
    count = len(tokenizer.patterns)
    np.testing.assert_allclose(np.abs(np.sum(right[:count] * tokenizer.patterns, axis=1)), 1, atol=1e-4)
    left = [np.sqrt(np.sum(values[n:] ** 2) / chunks.size) for n in (count - 1, count)]
    assert left[0] > RESIDUAL >= left[1] and count < 2 * H


def test_each_token_adds_detail(actions, tokenizer):
    chunks = windows(actions)
    ids = tokenizer.encode(chunks)
    errors = [np.mean((tokenizer.decode(ids[:, :n]) - chunks)[..., :2] ** 2) ** 0.5 for n in range(1, ids.shape[1] + 1)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 < 0.2 < errors[0]
    used = np.ptp(ids, axis=0)
    assert used[0] > 2 * used[-1]  # all coefficients have the same step, and later ones are smaller
    for bad in (ids[:, :0], np.concatenate([ids, ids[:, :1]], axis=1)):
        with pytest.raises(ValueError, match="a chunk has"):
            tokenizer.decode(bad)


def test_invalid_arguments_are_rejected(actions):
    with pytest.raises(ConfigError, match="odd number of bins, at least 3, got 254"):
        Components.fit(actions, H, 254)
    with pytest.raises(ValueError, match=r"chunks have 4 values, got a mean of \(3,\)"):
        Components(2, 2, 5, 1.0, [0, 0, 0], [[1, 0, 0, 0]])
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        Components(1, 1, 5, 0, [0], [[1]])


@pytest.fixture(scope="module")
def trained(facts):
    torch.manual_seed(0)
    return build_policy(ModelConfig(backbone="tiny-init", horizon=4, n_action_steps=2, tokenizer="pca"), facts)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["engine", "generate"])
def test_the_first_tokens_give_a_whole_chunk(trained, observations, temperature):
    processor = trained[1]
    words, total = ["reach"] * 2, processor.action_tokenizer.max_tokens
    whole = Policy(*trained, decoding=DecodingConfig(temperature=temperature)).predict(observations(2), words)
    config = DecodingConfig(temperature=temperature, max_tokens=3)
    part = Policy(*trained, decoding=config).predict(observations(2), words)
    np.testing.assert_array_equal(part.ids, whole.ids[:, :3])
    assert part.chunks.shape == whole.chunks.shape == (2, 4, 7) and whole.ids.shape[1] == total > 3
    again = Policy(*trained, decoding=config).predict(observations(2), words, drafts=part.next_draft)
    assert again.ids.shape == (2, 3)
    prompt = processor.observe(observations(1), ["reach"])["input_ids"].shape[1]
    stopped = Policy(*trained, decoding=dataclasses.replace(config, max_tokens=None)).predict(
        observations(2), words, stopping=StoppingCriteriaList([MaxLengthCriteria(prompt + 5)])
    )
    np.testing.assert_array_equal(stopped.ids, whole.ids[:, :5])


def test_decoding_stops_at_the_deadline(trained, observations, monkeypatch):
    """The clock advances 10 ms at each call. Decoding stops at 45 ms; with a deadline of 1 µs, after one token."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: next(ticks) / 100)
    whole = Policy(*trained).predict(observations(1), ["reach"])
    for deadline_ms, count in ((1e-3, 1), (45.0, 5), (1e6, whole.ids.shape[1])):
        policy = Policy(*trained, decoding=DecodingConfig(deadline_ms=deadline_ms))
        prediction = policy.predict(observations(1), ["reach"])
        np.testing.assert_array_equal(prediction.ids, whole.ids[:, :count])
        assert prediction.chunks.shape == (1, 4, 7)


@pytest.mark.parametrize("values", [{"max_tokens": 3}, {"deadline_ms": 10.0}])
def test_other_tokenizers_have_no_deadline(nano, values):
    with pytest.raises(ConfigError, match="such as 'pca'; this policy has 'uniform'"):
        Policy(*nano, decoding=DecodingConfig(**values))
