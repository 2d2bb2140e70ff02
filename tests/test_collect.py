"""`vla collect`: the dataset depends on the configuration alone, whatever happens on the way."""

import filecmp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.pointworld import ENV_ID, read
from vla import collect as collecting
from vla.collect import attempt, collect
from vla.config import AdapterConfig, CollectConfig, dump
from vla.data.reader import Demonstrations
from vla.data.staging import finished
from vla.errors import ConfigError, DataError, SimulatorError

ROOT = Path(__file__).parents[1]


def config(out: Path, episodes: int = 6, workers: int = 1, kwargs: dict | None = None, **values) -> CollectConfig:
    adapter = values.pop("adapter", AdapterConfig(module="tests.pointworld", kwargs=kwargs or {}))
    return CollectConfig(env=(ENV_ID,), out=out, episodes=episodes, workers=workers, adapter=adapter, **values)


def same_files(a: Path, b: Path) -> bool:
    paths = [path for folder in ("data", "meta", "videos") for path in (a / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(a) for path in paths]
    return len(names) == 6 and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def start(values: CollectConfig, tmp_path: Path) -> subprocess.Popen:
    """`vla collect` in a process group of its own."""
    dump(values, tmp_path / "collect.yaml")
    command = [sys.executable, "-m", "vla.cli", "collect", "--config", str(tmp_path / "collect.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(out: Path, episodes: int) -> None:
    deadline = time.monotonic() + 30
    while len(finished(out / ".partial")) < episodes:
        assert time.monotonic() < deadline, "no episode was finished in 30 s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """A reference: one worker, never interrupted; seeds 1 and 3 have to be replaced."""
    out = tmp_path_factory.mktemp("collect") / "noisy"
    return collect(config(out, 12, noise=0.5, kwargs=SOME_FAIL))


SOME_FAIL = {"unsolvable": [1], "raise_on": [3], "delay": 0.004}


def test_frames_are_what_the_expert_saw_and_did(noisy):
    demos = Demonstrations(noisy)
    assert len(demos.episodes) == 12 and all(episode.success for episode in demos.episodes)
    assert {episode.instruction for episode in demos.episodes} == {"go to the red goal", "go to the green goal"}
    for episode in demos.episodes:
        seen = [read(image) for image in demos.frames(episode.index, "front")]
        states, sent = demos.states[episode.rows], demos.executed_actions[episode.rows]
        assert np.abs(np.array(seen) - states[:, 0]).max() < 0.02, "an image belongs to another state"
        assert np.allclose(np.clip(states[:-1] + 0.1 * sent[:-1, :2], 0, 1), states[1:], atol=1e-5)
        clean = np.allclose(sent, demos.actions[episode.rows])
        assert clean == (episode.noise == 0)
    assert np.abs(demos.executed_actions).max() <= 1  # clipped to what the environment can execute
    assert sum(episode.noise > 0 for episode in demos.episodes) == 6


def test_failures_are_replaced_and_reported(noisy):
    seeds = [episode.seed for episode in Demonstrations(noisy).episodes]
    assert seeds == [0, 1_000_001, 2, 1_000_003, *range(4, 12)]
    failures = (noisy / "failures.jsonl").read_text().splitlines()
    assert len(failures) == 2
    assert "not solved after 60 steps" in failures[0] and "the simulation is unstable" in failures[1]


def test_workers_do_not_change_the_dataset(noisy, tmp_path):
    assert same_files(noisy, collect(config(tmp_path / "set", 12, 3, noise=0.5, kwargs=SOME_FAIL)))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interruption_does_not_change_the_dataset(noisy, tmp_path, how):
    values = config(tmp_path / "set", 12, 2, noise=0.5, kwargs=SOME_FAIL)
    process = start(values, tmp_path)
    wait_for(values.out, 4)
    process.send_signal(how)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    if how != signal.SIGKILL:
        assert "--resume" in error and "of 12 episodes are finished" in error and "Traceback" not in error
    with pytest.raises(DataError, match="not finished"):
        Demonstrations(values.out)
    with pytest.raises(DataError, match="--resume"):
        collect(values)
    resumed = config(tmp_path / "set", 12, 2, noise=0.5, kwargs=SOME_FAIL, resume=True)
    assert same_files(noisy, collect(resumed))
    assert collect(resumed) == values.out  # finished: nothing to do


def test_a_worker_that_dies_is_replaced(tmp_path):
    out = collect(config(tmp_path / "set", 4, 2, kwargs={"die_on": [2]}))
    assert [episode.seed for episode in Demonstrations(out).episodes] == [0, 1, 1_000_002, 3]
    assert "the worker process died (exit code 9)" in (out / "failures.jsonl").read_text()


def test_failures_can_be_kept(tmp_path, capsys):
    out = collect(config(tmp_path / "set", 3, keep="all", kwargs={"unsolvable": [1]}))
    assert [episode.success for episode in Demonstrations(out).episodes] == [True, False, True]
    assert "67% of the expert's episodes succeeded" in " ".join(capsys.readouterr().err.split())


def test_another_plan_is_not_continued(tmp_path):
    process = start(config(tmp_path / "set", 500, kwargs={"delay": 0.01}), tmp_path)
    wait_for(tmp_path / "set", 2)
    process.kill()
    process.communicate()
    with pytest.raises(ConfigError, match="started with seed = 0, not 7"):
        collect(config(tmp_path / "set", 2, seed=7, resume=True, kwargs={"delay": 0.01}))
    out = collect(config(tmp_path / "set", 2, resume=True, kwargs={"delay": 0.01}))  # fewer episodes are fine
    assert len(Demonstrations(out).episodes) == 2
    with pytest.raises(ConfigError, match=r"finished with 2 episodes and cannot grow to 9.*--seed 2"):
        collect(config(tmp_path / "set", 9, resume=True, kwargs={"delay": 0.01}))


def test_hopeless_runs_end_with_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "HOPELESS", 4)
    monkeypatch.setattr(collecting, "BROKEN", 2)
    lost = {"unsolvable": [n + turn * 1_000_000 for n in range(2) for turn in range(9)]}
    with pytest.raises(SimulatorError, match=r"solved none of the first 4 episodes.*adapter\.success"):
        collect(config(tmp_path / "a", 2, kwargs=lost))
    with pytest.raises(
        SimulatorError, match=r"all of the first 2 episodes ended in an error.*the simulation is unstable"
    ):
        collect(config(tmp_path / "b", 2, kwargs={"raise_on": lost["unsolvable"]}))


def test_environments_that_cannot_be_made(tmp_path):
    with pytest.raises(SimulatorError, match="unknown environment"):
        collect(
            CollectConfig(env=("test/Pointt-v0",), out=tmp_path / "a", adapter=AdapterConfig(module="tests.pointworld"))
        )
    with pytest.raises(SimulatorError, match="cannot load expert"):
        collect(
            config(tmp_path / "b", adapter=AdapterConfig(module="tests.pointworld", expert="tests.pointworld:none"))
        )


@pytest.mark.parametrize(("name", "value"), [("episodes", 0), ("noise", -1.0), ("noise_share", 1.5), ("workers", -1)])
def test_values_that_make_no_sense(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name} must "):
        collect(CollectConfig(out=tmp_path / "set", **{name: value}))


def test_episodes_and_noise_are_spread_over_environments():
    values = CollectConfig(env=("a", "b"), episodes=40, noise=0.3, noise_share=0.25)
    attempts = [attempt(values, number, 0) for number in range(40)]
    for env_id in ("a", "b"):
        mine = [tried for tried in attempts if tried.env_id == env_id]
        assert len(mine) == 20 and sum(tried.noise > 0 for tried in mine) == 5
    seeds = {attempt(values, number, turn).seed for number in range(40) for turn in range(50)}
    assert len(seeds) == 2000
