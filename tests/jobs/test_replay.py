"""`vla replay`: successful replays, and hints for failed ones."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pointworld import ENV_ID, PointWorld
from vla.config import AdapterConfig, CollectConfig, ReplayConfig, dump, load
from vla.errors import ConfigError, DataError, SimulatorError, SpecError
from vla.jobs.collect import collect
from vla.jobs.replay import replay


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
        ({"offset": 0.2}, "initial states differ"),
        ({"gain": 0.5}, "agree up to about frame 1"),
        ({"unsolvable": [0, 1, 2, 3]}, "definition of success has changed"),
    ],
)
def test_hints_about_changes(data, capsys, changed, hint):
    assert not replay(ReplayConfig(data=data, adapter=adapter(**changed)))
    assert hint in " ".join(capsys.readouterr().out.split())


def test_number_of_episodes(data, capsys):
    assert replay(ReplayConfig(data=data, episodes=2))  # with the adapter stored in the dataset
    assert "2 of 2" in capsys.readouterr().out


def test_errors(data):
    with pytest.raises(ConfigError, match="episodes"):
        replay(ReplayConfig(data=data, episodes=0))
    with pytest.raises(SimulatorError, match="unknown environment"):
        replay(ReplayConfig(data=data, env="tests.pointworld:test/None-v0"))
    anonymous = Path(__file__).parents[1] / "data/fixtures/lerobot_av1"
    with pytest.raises(DataError, match="--env"):
        replay(ReplayConfig(data=anonymous))
    with pytest.raises(SpecError, match=r"the recording's action has 6 entries .*has 3 \(dx, dy, gripper\)"):
        replay(ReplayConfig(data=anonymous, env=ENV_ID, adapter=adapter()))


def test_modules_named_in_a_dataset_are_not_imported(data, tmp_path, monkeypatch):
    """A downloaded folder may contain the module that it names."""
    root, places = tmp_path / "pusht_ds", []
    shutil.copytree(data, root)
    (root / "code.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])  # as in `python -m vla.cli`
    for env_id, module in (("pusht_ds.code:X-v0", None), ("X-v0", "pusht_ds.code"), ("envs:pusht_ds.code:X-v0", None)):
        rewrite(root, env_id, AdapterConfig(module=module, expert="pusht_ds.code:expert"))
        for given in (AdapterConfig(), AdapterConfig(module="envs")):
            with pytest.raises(SimulatorError) as error:
                replay(ReplayConfig(data=root, adapter=given))
            places.append(str(error.value))
    assert not [name for name in sys.modules if name.startswith("pusht_ds")]
    assert "modules named by a dataset are not imported" in places[0] and "--module <module>" in places[0]


def test_a_module_from_the_command_line_is_imported(data, tmp_path, monkeypatch, capsys):
    root = tmp_path / "copy"
    shutil.copytree(data, root)
    monkeypatch.delitem(gym.registry, ENV_ID)  # as in a new process
    monkeypatch.delitem(sys.modules, "tests.pointworld")
    rewrite(root, f"somewhere.else:{ENV_ID}", load(CollectConfig, data / "collect.yaml").adapter)
    with pytest.raises(SimulatorError, match=r"'test/Point-v0' of the module 'somewhere.else'.*--module <module>"):
        replay(ReplayConfig(data=root))
    assert replay(ReplayConfig(data=root, adapter=AdapterConfig(module="tests.pointworld")))
    assert "4 of 4 replayed episodes succeeded" in capsys.readouterr().out


def test_other_environments_rates_and_action_spaces(data, tmp_path, capsys):
    gym.register("test/Place-v0", PointWorld, max_episode_steps=60)
    slow = dataclasses.replace(adapter(), robot={"control_hz": 5})
    with pytest.warns(UserWarning, match="runs at 10 actions per second, .* at 5"):
        replay(ReplayConfig(data=data, env="test/Place-v0", out=tmp_path, adapter=slow))
    printed = " ".join(capsys.readouterr().out.split())
    assert "recorded in 'test/Point-v0' and replayed in 'test/Place-v0'" in printed
    assert len(json.loads((tmp_path / "replay.json").read_text())["notes"]) == 1
    for other, message in (
        ({"action_space": "ee_velocity"}, "the recording's actions are ee_delta, .* are ee_velocity"),
        ({"gripper_open": -1, "gripper_closed": 1}, "opens its gripper with 1 .* with -1"),
    ):
        with pytest.raises(SpecError, match=message):
            replay(ReplayConfig(data=data, adapter=dataclasses.replace(adapter(), robot=other)))


def rewrite(root: Path, env_id: str, adapter: AdapterConfig) -> None:
    """Change the environment that a dataset names."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("env_id")
    pq.write_table(table.set_column(place, "env_id", pa.array([env_id] * len(table))), path)
    dump(CollectConfig(adapter=adapter), root / "collect.yaml")
