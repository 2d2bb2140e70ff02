"""`vla deploy` with a simulated robot that does not wait for the policy."""

import contextlib
import json
import multiprocessing
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from envs.base import STATE_NAMES
from vla import cli
from vla.control.robots.sim import SimRobot
from vla.errors import SimulatorError
from vla.jobs.deploy import _held_by_signals
from vla.policy import checkpoint

pytestmark = pytest.mark.realtime


def save(tiny, folder) -> None:
    """Save a policy with random weights and the state names of the tabletop environments."""
    network, processor = tiny
    network.config.robot["state_names"] = list(STATE_NAMES)
    checkpoint.save(network, processor, folder)


def test_the_simulation_does_not_wait():
    with contextlib.closing(SimRobot("envs:vla/Reach-v0")) as robot:
        first = robot.reset(seed=3)
        assert robot.instruction and first.observation["pixels"]["front"].dtype == np.uint8
        time.sleep(0.5)
        for _ in range(20):  # discard readings that are already queued
            later = robot.observe()
            time.sleep(0.005)
        assert later.time - first.time == pytest.approx(0.6, abs=0.15)
        start, still = first.observation["agent_pos"], later.observation["agent_pos"]
        assert np.abs(still - start)[:3].max() < 0.01  # without commands, it holds
        for _ in range(8):
            robot.command(np.array([0.5, 0, 0, 0, 0, 0, 1.0], np.float32))
            time.sleep(0.05)
        moved = robot.observe().observation["agent_pos"]
        assert np.abs(moved - still)[:3].max() > 0.02
        again = robot.reset(seed=3)
        np.testing.assert_array_equal(again.observation["agent_pos"], start)


def test_a_simulation_that_fails_reports_it():
    with pytest.raises(SimulatorError, match="Nowhere"):
        SimRobot("envs:vla/Nowhere-v0")
    with contextlib.closing(SimRobot("envs:vla/Reach-v0")) as robot:
        robot.reset(seed=0)
        (process,) = (child for child in multiprocessing.active_children() if child.name == "vla-sim-robot")
        process.kill()
        process.join()
        with pytest.raises(SimulatorError, match=r"simulated robot failed: .*process died \(signal SIGKILL"):
            for _ in range(50):
                robot.observe()


def test_deploy_runs_episodes_in_real_time(tiny, tmp_path, capsys):
    save(tiny, tmp_path / "policy")
    flags = ["--policy", tmp_path / "policy", "--env", "envs:vla/Reach-v0", "--episodes", 2, "--seconds", 1, "--no-ui"]
    assert cli.main(["deploy", *map(str, flags), "--out", str(tmp_path / "out")]) == 0
    info = json.loads((tmp_path / "out" / "deploy.json").read_text())
    assert info["n_episodes"] == 2 and len(info["episodes"]) == 2 and info["errors"] == 0
    for episode in info["episodes"]:
        assert episode["commands"] + episode["skipped"] >= 15 or episode["success"]
        assert min(episode["decode_ms"]) > 0 and len(episode["lateness_ms"]) == episode["commands"]
    assert "of the deadlines missed" in capsys.readouterr().out


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sends_the_hold_command(tiny, tmp_path, start_vla, signum, status):
    save(tiny, tmp_path / "policy")
    flags = ["--policy", tmp_path / "policy", "--env", "envs:vla/Reach-v0", "--seconds", 60, "--no-ui"]
    process = start_vla("deploy", *flags, "--out", tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "stopped" in err and "Traceback" not in err
    assert (tmp_path / "out" / "deploy.json").exists()


def test_an_ignored_sigint_stays_ignored_and_sigterm_stops_the_run(capfd):
    """A script's background job inherits an ignored SIGINT. It stays ignored, and SIGTERM still stops the run."""
    stopped, controller = [], SimpleNamespace(stop=lambda: stopped.append(1))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, cli._terminate)
    try:
        with _held_by_signals(controller) as check:
            signal.raise_signal(signal.SIGINT)
            check()
            assert not stopped and "SIGINT is ignored" in capfd.readouterr().out
            signal.raise_signal(signal.SIGTERM)
            assert stopped
            with pytest.raises(cli.Terminated):
                check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_deploy_rejects_a_gripper_of_opposite_polarity_before_it_moves(tiny, tmp_path, capsys):
    save(tiny, tmp_path / "policy")
    (tmp_path / "values.yaml").write_text("adapter: {robot: {gripper_open: -1.0, gripper_closed: 1.0}}")
    flags = ["--policy", tmp_path / "policy", "--env", "envs:vla/Reach-v0", "--no-ui", "--out", tmp_path / "out"]
    assert cli.main(["deploy", "--config", str(tmp_path / "values.yaml"), *map(str, flags)]) == 2
    err = capsys.readouterr().err
    assert "opens its gripper with 1 and closes it with -1, the robot with -1 and 1. Correct them" in err
    assert not (tmp_path / "out").exists()
