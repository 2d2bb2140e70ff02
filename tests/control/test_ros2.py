"""The ROS 2 robot and its lifecycle node, with the mock in fake_ros2; they are not tested with ROS."""

import array
import contextlib
import importlib.util
import runpy
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import yaml

from tests.control import fake_ros2 as ros
from vla.config import ControlConfig, ModelConfig, SafetyConfig, load
from vla.control.controller import Controller
from vla.control.robots import ros2, ros2_messages, ros2_robot
from vla.errors import ConfigError, SpecError
from vla.model.build import DataFacts, build_policy
from vla.policy import Policy, checkpoint
from vla.spec import RobotSpec
from vla.transforms.normalize import compute_statistics

pytestmark = pytest.mark.realtime

CONFIGS = Path(__file__).parents[2] / "configs" / "deploy"
HZ = 20.0
TOPICS = {"cameras.front": "/front/image_raw", "cameras.wrist": "/wrist/image_raw/compressed"}
JOINTS = [f"joint_{i}" for i in range(7)]


def image(rgb: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> ros.Message:
    height, width, channels = rgb.shape
    step = width * channels + padding
    rows = np.full((height, step), 77, np.uint8)
    rows[:, : width * channels] = rgb.reshape(height, -1)
    data = array.array("B", rows.tobytes())
    return ros.Image(height=height, width=width, encoding=encoding, step=step, data=data)


def compressed(rgb: np.ndarray, kind: str = ".png") -> ros.Message:
    data = cv2.imencode(kind, rgb[..., ::-1])[1].tobytes()
    return ros.CompressedImage(format=f"rgb8; {kind[1:]} compressed bgr8", data=array.array("B", data))


def joints(values: dict[str, float]) -> ros.Message:
    return ros.JointState(name=list(values), position=array.array("d", values.values()))


class Drivers:
    """Two cameras and joint states, whose order changes in every message. Silent drivers send nothing."""

    def __init__(self, node) -> None:
        self._node, self._rng = node, np.random.default_rng(0)
        self.silent: set[str] = set()
        self.at = dict(zip([*JOINTS, "wheel"], np.linspace(-0.4, 0.4, 8).tolist(), strict=True))
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._leaving.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._leaving.wait(0.02):
            self.speak()

    def speak(self) -> None:
        rgb = self._rng.integers(0, 256, (48, 64, 3), np.uint8)
        shuffled = {name: self.at[name] for name in self._rng.permutation(list(self.at)).tolist()}
        for topic, message in (
            ("/front/image_raw", image(rgb[..., ::-1], "bgr8", padding=5)),
            ("/wrist/image_raw/compressed", compressed(rgb)),
            ("/joint_states", joints(shuffled)),
        ):
            if topic not in self.silent:
                self._node.hear(topic, message, ros.ReliabilityPolicy.BEST_EFFORT)


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.fixture
def node_of(monkeypatch, tiny, tmp_path):
    """`node_of(**parameters)`: a node with a random policy; it is shut down at the end of the test."""
    checkpoint.save(*tiny, tmp_path / "policy")
    usual = {"policy": str(tmp_path / "policy"), "device": "cpu", "instruction": "reach", "state_joints": JOINTS}
    usual |= {"command_type": "array", "command_topic": "/commands"} | TOPICS
    nodes = []

    def make(**parameters):
        ros.start(monkeypatch, **{k: v for k, v in (usual | parameters).items() if v is not None})
        ros.init()
        nodes.append(ros2.PolicyNode())
        return nodes[-1]

    yield make
    for node in nodes:
        ros.Context.alive = True
        node.trigger_shutdown()


@pytest.fixture
def active(node_of):
    """An active node and its drivers."""
    node = node_of()
    assert node.trigger_configure() is ros.TransitionCallbackReturn.SUCCESS, node.log
    with Drivers(node) as drivers:
        assert node.trigger_activate() is ros.TransitionCallbackReturn.SUCCESS
        until(lambda: len(node.sent("/commands")) > 10)
        yield node, drivers
        node.trigger_shutdown()


# Messages.


@pytest.mark.parametrize("padding", [0, 13])
def test_images_are_converted_to_rgb(padding):
    rgb = np.random.default_rng(0).integers(0, 256, (11, 17, 3), np.uint8)
    alpha = np.concatenate([rgb, rgb[..., :1]], axis=-1)
    for encoding, sent in (
        ("rgb8", rgb),
        ("bgr8", rgb[..., ::-1]),
        ("rgba8", alpha),
        ("bgra8", alpha[..., [2, 1, 0, 3]]),
    ):
        found = ros2_messages.decode_image(image(sent, encoding, padding))
        np.testing.assert_array_equal(found, rgb)
        assert found.flags.c_contiguous and found.flags.writeable
    np.testing.assert_array_equal(
        ros2_messages.decode_image(image(rgb[..., :1], "mono8", padding)), np.repeat(rgb[..., :1], 3, axis=-1)
    )
    np.testing.assert_array_equal(ros2_messages.decode_compressed_image(compressed(rgb)), rgb)
    smooth = cv2.resize(rgb, (64, 48))
    assert np.abs(ros2_messages.decode_compressed_image(compressed(smooth, ".jpg")).astype(int) - smooth).mean() < 12


def test_unreadable_images_are_errors():
    rgb = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(SpecError, match=r"unknown image encoding '16UC1'.*Valid: 'rgb8', 'bgr8'.*compressed"):
        ros2_messages.decode_image(image(rgb, "16UC1"))
    short = image(rgb)
    short.data = short.data[:-1]
    with pytest.raises(SpecError, match="191 bytes are not an image of 8 x 8 rgb8, step 24"):
        ros2_messages.decode_image(short)
    with pytest.raises(SpecError, match="not an image of 8 x 8 rgb8, step 8"):
        ros2_messages.decode_image(image(rgb[..., :1], "rgb8"))
    for data in (b"", b"no jpeg"):
        with pytest.raises(SpecError, match=r"'jpeg', \d bytes\) cannot be decoded"):
            ros2_messages.decode_compressed_image(ros.CompressedImage(format="jpeg", data=array.array("B", data)))


def test_joints_are_found_by_name():
    message = joints({"b": 2.0, "wheel": 9.0, "a": 1.0})
    assert ros2_messages.joint_positions(message, ("a", "b")) == {"a": 1.0, "b": 2.0}
    with pytest.raises(SpecError, match="no position of c, d; it has b, wheel, a"):
        ros2_messages.joint_positions(message, ("c", "a", "d"))
    with pytest.raises(SpecError, match="no position of a; it has none"):
        ros2_messages.joint_positions(ros.JointState(name=["a"], effort=array.array("d", [1.0])), ("a",))


# The robot.


def robot_of(monkeypatch, spec: RobotSpec, hz: float = HZ, **parameters):
    """A Ros2Robot on an active node."""
    ros.start(monkeypatch)
    ros.init()
    node = ros.LifecycleNode("test")
    robot = ros2_robot.Ros2Robot(node, spec, ros2_robot.Parameters(**parameters), hz)
    node._enable(True)
    return node, robot


ARM = RobotSpec(
    cameras=("front",),
    state_names=("shoulder", "elbow", "grip"),
    action_names=("shoulder", "elbow", "grip"),
    action_space="joint_position",
    gripper_index=-1,
)


def test_the_age_of_a_reading_is_that_of_its_oldest_part(monkeypatch, observations):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rgb = observations(1)[0]["pixels"]["front"]
    node, robot = robot_of(monkeypatch, ARM, cameras={"front": "/image"})
    assert robot.observe() is None and robot.awaited() == ["/image", "/joint_states"]
    node.hear("/image", image(rgb))
    assert robot.observe() is None and robot.awaited() == ["/joint_states"]
    now[0] = 101.0
    node.hear("/joint_states", joints({"elbow": 0.2, "grip": 0.3, "shoulder": 0.1}))
    reading = robot.observe()
    assert reading.time == 100.0 and robot.observe() is reading
    np.testing.assert_array_equal(reading.observation["pixels"]["front"], rgb)
    np.testing.assert_allclose(reading.observation["agent_pos"], [0.1, 0.2, 0.3])
    assert reading.observation["agent_pos"].dtype == np.float32
    now[0] = 102.0
    node.hear("/image", image(rgb))
    assert robot.observe().time == 101.0  # now the joints are the oldest
    robot.close()
    assert node.subscriptions == [] and node.publishers == []


def test_a_trajectory_has_names_one_point_and_one_period(monkeypatch):
    node, robot = robot_of(
        monkeypatch, ARM, 8.0, cameras={"front": "/image"}, command_joints=("j1", "j2", "finger"), command_topic="/go"
    )
    robot.command(np.array([0.1, -0.2, 1.0], np.float32))
    ((_, sent),) = node.sent("/go")
    assert sent.joint_names == ["j1", "j2", "finger"] and (sent.header.stamp.sec, sent.header.stamp.nanosec) == (0, 0)
    (point,) = sent.points
    assert list(point.positions) == pytest.approx([0.1, -0.2, 1.0])
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 125_000_000)
    (publisher,) = node.publishers
    assert publisher.qos.reliability == ros.ReliabilityPolicy.RELIABLE and publisher.qos.depth == 1
    assert {s.qos.reliability for s in node.subscriptions} == {ros.ReliabilityPolicy.BEST_EFFORT}


def test_gripper_commands_use_the_robots_polarity(monkeypatch):
    node, robot = robot_of(
        monkeypatch, ARM, cameras={"front": "/image"}, command_topic="/go", gripper_open=0.0, gripper_closed=0.8
    )
    for value, expected in ((1.0, 0.0), (-1.0, 0.8), (0.0, 0.4)):
        robot.command(np.array([0.5, 0.5, value], np.float32))
        assert list(node.sent("/go")[-1][1].points[0].positions) == pytest.approx([0.5, 0.5, expected])


def test_before_the_first_command_hold_uses_the_joint_positions(monkeypatch, observations):
    node, robot = robot_of(monkeypatch, ARM, cameras={"front": "/image"}, gripper_open=0.0, gripper_closed=0.8)
    node.hear("/image", image(observations(1)[0]["pixels"]["front"]))
    node.hear("/joint_states", joints({"shoulder": float("nan"), "elbow": 0.4, "grip": 0.8}))
    assert robot.observe() is None and "not finite" in robot.faults["/joint_states"]
    node.hear("/joint_states", joints({"shoulder": 0.7, "elbow": 0.4, "grip": 0.8}))
    np.testing.assert_allclose(robot.hold_reference(), [0.7, 0.4, -1.0], atol=1e-6)
    node.hear("/joint_states", joints({"shoulder": float("nan"), "elbow": 0.4, "grip": 0.8}))
    assert np.isnan(robot.observe().observation["agent_pos"][0])  # the observation monitor reports it
    np.testing.assert_allclose(robot.hold_reference(), [0.7, 0.4, -1.0], atol=1e-6)
    robot.command(np.array([0.6, 0.4, 1.0], np.float32))
    np.testing.assert_allclose(robot.hold_reference(), [0.6, 0.4, 1.0])
    robot.forget()
    np.testing.assert_allclose(robot.hold_reference(), [0.7, 0.4, -1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cameras": {"fornt": "/image"}}, "cameras.fornt: unknown camera 'fornt'. Did you mean 'front'"),
        ({}, "the policy needs the cameras front. Set cameras.front"),
        ({"cameras": {"front": "/i"}, "state_joints": ("a",)}, "state_joints.* for each of shoulder, elbow, grip"),
        ({"cameras": {"front": "/i"}, "command_joints": ("a",)}, "command_joints must have .* got 1 names"),
        ({"cameras": {"front": "/i"}, "gripper_open": 1.0}, "gripper_closed and gripper_open.*None and 1.0"),
    ],
)
def test_parameters_that_do_not_match_the_robot_are_rejected(monkeypatch, parameters, message):
    with pytest.raises(ConfigError, match=message):
        robot_of(monkeypatch, ARM, **parameters)


def test_deltas_cannot_be_a_trajectory(monkeypatch, robot):
    with pytest.raises(ConfigError, match=r'positions, but the actions are ee_delta\. Use "array"'):
        robot_of(monkeypatch, robot, cameras=dict.fromkeys(robot.cameras, "/image"))


def test_position_control_begins_at_the_current_position(monkeypatch, observations):
    """Not at zero, also after a restart and after the robot was moved by hand."""
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 3)).astype(np.float32)
    statistics = {"arm": {"action": compute_statistics(actions), "state": compute_statistics(actions)}}
    facts = DataFacts(ARM, statistics, {"arm": actions})
    network, processor = build_policy(ModelConfig(backbone="tiny-init", horizon=4, n_action_steps=4, bins=31), facts)
    node, robot = robot_of(monkeypatch, ARM, cameras={"front": "/image"}, command_topic="/go")
    message = image(observations(1)[0]["pixels"]["front"])
    # The robot holds its position until the first actions arrive 0.15 s later.
    config = ControlConfig(injected_latency_s=0.15, safety=SafetyConfig(max_velocity={"shoulder": 0.5, "elbow": 0.5}))
    with Controller(robot, Policy(network.eval(), processor), config) as controller:
        for at in ([0.9, -0.8, 1.0], [-0.5, 0.7, -1.0]):
            node.hear("/image", message)
            node.hear("/joint_states", joints(dict(zip(("shoulder", "elbow", "grip"), at, strict=True))))
            before = len(node.sent("/go"))
            controller.run("reach", seconds=0.4)
            sent = np.array([message.points[0].positions for _, message in node.sent("/go")[before:]])
            np.testing.assert_allclose(sent[0], at, atol=1e-6)
            assert np.abs(np.diff(sent[:, :2], axis=0)).max() < 0.051  # and does not jump away from it
            robot.forget()
            controller.safety.forget()


# The node.


def test_commands_by_name_at_the_policys_rate_and_a_final_hold(active, tiny):
    node, drivers = active
    spec = Policy(*tiny).robot
    before = len(node.sent("/commands"))
    time.sleep(1.0)
    assert node.trigger_deactivate() is ros.TransitionCallbackReturn.SUCCESS and node.label == "inactive"
    sent = node.sent("/commands")
    assert len(sent) - before == pytest.approx(HZ, abs=6)  # a busy machine may skip some
    actions = np.array([message.data for _, message in sent])
    assert actions.shape[1] == spec.action_dim and np.abs(actions[:-1, :3]).max() > 0.01
    np.testing.assert_allclose(actions[-1], spec.hold_action(actions[-2]))
    # The order of the joints differed in every message.
    state = node.controller.robot.observe().observation["agent_pos"]
    np.testing.assert_allclose(state, [drivers.at[name] for name in JOINTS], atol=1e-6)
    time.sleep(0.2)
    assert len(node.sent("/commands")) == len(sent)
    status = node.diagnose()
    assert (status.level, status.message) == (ros.DiagnosticStatus.OK, "not active")
    # Restart: the last command of the previous run is not used.
    assert node.trigger_activate() is ros.TransitionCallbackReturn.SUCCESS
    until(lambda: len(node.sent("/commands")) > len(sent) + 5)


def test_diagnostics(active):
    node, _ = active
    until(lambda: node.diagnose().message == "running")
    time.sleep(0.5)
    status = node.diagnose()
    values = {value.key: value.value for value in status.values}
    assert status.level in (ros.DiagnosticStatus.OK, ros.DiagnosticStatus.WARN) and status.name == "vla: control"
    assert values["control"] == "running" and values["instruction"] == "reach" and int(values["commands"]) > 10
    assert float(values["lateness p99 ms"]) < 100 and 0 < float(values["decode p50 ms"]) <= float(
        values["decode p99 ms"]
    )
    (timer,) = node.timers
    assert timer.period == 1.0 and timer.clock.clock_type == ros.ClockType.STEADY_TIME
    assert node.sent("/diagnostics")[-1][1].header.stamp.sec > 0


def test_a_silent_camera_is_a_hold_with_a_reason(active):
    node, drivers = active
    drivers.silent.add("/wrist/image_raw/compressed")
    until(lambda: "stale observation" in node.diagnose().message)
    time.sleep(0.5)
    status = node.diagnose()
    assert status.level == ros.DiagnosticStatus.ERROR and status.message == "holding: stale observation"
    values = {value.key: value.value for value in status.values}
    assert int(values["intervention: stale observation"]) > 3
    np.testing.assert_array_equal(node.sent("/commands")[-1][1].data[:6], 0)
    drivers.silent.clear()
    until(lambda: node.diagnose().message == "running")


def test_unusable_messages_are_reported(active):
    node, drivers = active
    drivers.silent |= {"/front/image_raw", "/joint_states"}
    time.sleep(0.1)
    node.hear("/front/image_raw", image(np.zeros((8, 8, 2), np.uint8), "yuv422"))
    node.hear("/joint_states", joints({"joint_0": 0.0}))
    status = node.diagnose()
    assert status.level == ros.DiagnosticStatus.ERROR
    assert "unknown image encoding 'yuv422'" in status.message
    assert "no position of joint_1, joint_2, joint_3, joint_4, joint_5, joint_6; it has joint_0" in status.message
    assert len([text for level, text in node.log if level == "error"]) == 2


def test_a_new_instruction_holds_and_stops(active):
    node, _ = active
    told, controller = [], node.controller.loop
    real = controller._policy.predict
    with mock.patch.object(
        controller._policy, "predict", lambda o, i, m, *on: (told.append(i[0]), real(o, i, m, *on))[1]
    ):
        node.hear("/vla/instruction", ros.String(data="push"))
        until(lambda: "push" in told)
    node.hear("/vla/instruction", ros.String(data=" "))
    assert controller.instruction == "push" and node.log[-1] == ("warning", "ignoring an empty instruction.")

    assert node.call("/vla/hold", data=True).success
    until(lambda: node.diagnose().message == "on hold")
    assert node.call("/vla/hold", data=False).success
    until(lambda: node.diagnose().message == "running")

    assert node.call("/vla/emergency_stop").success
    until(lambda: node.diagnose().message == "holding: emergency stop")
    node.trigger_deactivate()
    node.trigger_activate()
    until(lambda: node.diagnose().message == "holding: emergency stop")  # only the operator can release it
    node.trigger_deactivate()
    node.trigger_cleanup()
    node.diagnose()  # clears the reported messages
    node.trigger_configure()
    node.hear("/vla/instruction", ros.String(data="reach"))
    node.trigger_activate()
    until(lambda: node.diagnose().message == "holding: emergency stop")
    assert node.call("/vla/release").success
    until(lambda: node.diagnose().message == "running")


def test_it_waits_for_all_topics(node_of):
    node = node_of(instruction=None)
    assert node.call("/vla/hold", data=True).success  # takes effect when the node becomes active
    assert node.diagnose().message == "not active"
    node.trigger_configure()
    node.trigger_activate()
    status = node.diagnose()
    assert status.level == ros.DiagnosticStatus.WARN
    assert status.message == ("waiting for /front/image_raw, /wrist/image_raw/compressed, /joint_states, ~/instruction")
    with Drivers(node):
        until(lambda: node.diagnose().message == "waiting for ~/instruction")
        assert node.sent("/commands") == []
        node.hear("/vla/instruction", ros.String(data="reach"))
        until(lambda: len(node.sent("/commands")) > 3)
        until(lambda: node.diagnose().message == "on hold")
        assert node.call("/vla/hold", data=False).success
        until(lambda: node.diagnose().message == "running")
        assert node.trigger_deactivate() is ros.TransitionCallbackReturn.SUCCESS
    assert node.trigger_cleanup() is ros.TransitionCallbackReturn.SUCCESS and node.label == "unconfigured"
    assert [s.topic for s in node.subscriptions] == ["/vla/instruction"]
    assert node.trigger_configure() is ros.TransitionCallbackReturn.SUCCESS
    node.trigger_activate()
    assert "~/instruction" in node.diagnose().message  # the instruction of the previous run is discarded


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cameras.fornt": "/image"}, "cameras.fornt: unknown camera 'fornt'"),
        ({"comand_topic": "/go"}, "unknown key 'comand_topic'. Did you mean 'command_topic'"),
        ({"command_type": "velocity"}, "command_type 'velocity'. Valid: 'trajectory', 'array'"),
        ({"gripper_open": "wide"}, "gripper_open: .*number"),
        ({"policy": "/nowhere"}, "/nowhere"),
        ({"control_config": "nowhere.yaml"}, "no configuration file at nowhere.yaml"),
        ({"control_config": str(CONFIGS / "ros2-control.yaml")}, "unknown state entry 'x'"),
    ],
)
def test_a_wrong_parameter_file_can_be_corrected(node_of, parameters, message):
    node = node_of(**parameters)
    assert node.trigger_configure() is ros.TransitionCallbackReturn.FAILURE and node.label == "unconfigured"
    (level, text) = node.log[-1]
    assert level == "error" and "Traceback" not in text
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)
    assert [s.topic for s in node.subscriptions] == ["/vla/instruction"]  # everything else is disconnected


def test_every_parameter_is_described(node_of):
    node = node_of()
    described = {name for name, descriptor in node.descriptors.items() if descriptor.description}
    assert described == {field for field in ros2_robot.Parameters.__dataclass_fields__ if field != "cameras"}


def test_a_failed_control_loop_is_reported_and_the_node_continues(active):
    node, _ = active
    with mock.patch.object(node.controller.robot, "observe", side_effect=RuntimeError("the driver is gone")):
        until(lambda: node.diagnose().message == "the control loop ended: the driver is gone")
    np.testing.assert_array_equal(node.sent("/commands")[-1][1].data[:6], 0)
    assert node.diagnose().level == ros.DiagnosticStatus.ERROR
    assert node.trigger_deactivate() is ros.TransitionCallbackReturn.SUCCESS


def test_a_failed_transition_releases_everything(node_of):
    node = node_of()
    with mock.patch.object(Controller, "configure", side_effect=RuntimeError("out of memory")):
        assert node.trigger_configure() is ros.TransitionCallbackReturn.ERROR
    assert node.label == "unconfigured" and "out of memory" in node.log[-1][1]
    assert node.controller.loop is None and [s.topic for s in node.subscriptions] == ["/vla/instruction"]


def test_the_black_box_is_written_to_the_configured_folder(node_of, tmp_path):
    node = node_of(black_box_dir=str(tmp_path / "box"))
    node.trigger_configure()
    with Drivers(node) as drivers:
        node.trigger_activate()
        until(lambda: len(node.sent("/commands")) > 5)
        drivers.silent.add("/front/image_raw")
        time.sleep(0.8)
        node.trigger_deactivate()
    until(lambda: list((tmp_path / "box").glob("*.zip")))
    boxes = [zipfile.ZipFile(path).read("ticks.jsonl") for path in (tmp_path / "box").glob("*.zip")]
    assert any(b"stale observation" in ticks for ticks in boxes)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sends_the_hold_command_before_ros_shuts_down(monkeypatch, node_of, signum):
    node_of()  # saves the policy
    ros.Context.alive, ros.Context.nodes = False, []
    stack, spun, sent = contextlib.ExitStack(), [], []

    def spin_once(executor, timeout_sec):
        spun.append(timeout_sec)
        (node,) = executor.nodes
        if len(spun) == 1:
            node.trigger_configure()
            stack.enter_context(Drivers(node))
            node.trigger_activate()
            until(lambda: len(node.sent("/commands")) > 10)
            sent.append(node)
        elif len(spun) == 3:
            signal.raise_signal(signum)
            signal.raise_signal(signum)  # the terminal and `ros2 launch` each send one
        assert len(spun) < 4

    monkeypatch.setattr(ros.MultiThreadedExecutor, "spin_once", spin_once)
    before = signal.getsignal(signum)
    with stack:
        assert ros2.main([]) == 0
    (node,) = sent
    commands = np.array([message.data for _, message in node.sent("/commands")])
    np.testing.assert_array_equal(commands[-1, :6], 0)
    assert np.abs(commands[:-1, :3]).max() > 0.01
    assert node.label == "finalized" and not ros.Context.alive and ros.Context.nodes == []
    assert ros.Context.signals is ros.SignalHandlerOptions.NO and signal.getsignal(signum) == before
    assert not any(thread.name == "vla-control" for thread in threading.enumerate())


def test_a_later_second_signal_ends_the_process(monkeypatch):
    with ros2._signals() as stopped, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGINT)


def test_without_ros_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rclpy", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "vla.control.robots.ros2")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("vla.control.robots.ros2", run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("vla: ROS 2 cannot be imported") and "docs.ros.org" in err


# The files.


def test_the_parameter_file_works_with_the_embedded_policy(monkeypatch):
    values = yaml.safe_load((CONFIGS / "ros2.yaml").read_text())["/**"]["ros__parameters"]
    flat = {f"{k}.{c}": t for k, v in values.items() if isinstance(v, dict) for c, t in v.items()}
    flat |= {k: v for k, v in values.items() if not isinstance(v, dict)}
    flat |= {"control_config": str(CONFIGS / "ros2-control.yaml"), "device": "cpu", "black_box_dir": ""}
    ros.start(monkeypatch, **flat)
    ros.init()
    node = ros2.PolicyNode()
    assert node.trigger_configure() is ros.TransitionCallbackReturn.SUCCESS, node.log
    assert {s.topic for s in node.subscriptions} >= {"/front/image_raw", "/wrist/image_raw/compressed", "/hand_states"}
    _, high = node.controller.loop._policy.action_limits
    assert load(ControlConfig, CONFIGS / "ros2-control.yaml").safety.max_velocity["dx"] / HZ < high[0]
    node.trigger_shutdown()


def test_the_launch_file_can_be_built(monkeypatch):
    """With mocks that accept everything, so this finds misspelt names of this package, not of launch."""
    names = "launch launch.events launch.actions launch.conditions launch.substitutions launch_ros launch_ros.actions "
    names += "launch_ros.event_handlers launch_ros.events launch_ros.events.lifecycle lifecycle_msgs lifecycle_msgs.msg"
    for name in names.split():
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # do not write __pycache__ into configs/
    spec = importlib.util.spec_from_file_location("ros2_launch", CONFIGS / "ros2.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate_launch_description()
    arguments = sys.modules["launch_ros.actions"].LifecycleNode.call_args.kwargs
    assert arguments["arguments"] == ["-m", "vla.control.robots.ros2"] and arguments["name"] == "vla"
    defaults = [call.kwargs["default_value"] for call in sys.modules["launch.actions"].DeclareLaunchArgument.mock_calls]
    assert Path(defaults[0]).is_file()
