"""Every file in configs/<verb>/ is a valid configuration of that verb and names existing environments. The commands in
configs/accelerate/ are valid."""

from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import envs  # noqa: F401  (registers what the files name)
from vla import config
from vla.cli import VERBS
from vla.config import AdapterConfig, ControlConfig
from vla.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
#: Read by ROS; tested in tests/control/test_ros2.py.
ROS = {CONFIGS / "deploy" / name for name in ("ros2.yaml", "ros2.launch.py")}
#: Read by `accelerate launch`.
ACCELERATE = set(CONFIGS.glob("accelerate/*.yaml"))
FILES = sorted(set(CONFIGS.glob("*/*.yaml")) - ROS - ACCELERATE)


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


def test_every_folder_is_a_verb_or_for_accelerate():
    assert {path.name for path in CONFIGS.iterdir()} <= {"accelerate", *(verb.split()[0] for verb in VERBS)}
    assert {path for path in CONFIGS.rglob("*") if path.is_file()} == set(FILES) | ROS | ACCELERATE


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


@pytest.mark.parametrize("path", sorted(ACCELERATE), ids=lambda path: path.stem)
def test_the_command_in_a_file_for_accelerate_is_valid(path):
    """Each file begins with its purpose and its command."""
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    begin = next(i for i, line in enumerate(lines) if line.startswith("accelerate launch"))
    command = " ".join(lines[begin:]).replace("\\", "").split()
    assert command[3] == str(path.relative_to(CONFIGS.parent))
    command[3] = str(path)
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args(command[2:]))
    assert (launch.training_script, *launch.training_script_args) == ("vla.cli", "train", "--config", "my.yaml")
    assert launch.use_fsdp == (path.stem == "fsdp2") and launch.multi_gpu != launch.use_fsdp
    assert launch.num_machines == (2 if path.stem == "two_machines" else 1)
