"""The control loop: one command per control step, whatever the policy and the robot do."""

import dataclasses
import gc
import itertools
import time

import numpy as np
import pytest

from tests.bench import at
from vla.config import ControlConfig, SafetyConfig
from vla.control.controller import Controller, State
from vla.control.robot import Reading, Robot
from vla.errors import ConfigError, SpecError, VLAError
from vla.policy import Policy
from vla.spec import RobotSpec

pytestmark = pytest.mark.usefixtures("virtual_time")


class FakeRobot:
    """Records its commands with their times. Its image can freeze, and its task ends after `last` commands."""

    def __init__(self, spec: RobotSpec, observation: dict, last: int = 10_000) -> None:
        self.spec, self._observation, self._last = spec, observation, last
        self.commands: list[tuple[float, np.ndarray]] = []
        self.frozen_at: float | None = None
        self.closed = False

    def observe(self) -> Reading:
        seen = time.monotonic() if self.frozen_at is None else self.frozen_at
        over = len(self.commands) >= self._last
        return Reading(self._observation, seen, over, over)

    def command(self, action: np.ndarray) -> None:
        self.commands.append((time.monotonic(), action))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def policy(tiny):
    return Policy(*tiny)


@pytest.fixture
def driver(policy, observations):
    return FakeRobot(policy.robot, observations(1)[0])


def actions(robot: FakeRobot) -> np.ndarray:
    return np.stack([action for _, action in robot.commands])


@pytest.mark.parametrize("late", [0.0, 0.1])
@pytest.mark.parametrize("transition", ["switch", "ensemble", "prefix"])
def test_executes_the_policys_chunks(policy, driver, observations, transition, late):
    chunk = policy.predict_chunk(observations(1)[0], "reach")
    with Controller(
        driver, policy, ControlConfig(hz=20.0, transition=transition, injected_latency_s=late)
    ) as controller:
        record = controller.run("reach", seconds=1.0)
    sent = actions(driver)
    begun = record["interventions"].get("no chunk yet", 0)
    assert (1 if late else 0) <= begun <= 4 and record["errors"] == []
    np.testing.assert_array_equal(sent[:begun, :6], 0)
    # The robot held until the first chunk was decoded, so the chunk begins with its first action.
    np.testing.assert_allclose(sent[begun], chunk[0], atol=1e-6)
    assert len(sent) == pytest.approx(21, abs=2)
    assert driver.closed and controller.state is State.STOPPED
    np.testing.assert_array_equal(sent[-1], policy.robot.hold_action(sent[-2]))


@pytest.mark.parametrize(("max_age_s", "waits"), [(0.5, True), (0.1, False)])
def test_steps_on_hold_do_not_age_a_chunk(policy, driver, monkeypatch, max_age_s, waits):
    """Chunks of four actions arrive 0.13 s after their image, while the robot moves or holds. A chunk is continued
    after the actions that were executed since its image; if the image is too old, at the action for the current
    step."""
    real, count, events = policy.predict, [0], []

    def late(*arguments):
        prediction = real(*arguments)
        count[0] += 1
        chunk = np.zeros_like(prediction.chunks)
        chunk[0, :, 0] = 0.01 * count[0] + 0.001 * np.arange(4)  # encodes chunk and action
        time.sleep(0.13)
        return dataclasses.replace(prediction, chunks=chunk)

    monkeypatch.setattr(Policy, "streams", False)
    config = ControlConfig(hz=20.0, transition="switch", safety=SafetyConfig(max_age_s=max_age_s))
    with Controller(driver, policy, config) as controller:
        monkeypatch.setattr(policy, "predict", late)
        controller.listeners.append(events.append)
        record = controller.run("reach", seconds=2.0)
    sent = {event.tick: int(np.rint(1000 * event.command[0])) for event in events}
    arrivals = [event for event in events if event.decoding]
    assert len(arrivals) >= 4 and record["interventions"]["no chunk yet"] >= 2
    for number, event in enumerate(arrivals, 1):
        now, asked = event.tick, event.decoding["asked"]
        ticks = range(asked, now)
        place = sum(sent[tick] > 0 for tick in ticks if tick in sent) if waits else len(ticks)
        assert sent[now] == (10 * number + place if place < 4 else 0)


def handing_over(policy, driver, monkeypatch, pauses, fails_after=None):
    """Make `policy` decode an action after each of `pauses` seconds. Entry 0 is 0.01 x the number of the chunk + 0.001
    x the position of the action."""
    count, whole = [0], policy.predict([driver._observation], ["reach"])

    def predict(observations, instructions, memories=None, on_action=None):
        count[0] += 1
        chunk = np.zeros_like(whole.chunks)
        chunk[0, :, 0] = 0.01 * count[0] + 0.001 * np.arange(chunk.shape[1])
        for place, (action, pause) in enumerate(zip(chunk[0], pauses, strict=True)):
            time.sleep(pause)
            if count[0] == fails_after and place == 1:
                raise RuntimeError("out of memory")
            on_action(place, action)
        return dataclasses.replace(whole, chunks=chunk)

    monkeypatch.setattr(policy, "predict", predict)


def executed(events) -> dict[int, int]:
    """The executed actions: control step -> 10 x the number of the chunk + the position of the action."""
    return {event.tick: int(np.rint(1000 * event.command[0])) for event in events}


def test_actions_are_executed_while_the_chunk_is_decoded(policy, driver, monkeypatch):
    """Decoding takes 45 ms per action and 0.18 s per chunk. Each action is executed as soon as it is decoded, and uses
    the newest possible image."""
    events = []
    with Controller(driver, policy, ControlConfig(hz=10.0)) as controller:
        handing_over(policy, driver, monkeypatch, [0.045] * 4)
        controller.listeners.append(events.append)
        record = controller.run("reach", seconds=2.0)
    whole = {event.decoding["asked"]: event.tick for event in events if event.decoding}
    assert len(whole) >= 4 and record["late_actions"] == 0 and record["errors"] == []
    sent = executed(events)
    for number, (asked, complete) in enumerate(whole.items(), 1):
        assert complete > asked  # the last action was decoded after others had been executed
        assert [sent[tick] for tick in range(asked, complete + 1)] == [
            10 * number + i for i in range(complete + 1 - asked)
        ]
    assert max(record["first_action_ms"]) < 100 < 150 < min(record["decode_ms"])


def test_an_aborted_chunk_leaves_the_previous_plan(policy, driver, monkeypatch):
    """The second chunk is aborted after its first action."""
    policy.n_action_steps, events = 2, []
    with Controller(driver, policy, ControlConfig(hz=10.0)) as controller:
        handing_over(policy, driver, monkeypatch, [0.02, 0.09, 0.02, 0.02], fails_after=2)
        controller.listeners.append(events.append)
        record = controller.run("reach", seconds=1.5)
    sent = list(executed(events).values())
    assert len(record["errors"]) == 1 and "out of memory" in record["errors"][0]
    second = sent.index(20)
    assert sent[second - 2 : second + 2] == [10, 11, 20, 13]
    assert max(sent) >= 50  # later chunks are executed


@pytest.mark.parametrize("max_age_s", [0.4, 3.0])  # the image becomes too old during decoding, or does not
def test_slowly_decoded_actions_are_all_executed(policy, driver, monkeypatch, max_age_s):
    """Decoding takes 0.25 s per action at 10 Hz. The robot holds in between and skips no action. The second chunk is
    requested when the last action of the first one is about to be executed."""
    events = []
    config = ControlConfig(hz=10.0, safety=SafetyConfig(max_age_s=max_age_s))
    with Controller(driver, policy, config) as controller:
        handing_over(policy, driver, monkeypatch, [0.25] * 4)
        controller.listeners.append(events.append)
        controller.run("reach", seconds=2.5)
    assert [action for action in executed(events).values() if action][:6] == [10, 11, 12, 13, 21, 22]


@pytest.mark.parametrize(("taken", "asked"), [(0.003, 0.1), (0.03, 0.03)])
def test_an_image_is_used_as_soon_as_it_belongs_to_the_next_step(policy, driver, monkeypatch, taken, asked):
    """An image taken just after a command does not show its effect, so it is used only from the next step on."""
    calls, start = [], time.monotonic()

    def observe():
        last, now = driver.commands[-1][0] if driver.commands else start, time.monotonic()
        return Reading(driver._observation, last + taken - (0.1 if now < last + taken else 0.0))

    with Controller(driver, policy, ControlConfig(hz=10.0)) as controller:
        real = controller._inference.request

        def request(*arguments):
            if driver.commands:
                calls.append(time.monotonic() - driver.commands[-1][0])
            real(*arguments)

        monkeypatch.setattr(driver, "observe", observe)
        monkeypatch.setattr(controller._inference, "request", request)
        controller.run("reach", seconds=2.0)
    assert len(calls) >= 4 and np.median(calls) == pytest.approx(asked, abs=0.02)


def test_actions_after_a_stall_are_not_executed(policy, driver, monkeypatch):
    """The first action arrives in time, the others 0.8 s later, when their image is too old."""
    events = []
    config = ControlConfig(hz=10.0, safety=SafetyConfig(max_age_s=0.4))
    with Controller(driver, policy, config) as controller:
        handing_over(policy, driver, monkeypatch, [0.02, 0.8, 0.0, 0.0])
        controller.listeners.append(events.append)
        controller.run("reach", seconds=3.0)
    sent = [action for action in executed(events).values() if action]
    assert len(sent) >= 2 and all(action % 10 == 0 for action in sent)


def test_a_chunk_completed_between_two_steps_does_not_delay_the_next_request(policy, driver, monkeypatch):
    """One action of each chunk is executed. A chunk is complete 30 ms after the command of its step, when the next
    image is already available, so the next chunk is requested at once."""
    policy.n_action_steps, calls = 1, []
    with Controller(driver, policy, ControlConfig(hz=5.0)) as controller:
        handing_over(policy, driver, monkeypatch, [0.02, 0.04, 0.04, 0.1])
        real = controller._inference.request

        def request(*arguments):
            if driver.commands:
                calls.append(time.monotonic() - driver.commands[-1][0])
            real(*arguments)

        monkeypatch.setattr(controller._inference, "request", request)
        record = controller.run("reach", seconds=3.0)
    assert len(calls) >= 10 and np.median(calls) < 0.15 and record["errors"] == []


def test_a_policy_with_high_latency_is_asked_late(policy, driver):
    """It is called when the last action is about to be executed, not as soon as it has returned a chunk."""
    policy.n_action_steps, events = 3, []
    with Controller(driver, policy, ControlConfig(hz=20.0, injected_latency_s=0.25)) as controller:
        controller.listeners.append(events.append)
        controller.run("reach", seconds=3.0)
    answers = [(event.decoding["asked"], event.tick) for event in events if event.decoding]
    assert len(answers) >= 4
    # The latency is not known at the first call, so the whole first chunk is executed.
    assert all(asked >= came + 2 for (_, came), (asked, _) in itertools.pairwise(answers))


def test_a_failed_request_is_repeated_at_once(policy, driver, monkeypatch):
    """The instruction changes just after a chunk, and the policy then raises an exception once. The next request
    follows at once, not when the old chunk has been executed."""
    policy.n_action_steps, asked, events, real = 4, [], [], policy.predict

    def predict(observations, instructions, *rest):
        asked.append(instructions[0])
        if asked.count("push") == 1 and instructions == ["push"]:
            raise RuntimeError("out of memory")
        return real(observations, instructions, *rest)

    ticks = {}
    with Controller(driver, policy, ControlConfig(hz=10.0)) as controller:
        monkeypatch.setattr(policy, "predict", predict)
        inference = controller._inference
        request = inference.request
        monkeypatch.setattr(
            inference, "request", lambda tick, *rest: (ticks.setdefault(rest[1], []).append(tick), request(tick, *rest))
        )

        def listen(event):
            events.append(event)
            if event.tick >= 5 and event.decoding:
                controller.instruction = "push"

        controller.listeners.append(listen)
        record = controller.run("reach", seconds=2.0)
    assert len(record["errors"]) == 1
    first, second = ticks["push"][:2]
    assert sum(first <= event.tick < second for event in events) <= 1


@pytest.mark.parametrize("nonsense", ["far left", {"x": 1.0}, [[1.0], [2.0, 3.0]], np.zeros(2), np.full(7, np.nan)])
def test_a_state_that_is_none_is_a_fault_like_others(policy, driver, nonsense):
    with Controller(driver, policy, ControlConfig(hz=20.0)) as controller:
        driver._observation = driver._observation | {"agent_pos": nonsense}
        record = controller.run("reach", seconds=1.0)
    assert record["interventions"]["state not finite"] >= 5
    np.testing.assert_array_equal(actions(driver)[:, :6], 0)


def test_position_control_begins_with_the_first_valid_state(policy, driver, monkeypatch):
    """Its first states are not finite. They must not become hold positions."""
    names = policy.robot.state_names
    spec = dataclasses.replace(policy.robot, action_space="joint_position", action_names=names, hold=())
    driver.spec = policy.robot = spec
    seen, observe = [], driver.observe

    def stutter():
        seen.append(np.nan if len(seen) < 5 else 0.25)
        reading = observe()
        state = np.full(7, seen[-1], np.float32)
        return dataclasses.replace(reading, observation=reading.observation | {"agent_pos": state})

    monkeypatch.setattr(driver, "observe", stutter)
    with Controller(driver, policy, ControlConfig(hz=20.0, injected_latency_s=0.2)) as controller:
        controller.run("reach", seconds=0.6)
    assert np.isfinite(actions(driver)).all() and len(seen) > 5
    np.testing.assert_allclose(actions(driver)[0], 0.25)


@pytest.mark.parametrize("space", ["joint_position", "unspecified"])
def test_a_robot_without_a_position_to_hold_is_rejected(policy, driver, space):
    """Before the first command, it would move to 0."""
    names = [*policy.robot.state_names[:5], "elbow", "jaw"]
    hold = () if space == "joint_position" else (None,) * 7
    spec = dataclasses.replace(policy.robot, action_space=space, action_names=names, gripper_index=6, hold=hold)
    driver.spec = policy.robot = spec
    with pytest.raises(ConfigError, match=r"before its first command is unknown for elbow: no state.*hold_reference"):
        Controller(driver, policy, ControlConfig(hz=20.0))

    class Subclass(FakeRobot, Robot):
        """Has only the protocol's default `hold_reference`."""

    with pytest.raises(ConfigError, match="unknown for elbow"):
        Controller(Subclass(spec, {}), policy, ControlConfig(hz=20.0))
    driver.spec = dataclasses.replace(spec, hold=(None, None, None, None, None, 0.3, None))
    Controller(driver, policy, ControlConfig(hz=20.0)).close()
    driver.spec, driver.hold_reference = spec, lambda: np.zeros(7, np.float32)
    Controller(driver, policy, ControlConfig(hz=20.0)).close()


def test_a_run_that_fails_to_start_changes_nothing(policy, driver, monkeypatch):
    with Controller(driver, policy, ControlConfig(hz=20.0)) as controller:
        with monkeypatch.context() as silent:
            silent.setattr(driver, "observe", lambda: None)
            controller.stop()
            with pytest.raises(SpecError, match="has not sent an observation"):
                controller.run("reach", seconds=0.5)
        assert gc.isenabled() and driver.commands == []
        assert controller.run("reach", seconds=1.0)["commands"] >= 3


def test_an_image_is_used_only_once(policy, driver, monkeypatch):
    """The camera freezes at the third call of the policy; the run ends a second later."""
    real, seen = policy.predict, []
    with Controller(driver, policy, ControlConfig(hz=20.0)) as controller:

        def predict(*asked):
            seen.append(driver.frozen_at)
            if len(seen) == 3:
                driver.frozen_at = time.monotonic()
            return real(*asked)

        def end(event):
            if driver.frozen_at is not None and time.monotonic() > driver.frozen_at + 1.0:
                controller.stop()

        controller.listeners.append(end)
        monkeypatch.setattr(policy, "predict", predict)
        record = controller.run("reach", seconds=30.0)
    assert seen.count(None) >= 2 and len(seen) - seen.count(None) <= 1
    assert record["interventions"]["underrun"] >= 1 and record["interventions"]["stale observation"] >= 5


def test_a_robot_that_stalls_and_returns_old_images(policy, driver, monkeypatch):
    """Skipped control steps have no command, and do not count as executed actions."""
    command, observe = driver.command, driver.observe

    def stall(action):
        command(action)
        time.sleep(0.27 if len(driver.commands) in (1, 8) else 0)

    monkeypatch.setattr(driver, "command", stall)
    monkeypatch.setattr(driver, "observe", lambda: dataclasses.replace(observe(), time=time.monotonic() - 0.3))
    with Controller(driver, policy, ControlConfig(hz=20.0, transition="prefix")) as controller:
        record = controller.run("reach", seconds=2.0)
    assert record["skipped"] >= 6 and record["errors"] == []
    assert np.abs(actions(driver)[1:-1, :6]).max() > 0


def test_the_run_ends_with_the_task(policy, driver):
    driver._last = 7
    with Controller(driver, policy, ControlConfig(hz=50.0)) as controller:
        record = controller.run("reach", seconds=10.0)
        assert controller.state is State.HOLDING
    assert record["success"] and record["commands"] == 7
    assert len(driver.commands) == 8  # including the hold command


def test_the_robot_holds_if_the_policy_raises(policy, driver, monkeypatch):
    with Controller(driver, policy, ControlConfig(hz=50.0)) as controller:
        monkeypatch.setattr(policy, "predict", lambda *_: 1 / 0)
        record = controller.run("reach", seconds=0.4)
    assert len(record["errors"]) >= 2 and "ZeroDivisionError" in record["errors"][0]
    assert record["interventions"] == {"no chunk yet": record["commands"]}
    np.testing.assert_array_equal(actions(driver)[:, :6], 0)


def test_a_policy_that_hangs_does_not_delay_commands(policy, driver, monkeypatch):
    """After the first chunk, the robot holds, with a command at every step."""
    real, calls = policy.predict, []

    def slow(*arguments):
        calls.append(1)
        if len(calls) > 1:
            time.sleep(1.0)
        return real(*arguments)

    with Controller(driver, policy, ControlConfig(hz=20.0)) as controller:
        monkeypatch.setattr(policy, "predict", slow)
        record = controller.run("reach", seconds=0.9)
    assert record["interventions"]["underrun"] >= 8
    assert record["commands"] + record["skipped"] >= 18
    held = (actions(driver)[:, :6] == 0).all(axis=1)
    assert held.sum() >= record["interventions"]["underrun"]


def test_a_silent_driver_is_a_fault(policy, driver):
    driver.frozen_at = time.monotonic()
    config = ControlConfig(hz=50.0, safety=SafetyConfig(max_age_s=0.2))
    with Controller(driver, policy, config) as controller:
        driver.frozen_at = time.monotonic()
        record = controller.run("reach", seconds=0.6)
    assert record["interventions"]["stale observation"] >= 15


def test_an_emergency_stop_in_the_middle_of_a_run(policy, driver):
    with Controller(driver, policy, ControlConfig(hz=20.0)) as controller:
        at(controller, 10, controller.safety.emergency_stop)
        record = controller.run("reach", seconds=1.0)
    assert record["interventions"]["emergency stop"] >= 8
    np.testing.assert_array_equal(actions(driver)[-8:, :6], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ("top",)}, r"needs camera 'front', 'wrist', the robot has 'top'"),
        ({"gripper_open": -1.0, "gripper_closed": 1.0}, "opens its gripper with 1 and closes it with -1"),
        ({"action_names": tuple("abcdefg")}, "names differ"),
        ({"action_space": "ee_velocity"}, "ee_delta, those of the robot are ee_velocity"),
        ({"state_names": ()}, "state has 7 entries"),
        ({"control_hz": 30.0}, r"runs at 20 .* at 30.*--hz 20"),
    ],
)
def test_a_mismatched_robot_is_rejected(policy, driver, change, message):
    driver.spec = dataclasses.replace(policy.robot, **change)
    with pytest.raises(SpecError, match=message):
        Controller(driver, policy, ControlConfig())
    assert driver.commands == []


def test_an_explicit_rate_is_used_with_a_warning(policy, driver):
    driver.spec = dataclasses.replace(policy.robot, control_hz=30.0)
    with Controller(driver, policy, ControlConfig(hz=20.0)) as controller:
        assert controller.hz == 20.0
    with (
        pytest.warns(UserWarning, match="runs at 20 .* at 25"),
        Controller(driver, policy, ControlConfig(hz=25.0)),
    ):
        pass


@pytest.mark.parametrize("hz", [0, -1.0, float("nan"), float("inf")])
def test_invalid_rates_are_rejected(policy, driver, hz):
    with pytest.raises(VLAError, match=r"positive|finite"):
        Controller(driver, policy, ControlConfig(hz=hz))


@pytest.mark.parametrize("hz", [0.5, 0.25])
def test_less_than_one_command_per_second(policy, driver, hz):
    with Controller(driver, policy, ControlConfig(hz=hz, safety=SafetyConfig(max_age_s=10.0))) as controller:
        assert controller.run("reach", seconds=4 / hz)["commands"] >= 3


def test_an_error_of_the_robot_is_raised_after_decoding_ends(policy, driver, monkeypatch):
    """It fails while a chunk is decoded. The error is that of the robot, not that of the final hold command."""
    config, alive = ControlConfig(hz=20.0, injected_latency_s=0.3), driver.observe

    def dies():
        if driver.commands:
            monkeypatch.setattr(driver, "command", lambda action: 1 / 0)
            raise OSError("the cable is unplugged")
        return alive()

    with Controller(driver, policy, config) as controller:
        with monkeypatch.context() as broken:
            broken.setattr(driver, "observe", dies)
            with pytest.raises(OSError, match="cable"), pytest.warns(UserWarning, match="command could not be sent"):
                controller.run("reach", seconds=1.0)
        assert controller.state is State.HOLDING and controller._inference.busy_since is None
        monkeypatch.undo()
