"""The three jobs of the README through the command line, with a tiny network."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla import cli
from vla.training.trainer import last_checkpoint


def refused(capsys, *arguments: str | Path) -> str:
    """Run a command that must fail, and return its error message."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.count("vla: ") == 1 and "Traceback" not in said
    return said


def test_collect_train_kill_resume_rollout(tmp_path, capsys, start_vla, run_vla):
    demos, run, report = tmp_path / "demos", tmp_path / "run", tmp_path / "report"
    collected = run_vla("collect", "--env", "vla/Reach-v0", "--episodes", 4, "--out", demos, "--workers", 2)
    assert collected.returncode == 0, collected.stderr
    assert "4 episodes" in " ".join(collected.stderr.split())  # independent of the terminal's width

    train = ["train", "--data", demos, "--out", run, "--backbone", "tiny-init", "--method", "full"]
    train += ["--image-size", 24, "--horizon", 2, "--n-action-steps", 2]
    train += ["--steps", 16, "--batch-size", 2, "--save-every", 2]
    process = start_vla(*train)
    while last_checkpoint(run) is None and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "policy").exists(), "the run ended before it was killed"

    assert "--resume" in refused(capsys, *train)
    resumed = run_vla(*train, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 16

    rolled = run_vla(
        *("rollout", "--policy", run, "--env", "vla/Reach-v0", "--out", report),
        *("--episodes", 2, "--n-envs", 2, "--max-steps", 20),
    )
    assert rolled.returncode == 0, rolled.stderr[-2000:]
    info = json.loads((report / "eval_info.json").read_text())
    assert [episode["seed"] for episode in info["per_episode"]] == [100_000, 100_001]
    assert (report / "report.html").stat().st_size > 10_000


def test_quickstart_runs_again_and_writes_only_to_its_folder(tmp_path, capsys, run_vla):
    out = tmp_path / "quick"
    command = ["quickstart", "--out", out, "--demonstrations", 3, "--minutes", 0, "--min-steps", 2, "--episodes", 1]
    command += ["--env", "vla/Reach-v0"]
    first = run_vla(*command)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "zero-shot" in first.stdout and "fine-tuned" in first.stdout and "report.html" in first.stdout
    (out / "after" / "eval_info.json").unlink()
    start = time.monotonic()
    again = run_vla(*command)
    assert again.returncode == 0 and "fine-tuned" in again.stdout
    assert (out / "after" / "report.html").is_file() and time.monotonic() - start < 60
    assert "other settings" in refused(capsys, *command, "--env", "vla/Stack-v0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "--out" in refused(capsys, "quickstart", "--out", tmp_path / "mine", "--fresh")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_replay_of_recorded_actions_succeeds(tmp_path, run_vla):
    assert run_vla("collect", "--env", "vla/PickUp-v0", "--episodes", 2, "--out", tmp_path / "demos").returncode == 0
    replayed = run_vla("replay", "--data", tmp_path / "demos", "--episodes", 2)
    assert replayed.returncode == 0, replayed.stderr
    assert "2 of 2" in replayed.stdout + replayed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout", "--policy", "/nowhere/at/all"], "no such folder"),
        (["rollout", "--env", "vla/PikUp-v0"], "Did you mean 'vla/PickUp-v0'"),
        (["rollout", "--device", "cuda", "--episodes", "1"], "not available"),
        (["train", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_invalid_arguments_are_one_message(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert message in refused(capsys, *arguments, "--out", tmp_path / "out")


def test_an_unknown_verb_exits_with_2():
    result = subprocess.run([sys.executable, "-m", "vla.cli", "colect"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Did you mean 'collect'" in result.stderr
