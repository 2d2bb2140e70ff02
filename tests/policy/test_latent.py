"""The latent of a chunk: drawn from a seed once per episode or per chunk, or given."""

import numpy as np
import pytest
import torch

from vla.config import DecodingConfig
from vla.errors import ConfigError
from vla.policy import Policy, checkpoint
from vla.policy.session import LatentDraw, Session, predict


def free(nano, kind, **options):
    """A policy whose tokens depend on its latent."""
    network, processor = nano
    network.add_latent(kind, bits=6, form="one_hot", kappa=1.0)
    torch.nn.init.normal_(network.latent.injection, std=10)
    return Policy(network, processor, n_action_steps=4, **options)


def codes(policy, observation, latent, n=2):
    """The codes of the chunks of one episode."""
    session, seen, decoder = Session("reach", latent), [], policy._decoder
    policy._decoder = lambda request: seen.append(request.batch["latent"][0]) or decoder(request)
    for _ in range(n):
        predict(policy, [session], [observation])
        session.advance(4)
    policy._decoder = decoder
    assert all((row >= 0).sum() == 16 and (row[-16:] >= 0).all() for row in seen)  # the positions that predict a token
    return [tuple(row[-16:].tolist()) for row in seen]


@pytest.mark.parametrize("kind", ["token", "chunk", "episode"])
def test_a_session_draws_from_its_seed(nano, observations, kind):
    policy, (observation,) = free(nano, kind), observations(1)
    first = codes(policy, observation, LatentDraw(seed=7))
    assert (len(set(first)) == 1) == (kind == "episode")
    assert all((len(set(chunk)) == 1) == (kind != "token") for chunk in first)
    assert codes(policy, observation, LatentDraw(seed=7)) == first
    assert codes(policy, observation, LatentDraw(seed=8)) != first
    other = Policy(policy.network, policy.processor, decoding=DecodingConfig(sampling_seed=1))
    assert codes(other, observation, LatentDraw(seed=7)) != first


def test_given_codes_are_kept(nano, observations, tmp_path):
    policy, (observation,) = free(nano, "chunk"), observations(1)
    given = codes(policy, observation, LatentDraw(codes=(5,)))
    assert given == [(5,) * 16] * 2
    checkpoint.save(policy.network, policy.processor, tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy", decoding=DecodingConfig(latent=(5,)))
    assert codes(loaded, observation, LatentDraw(seed=3)) == given


def test_each_row_of_a_batch_has_its_own_latent(nano, observations):
    policy, (observation,) = free(nano, "episode"), observations(1)
    sessions = [Session("reach", LatentDraw(codes=(code,))) for code in (1, 2)]
    both = predict(policy, sessions, [observation] * 2)
    for row, code in enumerate((1, 2)):
        alone = predict(policy, [Session("reach", LatentDraw(codes=(code,)))], [observation])
        np.testing.assert_allclose(both.log_probs[row], alone.log_probs[0], atol=1e-4)
    assert abs(both.log_probs[0] - both.log_probs[1]).max() > 1e-3
    predicted = policy.predict([observation], ["reach"])
    scored = policy.score([observation], ["reach"], predicted.chunks)  # with the same latent
    np.testing.assert_allclose(scored.log_probs, predicted.log_probs, atol=0.02)


def test_invalid_codes(nano, observations):
    with pytest.raises(ConfigError, match=r"got latent codes \[1\], but this policy has no latent"):
        Policy(*nano, decoding=DecodingConfig(latent=(1,)))
    with pytest.raises(ConfigError, match=r"1 or 16 codes between 0 and 63, got \[64\]"):
        free(nano, "token", decoding=DecodingConfig(latent=(64,)))
    policy = Policy(*nano)
    with pytest.raises(ConfigError, match=r"1 or 16 codes between 0 and 63, got \[1, 2\]"):
        codes(policy, observations(1)[0], LatentDraw(codes=(1, 2)))
