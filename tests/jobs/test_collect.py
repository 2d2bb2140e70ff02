"""`vla collect`: the dataset depends only on the configuration, whatever fails on the way."""

import filecmp
import json
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tests.forked import Process
from tests.pointworld import ENV_ID, PointWorld, read
from vla.config import AdapterConfig, CollectConfig, dump
from vla.data.reader import Demonstrations
from vla.data.staging import finished, open_staging
from vla.errors import ConfigError, DataError, SimulatorError, VLAError
from vla.jobs import collect as collecting
from vla.jobs.collect import attempt, collect


def config(out: Path, episodes: int = 6, workers: int = 1, kwargs: dict | None = None, **values) -> CollectConfig:
    adapter = values.pop("adapter", AdapterConfig(module="tests.pointworld", kwargs=kwargs or {}))
    return CollectConfig(env=(ENV_ID,), out=out, episodes=episodes, workers=workers, adapter=adapter, **values)


def same_files(a: Path, b: Path) -> bool:
    paths = [path for folder in ("data", "meta", "videos") for path in (a / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(a) for path in paths]
    return len(names) == 6 and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.fixture
def start(tmp_path, start_vla):
    """`start(values)`: `vla collect` in its own process group."""

    def run(values: CollectConfig) -> Process:
        dump(values, tmp_path / "collect.yaml")
        return start_vla("collect", "--config", tmp_path / "collect.yaml")

    return run


def wait_for(out: Path, episodes: int) -> None:
    deadline = time.monotonic() + 30
    while len(finished(out / ".partial")) < episodes:
        assert time.monotonic() < deadline, "no episode was finished in 30 s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """A reference dataset: one worker, without interruption; seeds 1 and 3 are replaced."""
    out = tmp_path_factory.mktemp("collect") / "noisy"
    return collect(config(out, 12, noise=0.5, kwargs=SOME_FAIL))


SOME_FAIL = {"unsolvable": [1], "raise_on": [3], "delay": 0.004}


def test_frames_contain_the_observations_and_actions_of_the_expert(noisy):
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
    assert np.abs(demos.executed_actions).max() <= 1  # clipped to the action space
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
def test_an_interruption_does_not_change_the_dataset(noisy, tmp_path, start, how):
    values = config(tmp_path / "set", 12, 2, noise=0.5, kwargs=SOME_FAIL)
    process = start(values)
    wait_for(values.out, 4)
    process.send_signal(how)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    if how != signal.SIGKILL:
        assert "--resume" in error and "of 12 episodes are finished" in error and "Traceback" not in error
    with pytest.raises(DataError, match="unfinished recording"):
        Demonstrations(values.out)
    with pytest.raises(DataError, match="--resume"):
        collect(values)
    resumed = config(tmp_path / "set", 12, 2, noise=0.5, kwargs=SOME_FAIL, resume=True)
    assert same_files(noisy, collect(resumed))
    assert collect(resumed) == values.out  # already finished


def test_a_worker_that_dies_is_replaced(tmp_path):
    out = collect(config(tmp_path / "set", 4, 2, kwargs={"die_on": [2]}))
    assert [episode.seed for episode in Demonstrations(out).episodes] == [0, 1, 1_000_002, 3]
    assert "the worker process died (exit code 9)" in (out / "failures.jsonl").read_text()


def test_failures_can_be_kept(tmp_path, capsys):
    out = collect(config(tmp_path / "set", 3, keep="all", kwargs={"unsolvable": [1]}))
    assert [episode.success for episode in Demonstrations(out).episodes] == [True, False, True]
    assert "67% of all attempts succeeded" in " ".join(capsys.readouterr().err.split())


def test_other_settings_are_not_resumed(tmp_path, start):
    process = start(config(tmp_path / "set", 500, kwargs={"delay": 0.01}))
    wait_for(tmp_path / "set", 2)
    process.kill()
    process.communicate()
    with pytest.raises(ConfigError, match="started with other settings: seed = 0, not 7"):
        collect(config(tmp_path / "set", 2, seed=7, resume=True, kwargs={"delay": 0.01}))
    out = collect(config(tmp_path / "set", 2, resume=True, kwargs={"delay": 0.01}))  # fewer episodes are allowed
    assert len(Demonstrations(out).episodes) == 2
    with pytest.raises(ConfigError, match=r"complete dataset of 2 episodes and cannot be extended to 9.*--seed 2"):
        collect(config(tmp_path / "set", 9, resume=True, kwargs={"delay": 0.01}))


def test_runs_without_any_success_end_with_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "MAX_FAILURES_WITHOUT_SUCCESS", 4)
    monkeypatch.setattr(collecting, "MAX_ERRORS_WITHOUT_SUCCESS", 2)
    lost = {"unsolvable": [n + turn * 1_000_000 for n in range(2) for turn in range(9)]}
    with pytest.raises(SimulatorError, match=r"failed in all of the first 4 attempts.*adapter\.success"):
        collect(config(tmp_path / "a", 2, kwargs=lost))
    with pytest.raises(SimulatorError, match=r"all of the first 2 attempts .* ended in an error.*is unstable"):
        collect(config(tmp_path / "b", 2, kwargs={"raise_on": lost["unsolvable"]}))


MISTAKES = {
    "environment": ({}, "test/Pointt-v0", "unknown environment"),
    "module": ({"module": "no_such_module"}, ENV_ID, "cannot import 'no_such_module'"),
    "arguments": ({"kwargs": {"colour": 1}}, ENV_ID, "adapter.kwargs"),
    "image": ({"images": {"front": "pixels.fornt"}}, ENV_ID, "Did you mean 'pixels.front'"),
    "state": ({"state": ("agent_position",)}, ENV_ID, "Did you mean 'agent_pos'"),
    "robot": ({"robot": {"control_hzz": 5}}, ENV_ID, "Did you mean 'control_hz'"),
    "expert": ({"expert": "tests.pointworld:none"}, ENV_ID, "cannot load expert"),
    "expert's arguments": ({"expert": "tests.pointworld:draw"}, ENV_ID, "failed to start: TypeError"),
    "success": ({"success": "solved"}, ENV_ID, "adapter.success"),  # reported at the end of the first episode
}


@pytest.mark.parametrize(("values", "env_id", "message"), MISTAKES.values(), ids=MISTAKES)
def test_after_an_error_the_corrected_command_works(tmp_path, values, env_id, message):
    adapter = AdapterConfig(**{"module": "tests.pointworld"} | values)
    wrong = CollectConfig(env=(env_id,), out=tmp_path / "set", episodes=1, workers=1, adapter=adapter)
    with pytest.raises(VLAError, match=message):
        collect(wrong)
    assert not wrong.out.exists()


def test_a_recording_without_episodes_may_be_resumed_with_other_settings(tmp_path):
    """A process that is killed before its first episode leaves only settings and failures."""
    wrong = config(tmp_path / "set", 1, seed=7, kwargs={"unsolvable": [0]})
    dump(wrong, open_staging(wrong.out, resume=False) / "collect.yaml")
    failure = {"episode": 0, "turn": 0, "env_id": ENV_ID, "kind": "failed", "message": "not solved"}
    (wrong.out / ".partial" / "failures.jsonl").write_text(json.dumps(failure))
    with pytest.raises(DataError, match="--resume"):
        collect(config(tmp_path / "set", 1))
    out = collect(config(tmp_path / "set", 1, resume=True))
    assert [episode.seed for episode in Demonstrations(out).episodes] == [0] and not (out / "failures.jsonl").exists()


def test_environments_of_different_robots_are_rejected(tmp_path):
    gym.register("test/Slow-v0", SlowWorld, max_episode_steps=60)
    adapter = AdapterConfig(module="tests.pointworld")
    with pytest.raises(SimulatorError, match=r"Slow-v0' and .* cannot share a dataset.*control_hz"):
        collect(CollectConfig(env=(ENV_ID, "test/Slow-v0"), out=tmp_path / "set", adapter=adapter))
    assert not (tmp_path / "set").exists()


class SlowWorld(PointWorld):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.robot |= {"control_hz": 5.0}


def test_a_truncated_failure_record(tmp_path, monkeypatch):
    lost = [1, 1_000_001, 2_000_001]
    values = config(tmp_path / "set", 2, resume=True, kwargs={"unsolvable": lost})
    for tries in (2, 3):
        monkeypatch.setattr(collecting, "MAX_ATTEMPTS", tries)
        with pytest.raises(SimulatorError, match=f"failed with {tries} seeds"):
            collect(values)
        failures = tmp_path / "set/.partial/failures.jsonl"
        if tries == 2:
            failures.write_text(failures.read_text()[:-9])
    monkeypatch.setattr(collecting, "MAX_ATTEMPTS", 9)
    out = collect(values)
    assert [json.loads(line)["seed"] for line in (out / "failures.jsonl").read_text().splitlines()] == lost


@pytest.mark.parametrize(("name", "value"), [("episodes", 0), ("noise", -1.0), ("noise_share", 1.5), ("workers", -1)])
def test_invalid_values(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name} must "):
        collect(CollectConfig(out=tmp_path / "set", **{name: value}))


def test_options_without_effect_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="noise is only for an environment's own expert; 'random'"):
        collect(config(tmp_path / "set", noise=0.5, adapter=AdapterConfig(expert="random")))
    with pytest.raises(ConfigError, match="instruction is empty"):
        collect(config(tmp_path / "set", adapter=AdapterConfig(instruction=" ")))


def test_episodes_and_noise_are_distributed_over_environments():
    values = CollectConfig(env=("a", "b"), episodes=40, noise=0.3, noise_share=0.25)
    attempts = [attempt(values, number, 0) for number in range(40)]
    for env_id in ("a", "b"):
        mine = [tried for tried in attempts if tried.env_id == env_id]
        assert len(mine) == 20 and sum(tried.noise > 0 for tried in mine) == 5
    seeds = {attempt(values, number, turn).seed for number in range(40) for turn in range(50)}
    assert len(seeds) == 2000
