"""Replaying a demonstration in real time, and comparing commands with the demonstrated actions."""

import dataclasses
import json
import time

import numpy as np
import pytest

from vla import cli
from vla.config import ControlConfig
from vla.control.controller import Controller
from vla.control.robots.recorded import ReplayRobot
from vla.data.reader import Demonstrations
from vla.errors import ConfigError, DataError
from vla.policy import Policy, checkpoint


@pytest.fixture(scope="module")
def data(dataset, robot):
    return Demonstrations(dataset("replayed", robot, episodes=3, length=24))


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the value of `time.monotonic`."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_returns_the_due_frame_and_ends(data, clock):
    robot = ReplayRobot(data)
    robot.reset(1)
    clock[0] = 2000.0  # an episode starts with the first observation, because a controller may start slowly
    assert robot.instruction == "go to square 1" and robot.episodes == [0, 1, 2]
    images = list(data.frames(1, "wrist"))
    rows = data.episodes[1].rows
    for k in (0, 1, 2, 7, 23):  # frames that are not requested are skipped
        clock[0] = 2000.0 + (k + 0.7) / data.fps if k else 2000.0
        reading = robot.observe()
        assert reading is robot.observe() and not reading.over
        assert reading.time == pytest.approx(2000.0 + k / data.fps)
        np.testing.assert_array_equal(reading.observation["pixels"]["wrist"], images[k])
        np.testing.assert_array_equal(reading.observation["agent_pos"], data.states[rows][k])
    clock[0] = 2000.0 + 24.1 / data.fps
    assert robot.observe().over and not robot.observe().success


def test_nothing_is_decoded_during_the_replay(data, monkeypatch):
    robot = ReplayRobot(data, hz=1000.0)
    robot.reset(0)
    monkeypatch.setattr(data._store, "frames", None)
    while not robot.observe().over:
        pass


@pytest.mark.parametrize("hz", [None, 50.0])
def test_the_demonstrations_own_actions_agree_with_it(data, clock, hz):
    robot = ReplayRobot(data.root, hz=hz)
    hz = hz or data.fps
    robot.reset(2)
    assert not robot.observe().over
    for k, action in enumerate(robot.demonstrated):
        clock[0] = 1000.0 + (k + 0.5) / hz
        robot.command(action)
    assert [command.tick for command in robot.sent] == list(range(24))
    assert set(robot.agreement()) == set(robot.spec.action_names) and not any(robot.agreement().values())
    clock[0] = 1000.0 + 30 / hz
    robot.command(robot.demonstrated[0] + 100)  # after the end: the hold command
    assert not any(robot.agreement().values())
    clock[0] = 2000.0
    robot.reset(2)
    assert robot.sent == [] and not robot.observe().over
    robot.command(robot.demonstrated[0] + np.array([0.5, 0, 0, 0, 0, 0, 0]))
    assert robot.agreement()["dx"] == pytest.approx(0.5) and robot.agreement()["dy"] == 0


@pytest.mark.realtime
def test_a_controller_runs_a_demonstration_to_its_end(data, tiny):
    robot = ReplayRobot(data)
    with Controller(robot, Policy(*tiny), ControlConfig()) as controller:
        robot.reset(0)
        record = controller.run(robot.instruction, seconds=60.0)
    assert controller.hz == data.fps and record["errors"] == [] and not record["success"]
    ticks = [command.tick for command in robot.sent]
    assert 18 <= record["commands"] + record["skipped"] <= 24
    assert ticks == sorted(ticks) and ticks[-1] >= 24  # the hold command follows the end
    played = [command for command in robot.sent if command.tick < 24]
    gaps = np.abs([command.action - robot.demonstrated[command.tick] for command in played]).mean(0)
    assert list(robot.agreement().values()) == pytest.approx(gaps.tolist(), rel=1e-5)
    assert gaps.max() > 0.01  # the policy is untrained


def test_a_replay_needs_no_position_to_hold(data, tiny):
    """Unlike real robots, because commands have no effect."""
    robot, policy = ReplayRobot(data), Policy(*tiny)
    robot.spec = policy.robot = dataclasses.replace(robot.spec, action_space="joint_position", hold=())
    assert not set(robot.spec.action_names) <= {*robot.spec.state_names, robot.spec.action_names[-1]}
    Controller(robot, policy, ControlConfig()).close()


def test_invalid_replays_are_rejected(data):
    with pytest.raises(DataError, match=r"unknown episode '9'.*Valid: '0', '1', '2'"):
        ReplayRobot(data).reset(9)
    with pytest.raises(ConfigError, match="hz must be positive, got 0"):
        ReplayRobot(data, hz=0)
    with pytest.raises(DataError, match="no commands during the replay"):
        ReplayRobot(data).agreement()


@pytest.mark.realtime
def test_deploy_replays_a_dataset(data, tiny, tmp_path, capsys):
    checkpoint.save(*tiny, tmp_path / "policy")
    flags = ["--policy", tmp_path / "policy", "--replay", data.root, "--out", tmp_path / "out", "--no-ui"]
    assert cli.main(["deploy", *map(str, flags), "--deadline-ms", "5"]) == 2
    assert "this policy has 'uniform'" in capsys.readouterr().err
    assert cli.main(["deploy", *map(str, flags)]) == 0
    info = json.loads((tmp_path / "out" / "deploy.json").read_text())
    assert [episode["seed"] for episode in info["episodes"]] == [0, 1, 2] and info["errors"] == 0
    assert set(info["episodes"][0]["agreement"]) == set(data.robot.action_names)
    out = capsys.readouterr().out
    assert "differs from the demonstration by dx " in out and "'go to square 1'" in out
