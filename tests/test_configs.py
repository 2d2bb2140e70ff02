"""Every file in configs/<verb>/ is a valid configuration of that verb and names existing environments."""

from pathlib import Path

import gymnasium as gym
import pytest
import yaml

import envs  # noqa: F401  (registers what the files name)
from vla import config
from vla.cli import VERBS
from vla.config import AdapterConfig, ControlConfig
from vla.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
#: Read by ROS; tested in tests/control/test_ros2.py.
ROS = {CONFIGS / "deploy" / name for name in ("ros2.yaml", "ros2.launch.py")}
FILES = sorted(set(CONFIGS.glob("*/*.yaml")) - ROS)


def load(path: Path):
    if path.name == "ros2-control.yaml":  # the part of a DeployConfig that the ROS 2 node needs
        return config.load(ControlConfig, path)
    return config.load(getattr(config, VERBS[path.parent.name].config), path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_loads_strictly_and_survives_a_dump(path, tmp_path):
    loaded = load(path)
    config.dump(loaded, tmp_path / "copy.yaml")
    assert config.load(type(loaded), tmp_path / "copy.yaml") == loaded


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_has_a_comment_and_names_known_environments(path):
    assert path.read_text().startswith("# "), "a file in configs/ begins with a comment on its purpose"
    loaded = load(path)
    ids = getattr(loaded, "env", None) or ()
    for env_id in (ids,) if isinstance(ids, str) else ids:
        if env_id.startswith("vla"):
            assert env_id in gym.registry
        else:  # an environment of another package: the file must name the package
            assert ":" in env_id or loaded.adapter.module


def test_every_folder_is_a_verb():
    assert {path.name for path in CONFIGS.iterdir()} <= {verb.split()[0] for verb in VERBS}
    assert {path for path in CONFIGS.rglob("*") if path.is_file()} == set(FILES) | ROS


@pytest.mark.parametrize("name", ["pusht", "metaworld"])
def test_collect_replay_and_rollout_describe_the_same_environment(name):
    adapters = [load(CONFIGS / verb / f"{name}.yaml").adapter for verb in ("collect", "replay", "rollout")]
    free = {"expert", "max_steps"}
    described = [{k: v for k, v in vars(adapter).items() if k not in free} for adapter in adapters]
    assert (
        described[0]
        == described[1]
        == described[2]
        != {k: v for k, v in vars(AdapterConfig()).items() if k not in free}
    )


def test_a_misspelt_key_is_named(tmp_path):
    values = yaml.safe_load((CONFIGS / "collect" / "pusht.yaml").read_text())
    values["adapter"]["instructions"] = values["adapter"].pop("instruction")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"instructions.*Did you mean 'instruction'"):
        config.load(config.CollectConfig, tmp_path / "wrong.yaml")
