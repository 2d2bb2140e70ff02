"""`vla analyze latent`: rollouts of the same seeds under several codes."""

import json

import numpy as np
import pytest
import torch

from tests.pointworld import ENV_ID
from vla.cli import main
from vla.config import ModelConfig
from vla.model.build import DataFacts, build_policy
from vla.policy import checkpoint
from vla.simulation.adapter import make
from vla.transforms.normalize import compute_statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy for the point world whose actions depend on its latent."""
    robot = make(f"tests.pointworld:{ENV_ID}").robot
    actions = np.random.default_rng(0).uniform(-1, 1, (100, robot.action_dim)).astype(np.float32)
    statistics = {"points": {"action": compute_statistics(actions), "state": compute_statistics(actions[:, :2])}}
    torch.manual_seed(0)
    model = ModelConfig(backbone="tiny-init", horizon=4, n_action_steps=4, bins=31, latent="episode", latent_bits=2)
    network, processor = build_policy(model, DataFacts(robot, statistics, {"points": actions}))
    with torch.no_grad():
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    torch.nn.init.normal_(network.latent.injection, std=100)
    policy = tmp_path_factory.mktemp("latent") / "policy"
    checkpoint.save(network, processor, policy)
    return policy


def test_every_code_has_its_path(folder, tmp_path, capsys):
    flags = ["--policy", str(folder), "--env", f"tests.pointworld:{ENV_ID}", "--episodes", "1", "--seed", "3"]
    assert main(["analyze", "latent", *flags, "--out", str(tmp_path / "out")]) == 0
    info = json.loads((tmp_path / "out" / "latent.json").read_text())
    runs = {(row["seed"], row["code"]): row["path"] for row in info["rollouts"]}
    assert set(runs) == {(3, code) for code in range(4)}
    assert len({str(runs[3, code]) for code in range(4)}) > 1  # different codes have different paths
    assert len({str(runs[3, code][0]) for code in range(4)}) == 1  # all from the same start
    assert (tmp_path / "out" / "latent.png").stat().st_size > 10_000
    assert "by code" in capsys.readouterr().out


def test_invalid_arguments(folder, nano, tmp_path, capsys):
    checkpoint.save(*nano, tmp_path / "plain")
    for arguments, message in (
        ([str(tmp_path / "plain")], "has no latent"),
        ([str(folder), "--codes", "4"], "1 code between 0 and 3, got [4]"),
        ([str(folder), "--axes", "x", "z"], "state 'z'"),
    ):
        flags = ["--env", f"tests.pointworld:{ENV_ID}", "--out", str(tmp_path / "out"), "--policy", *arguments]
        assert main(["analyze", "latent", *flags]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
