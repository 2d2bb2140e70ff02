"""`vla analyze tokenizers` through the command line."""

import json

import numpy as np
import pytest

from vla import cli
from vla.jobs.analyze_tokenizers import measure
from vla.transforms.normalize import Normalizer, compute_statistics
from vla.transforms.tokenizers.base import TOKENIZERS


def test_the_job_compares_all_tokenizers(dataset, robot, tmp_path, capsys):
    flags = ["--data", dataset("squares", robot), "--out", tmp_path / "out", "--horizons", 4, 16]
    flags += ["--tokenizers", "uniform", "openvla", "quantile", "fast", "spline", "pca"]
    assert cli.main(["analyze", "tokenizers", *map(str, flags)]) == 0
    info = json.loads((tmp_path / "out" / "tokenizers.json").read_text())
    assert [(row["horizon"], row["tokenizer"]) for row in info["rows"]] == [
        (horizon, name) for horizon in (4, 16) for name in ("uniform", "openvla", "quantile", "fast", "spline", "pca")
    ]
    assert info["skipped"] == [] and all(row["undecodable"] == 0 for row in info["rows"])
    assert (tmp_path / "out" / "tokenizers.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "spline" in out and "do not decode: 0 %" in out
    assert cli.main(["analyze", "tokenizers", *map(str, flags[:2]), "--tokenizers", "fist"]) == 2
    assert "Did you mean 'fast'" in capsys.readouterr().err


def test_errors_are_in_the_robots_units():
    actions = np.random.default_rng(0).uniform(-1, 1, (4000, 3)) * [2.0, 0.1, 0.0]
    normalizer = Normalizer.from_statistics(compute_statistics(actions), "min_max")
    chunks = normalizer.normalize(actions).reshape(-1, 4, 3)
    tokenizer = TOKENIZERS.get("uniform").fit(chunks.reshape(-1, 3), 4, 51, [0, 1])
    row = measure(tokenizer, chunks, normalizer)
    assert row["tokens"] == row["max_tokens"] == 8 and row["used"] == 1
    assert row["max_error"] == pytest.approx([2 / 51, 0.1 / 51, 0], rel=0.02)  # half a bin
    assert row["mse"] == pytest.approx((2 / 51) ** 2 / 12, rel=0.05)
    assert row["bits"] == pytest.approx(np.log2(51), rel=0.01)
