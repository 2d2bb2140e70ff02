"""`vla replay`: recordings that still work, and a hint about those that do not."""

import json
from pathlib import Path

import pytest

from tests.pointworld import ENV_ID
from vla.collect import collect
from vla.config import AdapterConfig, CollectConfig, ReplayConfig
from vla.errors import ConfigError, DataError, SimulatorError, SpecError
from vla.replay import replay


def adapter(**kwargs) -> AdapterConfig:
    return AdapterConfig(module="tests.pointworld", kwargs=kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "noisy"
    return collect(CollectConfig(env=(ENV_ID,), out=out, episodes=4, workers=1, noise=0.5, adapter=adapter()))


def test_recordings_replay_exactly(data, tmp_path, capsys):
    assert replay(ReplayConfig(data=data, out=tmp_path, adapter=adapter()))
    assert "4 of 4 replayed episodes succeeded" in capsys.readouterr().out
    report = json.loads((tmp_path / "replay.json").read_text())
    assert report["pc_success"] == 100 and report["hint"] == ""
    assert all(episode["drift"] < 1e-6 and episode["drift_at"] is None for episode in report["per_episode"])


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"offset": 0.2}, "first state already differs"),
        ({"gain": 0.5}, "agree at first and part at about frame 1"),
        ({"unsolvable": [0, 1, 2, 3]}, "success is defined differently"),
    ],
)
def test_what_changed_is_told(data, capsys, changed, hint):
    assert not replay(ReplayConfig(data=data, adapter=adapter(**changed)))
    assert hint in " ".join(capsys.readouterr().out.split())


def test_only_as_many_episodes_as_asked_for(data, capsys):
    assert replay(ReplayConfig(data=data, episodes=2))  # with the adapter that the dataset was collected with
    assert "2 of 2" in capsys.readouterr().out


def test_errors(data):
    with pytest.raises(ConfigError, match="episodes"):
        replay(ReplayConfig(data=data, episodes=0))
    with pytest.raises(SimulatorError, match="unknown environment"):
        replay(ReplayConfig(data=data, env="tests.pointworld:test/None-v0"))
    anonymous = Path(__file__).parent / "data/fixtures/lerobot_av1"
    with pytest.raises(DataError, match="--env"):
        replay(ReplayConfig(data=anonymous))
    with pytest.raises(SpecError, match=r"the recording's action has 6 entries .*has 3 \(dx, dy, gripper\)"):
        replay(ReplayConfig(data=anonymous, env=ENV_ID, adapter=adapter()))
