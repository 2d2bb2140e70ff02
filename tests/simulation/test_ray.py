"""Ray as the host of the workers: same results as local processes, also if an actor is killed."""

import signal
import sys
from pathlib import Path

import pytest

from tests.jobs.test_collect import config, same_files
from tests.jobs.test_rollout import Slider, settings
from vla import cli
from vla.config import HostsConfig
from vla.errors import ConfigError
from vla.jobs.collect import collect
from vla.jobs.rollout import rollout
from vla.simulation import ray_hosts
from vla.simulation.ray_hosts import Actors

RAY = HostsConfig(backend="ray")


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One local cluster for all tests, because starting one takes seconds."""
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    cluster = Actors(RAY, size=2)
    assert signal.getsignal(signal.SIGTERM) is before, "Ray's own handler ends the process without a report"
    yield ray
    cluster.close([])
    assert not ray.is_initialized()


def episodes(out: Path, hosts: HostsConfig, **values) -> list[dict]:
    timing = {"decode_ms_p50", "decode_ms_max"}
    info = rollout(settings(out, hosts=hosts, n_envs=2, **values), Slider())
    return [{key: value for key, value in e.items() if key not in timing} for e in info["per_episode"]]


def test_a_rollout_gives_the_same_results_even_when_an_actor_is_killed(tmp_path):
    local = episodes(tmp_path / "local", HostsConfig(), videos=1)
    assert episodes(tmp_path / "ray", RAY, videos=1) == local
    died = tmp_path / "died"
    assert episodes(tmp_path / "killed", RAY, videos=1, kwargs={"kill_on": 100_001, "kill_once": str(died)}) == local
    assert died.exists()


def test_a_dataset_has_the_same_files(tmp_path):
    values = {"episodes": 4, "workers": 2, "kwargs": {"die_on": [2]}}
    local = collect(config(tmp_path / "local", **values))
    ray = collect(config(tmp_path / "ray", hosts=RAY, **values))
    assert same_files(local, ray)
    assert "the worker's Ray actor died (ActorDiedError" in (ray / "failures.jsonl").read_text()


def test_a_cluster_that_is_too_small(tmp_path):
    with pytest.raises(ConfigError, match=r"has \d+ CPUs, but 9999 workers need one each.*--n-envs"):
        rollout(settings(tmp_path / "r", episodes=9999, n_envs=9999, hosts=RAY), Slider())
    assert not (tmp_path / "r").exists()


def test_another_version_of_the_package_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_hosts, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"a Ray worker cannot start .*vla \d.* on .*, but 9.9 is needed"):
        rollout(settings(tmp_path / "r", n_envs=1, hosts=RAY), Slider())
    assert not (tmp_path / "r").exists()


def test_no_ray_and_no_cluster_are_one_message(tmp_path, ray, monkeypatch, capsys):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    flags = ["--env", "toy/Slide-v0", "--module", "tests.rollout_env", "--out", str(tmp_path / "r"), "--backend", "ray"]
    assert cli.main(["rollout", *flags, "--address", "127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert (
        "cannot use a Ray cluster at '127.0.0.1:1' (ConnectionRefusedError" in error and "`ray start --head`" in error
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["rollout", *flags]) == 2
    assert "pip install '.[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
