"""`vla deploy --robot module:callable`: robots defined outside the package."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from vla import cli, config
from vla.config import ModelConfig
from vla.control.robots import custom
from vla.errors import ConfigError
from vla.model.build import DataFacts, build_policy
from vla.policy import checkpoint
from vla.spec import RobotSpec
from vla.transforms.normalize import compute_statistics

DOCS = (Path(__file__).parents[2] / "docs" / "robots.md").read_text()
(EXAMPLE,) = re.findall(r"<!-- test -->\n```python\n(.*?)```", DOCS, re.DOTALL)
TOY = """
import time
import numpy as np
from vla.control.robot import EpisodicRobot, Reading
from vla.spec import RobotSpec

robots = []

class Toy(EpisodicRobot):
    instruction = ""

    def __init__(self, reach):
        self.spec = RobotSpec(("front",), ("shoulder", "elbow"), ("shoulder", "elbow"), "joint_position", control_hz=10)
        self.reach, self.log, self.commands = reach, [], 0
        robots.append(self)

    def reset(self, episode):
        self.log.append(episode)
        self.instruction, self.commands = f"episode {episode}", 0

    def observe(self):
        done = self.commands > self.reach
        observation = {"pixels": {"front": np.full((48, 48, 3), 128, np.uint8)}, "agent_pos": np.zeros(2, np.float32)}
        return Reading(observation, time.monotonic(), over=done, success=done)

    def command(self, action):
        self.commands += 1

    def close(self):
        self.log.append("close")

class Mute:
    def close(self):
        pass

class Halfway(Toy):
    close = None

def breaks():
    raise RuntimeError("no such port")

def half():
    robot = Toy(0)
    robot.spec = {"cameras": ["front"]}
    return robot

class Resettable:
    spec = observe = command = close = reset = None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with two modules that define robots."""
    (tmp_path / "my_robot.py").write_text(EXAMPLE)
    (tmp_path / "toy_robot.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in ("my_robot", "toy_robot"):
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A network with random weights for two joints."""
    spec = RobotSpec(("front",), ("shoulder", "elbow"), ("shoulder", "elbow"), "joint_position", control_hz=10)
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 2)).astype(np.float32)
    facts = DataFacts(
        spec, {"arm": {"action": compute_statistics(actions), "state": compute_statistics(actions)}}, {"arm": actions}
    )
    network, processor = build_policy(ModelConfig(backbone="tiny-init", horizon=4, n_action_steps=4, bins=31), facts)
    checkpoint.save(network.eval(), processor, tmp_path_factory.mktemp("arm") / "policy")
    return tmp_path_factory.getbasetemp() / "arm0" / "policy"


def deploy(policy, *flags: object) -> int:
    return cli.main(["deploy", "--policy", str(policy), "--no-ui", "--out", "out", "--device", "cpu", *map(str, flags)])


@pytest.mark.realtime
def test_the_example_in_the_docs(folder, policy):
    assert sum(bool(line.strip()) for line in EXAMPLE.splitlines()) == 15  # blank lines excluded
    flags = ["--robot", "my_robot:Arm", "--robot-kwargs", "{port: /dev/null}", "--instruction", "reach the cup"]
    assert deploy(policy, *flags, "--episodes", 2, "--seconds", 0.8) == 0
    info = json.loads(Path("out/deploy.json").read_text())
    assert [episode["instruction"] for episode in info["episodes"]] == 2 * ["reach the cup"] and info["errors"] == 0
    for episode in info["episodes"]:
        assert episode["commands"] + episode["skipped"] >= 7 and episode["decode_ms"]
    assert (info["successes"], info["n_episodes"]) == (0, 2)


@pytest.mark.realtime
def test_an_episodic_robot_is_reset_evaluated_and_closed_once(folder, policy):
    flags = ["--robot", "toy_robot:Toy", "--robot-kwargs", "{reach: 3}", "--episodes", 3, "--seed", 7]
    assert deploy(policy, *flags, "--seconds", 10) == 0
    info = json.loads(Path("out/deploy.json").read_text())
    assert info["successes"] == 3
    assert [(e["seed"], e["instruction"]) for e in info["episodes"]] == [(k, f"episode {k}") for k in (7, 8, 9)]
    (robot,) = sys.modules["toy_robot"].robots
    assert robot.log == [7, 8, 9, "close"]


def test_an_unsuitable_robot_is_rejected_and_closed(folder, policy, capsys):
    assert deploy(policy, "--robot", "my_robot:Arm") == 2
    assert "'my_robot:Arm' has no instruction. Set the task with --instruction." in capsys.readouterr().err
    flags = ["--robot", "toy_robot:Toy", "--robot-kwargs", "{reach: 1}", "--max-velocity", "wrist", 1]
    assert deploy(policy, *flags) == 2
    assert "unknown action entry 'wrist'" in capsys.readouterr().err
    (robot,) = sys.modules["toy_robot"].robots
    assert robot.log == ["close"] and not Path("out").exists()
    assert deploy(policy, "--robot", "nowhere:Arm", "--instruction", "x") == 2
    assert "cannot load robot 'nowhere:Arm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere:Arm", "No module named 'nowhere'.*'module:callable'.*working directory"),
        ("my_robot", "cannot load robot 'my_robot'.*no colon"),
        ("my_robot:", "a part is missing"),
        ("my_robot:Amr", "module 'my_robot' has no attribute 'Amr'"),
        ("toy_robot:breaks", "'toy_robot:breaks' failed to start: RuntimeError: no such port"),
        ("toy_robot:Toy", "failed to start: TypeError: .*reach"),
        ("toy_robot:Mute", "is Mute, which lacks spec, observe, command. A robot needs `spec`, `observe"),
        ("toy_robot:half", "spec must be a vla.spec.RobotSpec, got dict"),
        ("toy_robot:Resettable", "which lacks instruction, episodes"),
        ("toy_robot:robots", "failed to start: TypeError: 'list' object is not callable"),
    ],
)
def test_objects_that_are_not_robots_are_one_error(folder, source, message):
    with pytest.raises(ConfigError, match=message):
        custom.make(source, {})


def test_flags_and_files_name_the_same_robot(tmp_path, capsys):
    flags = ["--robot", "a:B", "--robot-kwargs", "{port: 3}", "--adapter.robot", "{control_hz: 5}", "--hz", "9"]
    parsed = cli._parse("deploy", cli.VERBS["deploy"], flags)
    assert (parsed.robot, parsed.robot_kwargs, parsed.control.hz) == ("a:B", {"port": 3}, 9.0)
    assert parsed.adapter.robot == {"control_hz": 5}
    config.dump(parsed, tmp_path / "deploy.yaml")
    assert cli._parse("deploy", cli.VERBS["deploy"], ["--config", str(tmp_path / "deploy.yaml")]) == parsed
    for words, message in (
        ("--robot {control_hz:5}", "`--adapter.robot {control_hz:5}`"),
        ("--robot a:B --replay data", "--robot and --replay cannot be combined"),
        ("--robot-kwargs {port:3}", "robot_kwargs"),
    ):
        assert cli.main(["deploy", *shlex.split(words)]) == 2
        assert message in capsys.readouterr().err
