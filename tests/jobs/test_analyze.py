"""`vla analyze exposure`: the error rates, and the job through the command line."""

import json

import numpy as np
import pytest

from vla import cli
from vla.config import ExposureConfig
from vla.data.samples import Sample
from vla.errors import ConfigError, SpecError
from vla.jobs.analyze import exposure, measure
from vla.policy import Policy, checkpoint


def sample(observation, chunk, valid=4):
    images = np.stack([observation["pixels"][camera] for camera in ("front", "wrist")])
    return Sample(images, observation["agent_pos"], chunk, np.arange(4) < valid, "reach", 0)


def test_no_errors_if_the_demonstration_equals_the_prediction(nano, observations):
    policy = Policy(*nano)
    chunks = policy.predict(observations(6), ["reach"] * 6).chunks
    found = measure(policy, [sample(o, c, valid=3) for o, c in zip(observations(6), chunks, strict=True)])
    assert not found.forced.any() and not found.free.any()
    np.testing.assert_array_equal(found.learned, np.tile(np.arange(16) < 12, (6, 1)))
    assert (found.outside > 0).all() and (found.outside < 1).all()


def test_errors_are_counted_at_their_positions(nano, observations):
    """One token is replaced: both error rates are 1 at its position and 0 before it."""
    network, processor = nano
    policy = Policy(network, processor)
    ids = policy.predict(observations(1), ["reach"]).ids
    begin = network.config.action_token_begin
    ids[0, 6] = begin + (ids[0, 6] - begin + 9) % 31
    found = measure(policy, [sample(observations(1)[0], processor.decode_actions(ids)[0])])
    assert found.forced[0, :7].tolist() == found.free[0, :7].tolist() == [False] * 6 + [True]
    assert not found.free[0, 7:].any()  # the prediction continues as in the demonstration
    scored = policy.score(observations(1), ["reach"], processor.decode_actions(ids))
    assert scored.log_probs[0, 6] < np.log(0.5)


def test_the_job_writes_results_and_a_plot(nano, dataset, robot, tmp_path, capsys):
    checkpoint.save(*nano, tmp_path / "policy")
    flags = [
        "--policy",
        tmp_path / "policy",
        "--data",
        dataset("squares", robot),
        "--out",
        tmp_path / "out",
        "--frames",
        40,
    ]
    assert cli.main(["analyze", "exposure", *map(str, flags)]) == 0
    info = json.loads((tmp_path / "out" / "exposure.json").read_text())
    assert info["frames"] == 40 and info["tokens_per_action"] == 4
    assert len(info["free_running_error"]["by_position"]) == 16
    assert len(info["free_running_error"]["by_step"]) == len(info["steps"]) > 1
    # The first token has no earlier tokens, so both rates are equal.
    assert info["free_running_error"]["by_position"][0] == info["teacher_forced_error"]["by_position"][0]
    assert (tmp_path / "out" / "exposure.png").stat().st_size > 10_000
    assert "teacher-forced" in capsys.readouterr().out


def test_invalid_arguments_are_rejected(nano, dataset, robot, tmp_path):
    data = dataset("squares", robot)
    checkpoint.save(*nano, tmp_path / "policy")
    with pytest.raises(ConfigError, match="frames must be at least 1"):
        exposure(ExposureConfig(policy=str(tmp_path / "policy"), data=data, frames=0))
    with pytest.raises(SpecError, match=r"the policy's action has 7 entries .*The names differ"):
        network, processor = nano
        network.config.robot["action_names"] = [f"a{i}" for i in range(6)] + ["dx"]
        checkpoint.save(network, processor, tmp_path / "other")
        exposure(ExposureConfig(policy=str(tmp_path / "other"), data=data, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
