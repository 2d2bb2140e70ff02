"""The fault table (docs/faults.md): during every fault, commands are safe and on time, and the intervention is counted.

A `Bench` robot sends observations at its rate and records the commands with their times. Each test injects one fault.
`safe_and_on_time` checks that all commands are finite, within the policy's range, and not missing.
"""

import dataclasses
import time
import zipfile

import numpy as np
import pytest

from tests import bench as bench_module
from tests.bench import HZ, Bench, at
from vla.config import ControlConfig, SafetyConfig
from vla.control.black_box import BlackBox
from vla.control.controller import Controller
from vla.policy import Policy

pytestmark = pytest.mark.realtime


@pytest.fixture
def policy(tiny):
    return Policy(*tiny)


@pytest.fixture
def bench(policy, observations):
    return Bench(policy.robot, observations)


def never_executed(record, reason):
    """No action of the policy was executed because of `reason`. (A slow machine also has underruns.)"""
    held = record["interventions"]
    assert set(held) <= {reason, "underrun", "no chunk yet"} and held[reason] > 0
    assert sum(held.values()) == record["commands"]


def during(start: int, stop: int, change):
    return lambda observation, tick: change(observation) if start <= tick < stop else observation


def dark(observation):
    return observation | {"pixels": {name: np.zeros((96, 96, 3), np.uint8) for name in observation["pixels"]}}


def frozen(observation):
    return observation | {"pixels": {name: np.full((96, 96, 3), 99, np.uint8) for name in observation["pixels"]}}


def small(observation):
    return observation | {"pixels": {name: image[::2, ::2] for name, image in observation["pixels"].items()}}


def blind(observation):
    return observation | {"pixels": {"front": observation["pixels"]["front"]}}


def nan(observation):
    return observation | {"agent_pos": np.full(7, np.nan, np.float32)}


@pytest.mark.parametrize(
    ("broken", "reason", "least"),
    [
        (during(4, 34, lambda _: None), "stale observation", 15),
        (during(4, 34, frozen), "frozen camera", 15),
        (during(4, 24, dark), "dark camera", 15),
        (during(4, 24, small), "image of another size", 15),
        (during(4, 24, blind), "missing camera", 15),
        (during(4, 24, nan), "state not finite", 15),
        (lambda observation, tick: observation if tick % 2 else None, None, 0),
    ],
    ids=[
        "camera silent",
        "camera repeats one image",
        "all images black",
        "wrong image size",
        "camera missing",
        "NaN in the state",
        "half of the frames lost",
    ],
)
def test_the_robot_holds_on_invalid_observations_and_continues(
    bench, policy, tmp_path, broken, reason, least, safe_and_on_time
):
    safety = SafetyConfig(max_frozen_s=0.5 if reason == "frozen camera" else None)
    with Controller(bench, policy, ControlConfig(hz=HZ, safety=safety)) as controller:
        box = BlackBox(tmp_path, 0.5, HZ)  # short, so that an underrun on a busy machine does not take the only file
        controller.listeners.append(box.add)
        bench.broken = broken
        record = controller.run("reach", seconds=2.4)
    box.close()
    safe_and_on_time(bench, policy, record, 2.4)
    named = {name: count for name, count in record["interventions"].items() if name not in ("no chunk yet", "range")}
    if reason is None:
        assert set(named) <= {"underrun"} and record["errors"] == []
        return
    assert named[reason] >= least and record["errors"] == []
    # A file is named after its first fault, which may be an underrun on a busy machine.
    assert any(f'"{reason}"' in zipfile.ZipFile(path).read("ticks.jsonl").decode() for path in box.files)
    moving = np.abs(np.stack([action[:6] for _, action in bench.commands[-12:-1]])).max()
    assert moving > 0  # the robot moves again


def test_half_of_the_frames_are_enough(bench, policy, virtual_time, monkeypatch):
    """In virtual time, with decoding that takes one step, so that the number of missing actions is deterministic."""
    monkeypatch.setattr(bench_module, "time", virtual_time)
    real = policy.predict

    def predict(*arguments):
        time.sleep(1 / HZ)
        return real(*arguments)

    monkeypatch.setattr(policy, "predict", predict)
    with Controller(bench, policy, ControlConfig(hz=HZ)) as controller:
        bench.broken = lambda observation, tick: observation if tick % 2 else None
        record = controller.run("reach", seconds=3.0)
    assert record["interventions"].get("underrun", 0) <= 10 and record["errors"] == []
    assert record["commands"] >= 3 * HZ and record["missed"] == 0


class Slow:
    """Replaces `policy.predict`; calls 3 to 8 also call `behave`."""

    def __init__(self, policy: Policy, behave) -> None:
        self._real, self._behave, self.calls = policy.predict, behave, 0

    def __call__(self, *arguments):
        self.calls += 1
        if 3 <= self.calls < 9:
            self._behave()
        return self._real(*arguments)


def raise_memory_error():
    raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize(
    ("behave", "errors"),
    [(lambda: time.sleep(0.3), 0), (raise_memory_error, 6), (lambda: time.sleep(2.0), 0)],
    ids=["ten times slower", "throws", "hangs"],
)
def test_the_robot_holds_while_the_policy_fails_and_continues(
    bench, policy, monkeypatch, behave, errors, safe_and_on_time
):
    with Controller(bench, policy, ControlConfig(hz=HZ)) as controller:
        monkeypatch.setattr(policy, "predict", Slow(policy, behave))
        record = controller.run("reach", seconds=3.0)
    safe_and_on_time(bench, policy, record, 3.0)
    assert len(record["errors"]) == errors and all("out of memory" in error for error in record["errors"])
    assert record["interventions"]["underrun"] >= 1


def test_actions_with_nan_are_not_executed(bench, policy, monkeypatch, safe_and_on_time):
    real = policy.predict

    def sick(observations, instructions, drafts, on_action):
        prediction = real(observations, instructions, drafts, lambda index, action: on_action(index, action * np.nan))
        return dataclasses.replace(prediction, chunks=np.full_like(prediction.chunks, np.nan))

    with Controller(bench, policy, ControlConfig(hz=HZ)) as controller:
        monkeypatch.setattr(policy, "predict", sick)
        record = controller.run("reach", seconds=1.0)
    safe_and_on_time(bench, policy, record, 1.0)
    never_executed(record, "not finite")


def test_actions_with_high_entropy_are_not_executed_if_configured(bench, policy):
    config = ControlConfig(hz=HZ, safety=SafetyConfig(max_entropy=1e-6))
    with Controller(bench, policy, config) as controller:
        record = controller.run("reach", seconds=1.0)
    never_executed(record, "not confident")


def test_the_wall_clock_is_not_used(bench, policy, monkeypatch, safe_and_on_time):
    """It jumps by an hour, twice; the loop uses the monotonic clock."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    # The policy returns at once, because slow decoding on a busy machine would cause underruns.
    prediction = policy.predict([bench.observe().observation], ["reach"])
    with Controller(bench, policy, ControlConfig(hz=HZ)) as controller:
        monkeypatch.setattr(policy, "predict", lambda *_: prediction)
        at(controller, 8, lambda: offset.__setitem__(0, 3600.0))
        at(controller, 16, lambda: offset.__setitem__(0, -3600.0))
        record = controller.run("reach", seconds=1.2)
    safe_and_on_time(bench, policy, record, 1.2)
    assert set(record["interventions"]) <= {"no chunk yet", "range"}


def test_hold_and_resume_while_it_runs(bench, policy, monkeypatch):
    real, drafts = policy.predict, []
    with Controller(bench, policy, ControlConfig(hz=HZ, injected_latency_s=0.1)) as controller:
        monkeypatch.setattr(policy, "predict", lambda o, i, m, *on: (drafts.append(m[0]), real(o, i, m, *on))[1])
        states = []
        controller.listeners.append(lambda event: states.append(controller.state.value))
        at(controller, 10, controller.hold)
        at(controller, 20, controller.resume)
        record = controller.run("reach", seconds=2.0)
    assert 5 <= record["interventions"]["on hold"] <= 10
    assert states[0] == states[-1] == "running" and "holding" in states
    assert record["interventions"]["no chunk yet"] >= 2  # the old plan is not continued
    assert [len(draft) for draft in drafts].count(0) == 2


def test_a_new_instruction_applies_from_the_next_chunk(bench, policy, monkeypatch):
    real, told = policy.predict, []
    with Controller(bench, policy, ControlConfig(hz=HZ)) as controller:
        monkeypatch.setattr(policy, "predict", lambda o, i, m, *on: (told.append((i[0], m[0])), real(o, i, m, *on))[1])
        at(controller, 12, lambda: setattr(controller, "instruction", "push"))
        controller.run("reach", seconds=1.5)
    words = [word for word, _ in told]
    first = words.index("push")
    assert set(words[:first]) == {"reach"} and set(words[first:]) == {"push"}
    assert not len(told[first][1]) and len(told[first - 1][1])  # the old plan is not continued


def test_stop_ends_the_run_with_the_hold_command(bench, policy):
    with Controller(bench, policy, ControlConfig(hz=HZ)) as controller:
        stopped = []
        at(controller, 10, lambda: (stopped.append(time.monotonic()), controller.stop()))
        controller.run("reach", seconds=20.0)
        assert time.monotonic() - stopped[0] < 2  # the start of the run, with its warm-up, does not count
    np.testing.assert_array_equal(bench.commands[-1][1], bench.spec.hold_action(bench.commands[-2][1]))
