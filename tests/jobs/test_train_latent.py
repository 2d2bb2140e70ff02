"""Training with a latent through the command line: the log contains its KL, and the exported policy uses it."""

import numpy as np
import pytest

from vla.cli import main
from vla.config import DecodingConfig
from vla.policy import Policy
from vla.support.run_folder import read_lines
from vla.training import trainer

TINY = "--backbone tiny-init --horizon 4 --bins 31 --batch-size 4 --precision float32 --warmup-steps 1"


@pytest.fixture(scope="module")
def demos(robot, dataset):
    return dataset("squares", robot)


def train(demos, out, *arguments: str) -> int:
    return main(["train", "--data", str(demos), "--out", str(out), *TINY.split(), *arguments])


def test_the_log_shows_the_kl_and_the_policy_has_the_latent(demos, tmp_path, observations, capsys):
    latent = ["--latent", "chunk", "--latent-bits", "3", "--latent-kappa", "0.01", "--learning-rate", "0.01"]
    flags = [*latent, "--log-every", "2", "--eval-every", "4", "--save-every", "4", "--val-fraction", "0.2"]
    assert train(demos, tmp_path / "run", *flags, "--steps", "4") == 0
    assert "3 bits per chunk, 0.01 of them free" in capsys.readouterr().out
    rows = read_lines(tmp_path / "run" / trainer.METRICS)
    logged = [row for row in rows if "loss" in row]
    for row in logged:
        assert (
            0 <= row["kl"] <= 3 and row["loss"] >= row["cross_entropy"] - 1e-4 and row["elbo"] <= -row["cross_entropy"]
        )
    assert {"eval_kl", "eval_elbo", "eval_cross_entropy"} <= set(rows[-1])
    decoding = [DecodingConfig(latent=(code,)) for code in (0, 7)]
    low, high = (Policy.from_pretrained(str(tmp_path / "run"), decoding=given) for given in decoding)
    assert np.abs(low.network.latent.injection.detach().numpy()).sum() > 0  # it was trained
    predictions = [policy.predict(observations(1), ["go to square 1"]) for policy in (low, high)]
    assert (predictions[0].log_probs != predictions[1].log_probs).any()


def test_invalid_latents(demos, tmp_path, capsys):
    cases = {
        "--latent token --latent-kappa 0": "latent_kappa must be positive, got 0",
        "--latent token --latent-bits 20": "has 1 to 16 bits, got 20",
        "--latent per-step": "per-step",
        "--latent chunk --compile": "a network with a latent cannot be compiled",
    }
    for flags, message in cases.items():
        assert train(demos, tmp_path / "run", *flags.split()) == 2, flags
        assert message in capsys.readouterr().err.replace("\n", " "), flags
    assert not (tmp_path / "run").exists()
