"""A robot behind ROS 2 topics, and the lifecycle node that drives it with a policy.

    python -m vla.control.robots.ros2 --ros-args --params-file configs/deploy/ros2.yaml

Owns: the translation between messages and observations or actions (by name, encoding and receive time), and what the
controller does at each transition of a managed node. It does not know when a command is due or which commands are safe
(`controller` and `safety` do), nor any hardware: drivers and ros2_control are on the other side of the topics.

configure loads the policy and connects the topics; activate starts the control loop, as soon as every camera, the joint
state and an instruction have come; deactivate ends it with the hold command; cleanup lets everything go.

    in   cameras.<name> (Image or CompressedImage), joint_state_topic (JointState), ~/instruction (String)
    out  command_topic (JointTrajectory or Float64MultiArray), /diagnostics, once per second
    ask  ~/hold (SetBool: hold, go on), ~/emergency_stop, ~/release (Trigger)

SIGINT and SIGTERM shut the node down as a transition does: the loop ends with the hold command while publishers still
work, then ROS goes, and the exit status is 0; a second signal ends the process at once. What the robot does after a
SIGKILL is up to its own controller: give that a command timeout. ~/emergency_stop is software and replaces no button.

A reading is as old as its oldest part, by this machine's monotonic clock when the message was handed over here: stamps
of other machines' clocks are not used, and the time that a picture spent on its way is not seen.

rclpy comes with ROS 2, not from PyPI, so it is imported when a node is made, and its Python has to be this package's
(3.11 or newer: Jazzy's is). This file is written against rclpy's sources of Humble to Rolling and tested against a
stand-in (tests/control/fake_ros2.py), not against ROS: try it where nobody can be hurt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Literal

import cv2
import numpy as np

from vla.config import ControlConfig, from_dict, load
from vla.config.files import STRICT
from vla.control.black_box import BlackBox
from vla.control.controller import Controller
from vla.control.events import StepEvent
from vla.control.robot import Reading
from vla.errors import ConfigError, SpecError, VLAError, unknown
from vla.policy import ChunkPolicy
from vla.serving import client
from vla.spec import RobotSpec
from vla.support.statistics import percentiles

_TYPES = {
    "rclpy.callback_groups": ("MutuallyExclusiveCallbackGroup",),
    "rclpy.clock": ("Clock", "ClockType"),
    "rclpy.duration": ("Duration",),
    "rclpy.executors": ("MultiThreadedExecutor",),
    "rclpy.lifecycle": ("LifecycleNode", "TransitionCallbackReturn"),
    "rclpy.qos": ("DurabilityPolicy", "HistoryPolicy", "QoSProfile", "ReliabilityPolicy"),
    "rclpy.signals": ("SignalHandlerOptions",),
    "rcl_interfaces.msg": ("ParameterDescriptor",),
    "sensor_msgs.msg": ("CompressedImage", "Image", "JointState"),
    "std_msgs.msg": ("Float64MultiArray", "String"),
    "trajectory_msgs.msg": ("JointTrajectory", "JointTrajectoryPoint"),
    "diagnostic_msgs.msg": ("DiagnosticArray", "DiagnosticStatus", "KeyValue"),
    "std_srvs.srv": ("SetBool", "Trigger"),
}
#: Parameters that rclpy declares or reads itself.
_FOREIGN = ("use_sim_time", "start_type_description_service", "qos_overrides.")
#: Encoding -> its channels and what makes RGB of them.
_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}
_THREADS = 4  # pictures, the joint state, the operator and a transition do not wait for each other
_PATIENCE_S = 10.0  # for the control loop to end, and for callbacks that are still running
_ECHO_S = 1.0  # `ros2 launch` may send a signal that the terminal has sent already: that is no second one


def _parameter(description: str, default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"description": description})


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The node's parameters, as they are read at configure. Unknown names and wrong types are errors."""

    __pydantic_config__ = STRICT
    policy: str = _parameter('"nano", a run folder, a checkpoint folder, or the address of a `vla serve`', "nano")
    device: str = _parameter('where the policy computes: "auto", "cpu", "cuda"', "auto")
    unnorm_key: str | None = _parameter("whose statistics un-normalise; needed when the checkpoint holds several")
    n_action_steps: int | None = _parameter("actions between two chunks; unset: as in the checkpoint")
    instruction: str = _parameter("what to do first; empty: wait for ~/instruction", "")
    control_config: str = _parameter("YAML file of the control loop's and the safety limits' values; empty: none", "")
    black_box_dir: str = _parameter("folder of the black boxes; empty: none are written", "")
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)  # the parameters cameras.<name>
    joint_state_topic: str = _parameter("where JointState messages come; each names all joints", "/joint_states")
    state_joints: tuple[str, ...] = _parameter("joint of each state entry, in the policy's order; unset: its names", ())
    command_topic: str = _parameter("where commands go", "/joint_trajectory_controller/joint_trajectory")
    command_type: Literal["trajectory", "array"] = _parameter(
        '"trajectory": JointTrajectory, positions; "array": Float64MultiArray, as the policy says', "trajectory"
    )
    command_joints: tuple[str, ...] = _parameter("joint of each action entry, in the policy's order", ())
    gripper_open: float | None = _parameter("command that opens the robot's gripper; unset: the policy's value")
    gripper_closed: float | None = _parameter("command that closes it; unset: the policy's value")


@dataclasses.dataclass(frozen=True)
class _Placed(RobotSpec):
    """A robot that is somewhere before it is told anything: what a hold command repeats then is `where`, not zero."""

    where: Callable[[], np.ndarray] | None = None

    def hold_action(self, last: np.ndarray | None, state: np.ndarray | None = None) -> np.ndarray:
        return super().hold_action(self.where() if last is None and self.where is not None else last, state)


class Ros2Robot:
    """A `Robot` on the topics of `node`. Of everything the latest counts; messages that cannot be used are `faults`.

    Args:
        node: a LifecycleNode; it must be active for commands to leave.
        spec: whom the policy was trained for.
        hz: commands per second.
    Attributes:
        faults: topic -> what is wrong with its last message.
    Raises:
        ConfigError: cameras, joints or the type of commands do not fit the robot.
    """

    def __init__(self, node: Any, spec: RobotSpec, parameters: Parameters, hz: float) -> None:
        ros = self._ros = _ros()
        self._wired, self._period = _wire(spec, parameters), 1.0 / hz
        self.spec: RobotSpec = _Placed(**vars(spec), where=self._where)
        # An entry that holds by repeating a position has to start from the measured one.
        repeated = [i for i in range(spec.action_dim) if not spec.hold or spec.hold[i] is None]
        self._placed = [i for i in repeated if i != self._gripper and not spec.action_space.relative]
        needed = [*self._wired.state_joints, *(self._wired.command_joints[i] for i in self._placed)]
        self._joints = tuple(dict.fromkeys(needed))
        self._lock = threading.Lock()
        self._parts: dict[str, tuple[float, Any]] = {}  # topic -> when it came, and what it says
        self._at: dict[str, float] = {}  # the last finite positions
        self._reading: Reading | None = None
        self._last: np.ndarray | None = None
        self.faults: dict[str, str] = {}
        self._node = node
        # A lost picture is not worth waiting for, and one that waited is no longer wanted. Best effort also hears
        # publishers that are reliable.
        latest = ros.QoSProfile(
            history=ros.HistoryPolicy.KEEP_LAST,
            depth=1,
            reliability=ros.ReliabilityPolicy.BEST_EFFORT,
            durability=ros.DurabilityPolicy.VOLATILE,
        )
        self._topics, self._subscriptions = [], []
        for topic, kind, decode in self._inputs(ros):
            group, take = ros.MutuallyExclusiveCallbackGroup(), functools.partial(self._take, topic, decode)
            self._topics.append(topic)
            self._subscriptions.append(node.create_subscription(kind, topic, take, latest, callback_group=group))
        kind = ros.JointTrajectory if self._wired.command_type == "trajectory" else ros.Float64MultiArray
        self._publisher = node.create_lifecycle_publisher(kind, self._wired.command_topic, _reliable(ros))

    def observe(self) -> Reading | None:
        """The latest pictures and state, uint8 [height, width, 3] and float32 [S]; None until all have come."""
        if self.awaited():
            return None
        with self._lock:
            if self._reading is None:
                pixels = {camera: self._parts[topic][1] for camera, topic in self._wired.cameras.items()}
                observation: dict[str, Any] = {"pixels": pixels}
                if self.spec.state_dim:
                    at = self._parts[self._wired.joint_state_topic][1]
                    observation["agent_pos"] = np.array([at[name] for name in self._wired.state_joints], np.float32)
                self._reading = Reading(observation, min(arrived for arrived, _ in self._parts.values()))
            return self._reading

    def command(self, action: np.ndarray) -> None:
        """Publish `action`, float32 [D] in the policy's units and order, each entry under its joint's name."""
        self._last = np.array(action, np.float32)
        values = self._last.astype(np.float64)
        if self._gripper is not None:
            values[self._gripper] = _between(values[self._gripper], self._polarity, self._robots_polarity)
        self._publisher.publish(self._message(values.tolist()))

    def close(self) -> None:
        """Leave the topics. The last command, which the controller saw to, was to hold."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._node.destroy_lifecycle_publisher(self._publisher)

    def awaited(self) -> list[str]:
        """Topics that have to speak before there is a first reading."""
        return [topic for topic in self._topics if topic not in self._parts]

    def forget(self) -> None:
        """Somebody else may have moved the robot: it is where its joints are, not where it was last sent."""
        self._last = None

    def _inputs(self, ros: Any) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
        """(topic, type of message, what reads it)."""
        for topic in dict.fromkeys(self._wired.cameras.values()):
            compressed = topic.endswith("/compressed")  # as image_transport calls them
            yield topic, ros.CompressedImage if compressed else ros.Image, uncompressed if compressed else picture
        if self._joints:
            yield self._wired.joint_state_topic, ros.JointState, self._feel

    def _take(self, topic: str, decode: Callable[[Any], Any], message: Any) -> None:
        arrived = time.monotonic()
        try:
            value = decode(message)
        except Exception as error:  # whatever a driver sends, the robot must go on being commanded
            if self.faults.get(topic) != str(error):
                self._node.get_logger().error(f"{topic}: {error}")
            self.faults[topic] = str(error)
            return
        with self._lock:
            self.faults.pop(topic, None)
            self._parts[topic], self._reading = (arrived, value), None

    def _feel(self, message: Any) -> dict[str, float]:
        at = positions(message, self._joints)
        if np.isfinite(list(at.values())).all():
            self._at = at
        elif not self._at:
            raise SpecError(f"the joint state is not finite: {at}.")
        return at

    def _where(self) -> np.ndarray:
        """The last command, else what the joints say, float32 [D]; 0 for what is no position."""
        if self._last is not None:
            return self._last
        at, where = self._at, np.zeros(self.spec.action_dim, np.float32)
        for i in self._placed:
            where[i] = at[self._wired.command_joints[i]]
        # Only where commands are positions is a gripper's position in the unit of its command.
        if self._placed and self._gripper is not None:
            measured = at.get(self._wired.command_joints[self._gripper], sum(self._robots_polarity) / 2)
            where[self._gripper] = np.clip(
                _between(measured, self._robots_polarity, self._polarity), min(self._polarity), max(self._polarity)
            )
        return where

    def _message(self, values: list[float]) -> Any:
        if self._wired.command_type == "array":
            return self._ros.Float64MultiArray(data=values)
        # The header's stamp stays zero: "from now on".
        reached = self._ros.Duration(seconds=self._period).to_msg()
        point = self._ros.JointTrajectoryPoint(positions=values, time_from_start=reached)
        return self._ros.JointTrajectory(joint_names=list(self._wired.command_joints), points=[point])

    @property
    def _gripper(self) -> int | None:
        index = self.spec.gripper_index
        return None if index is None else index % self.spec.action_dim

    @property
    def _polarity(self) -> tuple[float, float]:
        return self.spec.gripper_closed, self.spec.gripper_open

    @property
    def _robots_polarity(self) -> tuple[float, float]:
        closed, opened = self._wired.gripper_closed, self._wired.gripper_open
        return self._polarity if closed is None or opened is None else (closed, opened)


class Pilot:
    """What the lifecycle node `node` does at its transitions, and what it tells and is told while it drives.

    Attributes:
        robot, controller: from `configure` to `close`.
    """

    def __init__(self, node: Any) -> None:
        ros = self._ros = _ros()
        self._node, self._instruction = node, ""
        self._held = self._stopped = False  # what a person ordered; it outlives the controller
        self.robot: Ros2Robot | None = None
        self.controller: Controller | None = None
        self._policy: ChunkPolicy | None = None
        self._box: BlackBox | None = None
        self._thread: threading.Thread | None = None
        self._leaving, self._orders = threading.Event(), threading.Lock()
        self._problem = ""  # what ended the control loop
        self._ticks: deque[tuple[float, str | None, tuple[str, ...]]] = deque(maxlen=10_000)  # since the last report
        self._decode_ms: deque[float] = deque(maxlen=200)
        self._commands = 0
        for field in dataclasses.fields(Parameters):
            if "description" in field.metadata:
                _declare(node, ros, field)
        operator, reports = ros.MutuallyExclusiveCallbackGroup(), ros.MutuallyExclusiveCallbackGroup()
        node.create_subscription(ros.String, "~/instruction", self._instruct, _reliable(ros), callback_group=operator)
        for name, kind, answer in (
            ("hold", ros.SetBool, lambda request: {"_held": bool(request.data)}),
            ("emergency_stop", ros.Trigger, lambda _: {"_stopped": True}),
            ("release", ros.Trigger, lambda _: {"_stopped": False}),
        ):
            serve = functools.partial(self._serve, answer)
            node.create_service(kind, f"~/{name}", serve, callback_group=operator)
        self._diagnostics = node.create_publisher(ros.DiagnosticArray, "/diagnostics", _reliable(ros))
        steady = ros.Clock(clock_type=ros.ClockType.STEADY_TIME)  # also where simulated time stands still
        node.create_timer(1.0, self._report, callback_group=reports, clock=steady)

    def configure(self) -> None:
        """Load the policy, connect the topics, decode once."""
        parameters = _read(self._node)
        control = load(ControlConfig, parameters.control_config) if parameters.control_config else ControlConfig()
        named = parameters.policy, parameters.device, parameters.unnorm_key, parameters.n_action_steps
        policy = self._policy = client.load(*named)
        try:
            self.robot = Ros2Robot(self._node, policy.robot, parameters, control.hz or policy.robot.control_hz)
            self.controller = Controller(self.robot, policy, control)
            self.controller.listeners.append(self._listen)
            if parameters.black_box_dir and control.black_box_s:
                self._box = BlackBox(Path(parameters.black_box_dir), control.black_box_s, self.controller.hz)
                self.controller.listeners.append(self._box.add)
            with self._orders:
                self._obey()
            self.controller.configure()
        except BaseException:
            self.close()
            raise
        self._instruction, self._problem, self._commands = self._instruction or parameters.instruction, "", 0

    def activate(self) -> None:
        """Drive from now on, in a thread of its own."""
        assert self.robot is not None and self.controller is not None
        self.robot.forget()
        self.controller.safety.forget()
        self._problem = ""
        self._leaving.clear()
        self._thread = threading.Thread(target=self._drive, daemon=True, name="vla-control")
        self._thread.start()

    def deactivate(self) -> None:
        """End the control loop with the hold command."""
        if self._thread is None:
            return
        assert self.controller is not None
        self._leaving.set()
        self.controller.stop()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            raise RuntimeError(f"the control loop did not end within {_PATIENCE_S:g} s.")
        self._thread = None
        if self._box is not None:
            self._box.end()

    def close(self) -> None:
        """Let everything go, after `deactivate`."""
        self.deactivate()
        if self.controller is not None:
            self.controller.close()
        elif self.robot is not None:
            self.robot.close()
        if self._box is not None:
            self._box.close()
            if self._box.problem is not None:
                self._node.get_logger().error(f"the black box is not complete: {self._box.problem}")
        if isinstance(self._policy, client.RemotePolicy):
            self._policy.close()
        self.robot = self.controller = self._policy = self._box = None
        self._instruction = ""  # was for that policy

    def _drive(self) -> None:
        assert self.robot is not None and self.controller is not None
        try:
            # A run ends only when it is to; should it have met a `stop` that was meant for the one before, on it goes.
            while not self._leaving.is_set():
                if self.robot.awaited() or not self._instruction:
                    self._leaving.wait(0.02)
                else:
                    self._run()
        except Exception as error:
            self._problem = f"the control loop ended: {error}"
            self._node.get_logger().error(traceback.format_exc())

    def _run(self) -> None:
        """Until it is stopped; a robot that does not say yet where it is is waited for."""
        assert self.controller is not None
        try:
            self.controller.run(self._instruction, math.inf)
        except SpecError as error:
            if not self._leaving.is_set():
                self._problem = f"waiting: {error}"
                self._node.get_logger().warning(self._problem)
                self._leaving.wait(0.5)

    def _obey(self) -> None:
        """Tell the controller, if there is one, what a person ordered last."""
        if self.controller is not None:
            (self.controller.hold if self._held else self.controller.resume)()
            safety = self.controller.safety
            (safety.emergency_stop if self._stopped else safety.release)()

    def _listen(self, event: StepEvent) -> None:
        self._problem = ""
        self._commands += 1
        self._ticks.append((event.lateness_s, event.fault, event.reasons))
        if event.decoding is not None and "error" not in event.decoding:
            self._decode_ms.append(event.decoding["ms"])

    def _instruct(self, message: Any) -> None:
        if not message.data.strip():
            self._node.get_logger().warning("an empty instruction is ignored.")
            return
        self._instruction, controller = message.data, self.controller
        if controller is not None:
            controller.instruction = message.data

    def _serve(self, order: Callable[[Any], dict[str, bool]], request: Any, response: Any) -> Any:
        """Orders are taken at any time: an emergency stop is not refused, and nothing but `release` ends it."""
        with self._orders:
            vars(self).update(order(request))
            self._obey()
        response.success, response.message = True, ""
        return response

    def _report(self) -> None:
        """Publish what happened since the last time."""
        ros = self._ros
        ticks = [self._ticks.popleft() for _ in range(len(self._ticks))]
        level, message = self._judge(ticks, self.robot)
        values: dict[str, object] = {"instruction": self._instruction, "commands": self._commands}
        if (controller := self.controller) is not None:
            values["control"] = controller.state.value
            values |= {f"intervention: {why}": n for why, n in dict(controller.safety.interventions).items()}
        for name, ms in (("lateness", [1e3 * late for late, _, _ in ticks]), ("decode", list(self._decode_ms))):
            if ms:
                values |= {f"{name} {share} ms": f"{percentiles(ms)[share]:.1f}" for share in ("p50", "p99")}
        status = ros.DiagnosticStatus(
            level=getattr(ros.DiagnosticStatus, level),
            name=f"{self._node.get_name()}: control",
            message=message,
            values=[ros.KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )
        report = ros.DiagnosticArray(status=[status])
        report.header.stamp = self._node.get_clock().now().to_msg()
        self._diagnostics.publish(report)

    def _judge(self, ticks: Sequence[tuple[float, str | None, tuple[str, ...]]], robot: Any) -> tuple[str, str]:
        """(level, message): an ERROR is what mostly holds the robot, a WARN what did at times or is a person's will."""
        if self._problem:
            return "ERROR", self._problem
        unusable = [f"{topic}: {fault}" for topic, fault in dict(robot.faults).items()] if robot else []
        if self._thread is None or robot is None:
            return ("WARN" if unusable else "OK"), "; ".join(["not active", *unusable])
        awaited = robot.awaited() + ["~/instruction"] * (not self._instruction)
        if awaited:
            return ("ERROR" if unusable else "WARN"), "; ".join([f"waiting for {', '.join(awaited)}", *unusable])
        if not ticks:
            return "ERROR", "no command since the last report"
        faults = Counter(fault for _, fault, _ in ticks if fault is not None)
        if unusable or 2 * faults.total() > len(ticks):  # one late chunk is no alarm
            return "ERROR", "; ".join([f"holding: {why}" for why, _ in faults.most_common(1)] + unusable)
        if faults:
            return "WARN", "held: " + ", ".join(f"{count} x {why}" for why, count in faults.items())
        return ("WARN", "on hold") if "on hold" in ticks[-1][2] else ("OK", "running")


def picture(message: Any) -> np.ndarray:
    """An Image as uint8 RGB [height, width, 3]; SpecError for an encoding or a size that it cannot have."""
    if message.encoding not in _ENCODINGS:
        fix = "Let the driver publish one of these, or take its .../compressed topic."
        raise SpecError(unknown("image encoding", message.encoding, _ENCODINGS, fix))
    channels, conversion = _ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8)
    if not height * width or step < width * channels or len(data) < height * step:
        raise SpecError(f"{len(data)} bytes are no image of {height} x {width} {message.encoding}, step {step}.")
    rows = data[: height * step].reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    return rows.copy() if conversion is None else cv2.cvtColor(rows, conversion)


def uncompressed(message: Any) -> np.ndarray:
    """A CompressedImage as uint8 RGB [height, width, 3]; SpecError where it is no JPEG or PNG."""
    data = np.frombuffer(message.data, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise SpecError(f"a compressed image ({message.format!r}, {len(data)} bytes) cannot be decoded.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def positions(message: Any, names: Sequence[str]) -> dict[str, float]:
    """The positions of these joints in a JointState, whatever their order in it; SpecError lists the missing ones."""
    found = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in names if name not in found]
    if missing:
        has = ", ".join(found) or "none"
        raise SpecError(f"the joint state has no position of {', '.join(missing)}; it has {has}.")
    return {name: float(found[name]) for name in names}


def build_node() -> Any:
    """The lifecycle node; its class is made here because its base is rclpy's. ConfigError where ROS 2 is missing."""
    ros = _ros()
    result = ros.TransitionCallbackReturn

    class PolicyNode(ros.LifecycleNode):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            # Everything in the file is declared, so that a misspelt name is found.
            super().__init__("vla", automatically_declare_parameters_from_overrides=True)
            self.pilot = Pilot(self)

        def on_configure(self, state: Any) -> Any:
            return self._attempt(self.pilot.configure, functools.partial(super().on_configure, state))

        def on_activate(self, state: Any) -> Any:  # publishers first
            return self._attempt(functools.partial(super().on_activate, state), self.pilot.activate)

        def on_deactivate(self, state: Any) -> Any:  # publishers last: the hold command has to leave
            return self._attempt(self.pilot.deactivate, functools.partial(super().on_deactivate, state))

        def on_cleanup(self, state: Any) -> Any:
            return self._attempt(self.pilot.close, functools.partial(super().on_cleanup, state))

        def on_shutdown(self, state: Any) -> Any:
            return self._attempt(self.pilot.close, functools.partial(super().on_shutdown, state))

        def on_error(self, state: Any) -> Any:
            return self._attempt(self.pilot.close)

        def _attempt(self, *steps: Callable[[], Any]) -> Any:
            """FAILURE for what a person can mend, ERROR for the rest; rclpy says nothing of exceptions itself."""
            try:
                for step in steps:
                    step()
            except VLAError as error:
                self.get_logger().error(str(error))
                return result.FAILURE
            except Exception:
                self.get_logger().error(traceback.format_exc())
                return result.ERROR
            return result.SUCCESS

    return PolicyNode()


def main(args: Sequence[str] | None = None) -> int:
    """Spin the node until SIGINT or SIGTERM; the exit status."""
    try:
        ros = _ros()
    except ConfigError as error:
        print(f"vla: {error}", file=sys.stderr)
        return 2
    # A thread that wants to run may have to wait this long for Python's lock: less than the jitter that matters.
    sys.setswitchinterval(0.0005)
    # rclpy's own handlers would end ROS, and with it the publisher that the hold command needs.
    ros.rclpy.init(args=args, signal_handler_options=ros.SignalHandlerOptions.NO)
    node, executor = build_node(), ros.MultiThreadedExecutor(num_threads=_THREADS)
    executor.add_node(node)
    with _signals() as stopped:
        try:
            while ros.rclpy.ok() and not stopped.is_set():
                executor.spin_once(timeout_sec=0.1)
        finally:
            executor.shutdown(timeout_sec=_PATIENCE_S)  # a transition that is going on comes to its end
            node.trigger_shutdown()
            node.destroy_node()
            ros.rclpy.try_shutdown()
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal does at once what it did before."""
    stopped, since = threading.Event(), 0.0
    before: dict[int, Any] = {}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal since
        if not stopped.is_set():
            since = time.monotonic()
            stopped.set()
        elif time.monotonic() - since > _ECHO_S:
            restore()
            signal.raise_signal(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        restore()


def _wire(spec: RobotSpec, parameters: Parameters) -> Parameters:
    """The parameters with what is unset taken from the robot; ConfigError where they do not fit it."""
    for camera in parameters.cameras:
        if camera not in spec.cameras:
            raise ConfigError(f"cameras.{camera}: {unknown('camera', camera, spec.cameras)}")
    if missing := [f"cameras.{camera}" for camera in spec.cameras if camera not in parameters.cameras]:
        raise ConfigError(f"the policy sees {', '.join(spec.cameras)}: give the topic of {', '.join(missing)}.")
    state, command = parameters.state_joints or spec.state_names, parameters.command_joints or spec.action_names
    for name, joints, entries in (("state", state, spec.state_names), ("command", command, spec.action_names)):
        if len(joints) != len(entries):
            raise ConfigError(
                f"{name}_joints has {len(joints)} names; one is needed for each of the policy's {', '.join(entries)}."
            )
    if parameters.command_type == "trajectory" and spec.action_space.relative:
        raise ConfigError(f'a trajectory is of positions, but these actions are {spec.action_space}: take "array".')
    gripper = parameters.gripper_closed, parameters.gripper_open
    if gripper != (None, None) and (spec.gripper_index is None or None in gripper or gripper[0] == gripper[1]):
        raise ConfigError(
            "gripper_closed and gripper_open are two different commands, for a robot with a gripper; got "
            f"{gripper[0]} and {gripper[1]}{' for one without' if spec.gripper_index is None else ''}."
        )
    cameras = {camera: parameters.cameras[camera] for camera in spec.cameras}
    return dataclasses.replace(parameters, cameras=cameras, state_joints=state, command_joints=command)


def _declare(node: Any, ros: Any, field: dataclasses.Field[Any]) -> None:
    # What is unset has no type in ROS; `_read` checks types, and says what was expected.
    descriptor = ros.ParameterDescriptor(description=field.metadata["description"], dynamic_typing=True)
    if node.has_parameter(field.name):
        node.set_descriptor(field.name, descriptor)
    else:
        node.declare_parameter(field.name, None if field.default == () else field.default, descriptor)


def _read(node: Any) -> Parameters:
    """The node's parameters; ConfigError names what is unknown or of a wrong type."""
    values: dict[str, Any] = {"cameras": {}}
    for name, parameter in node.get_parameters_by_prefix("").items():
        if parameter.value is None or name.startswith(_FOREIGN):
            continue
        group, _, camera = name.partition(".")
        if group == "cameras" and camera:
            values["cameras"][camera] = parameter.value
        else:
            values[name] = parameter.value
    return from_dict(Parameters, values, "parameters")


def _reliable(ros: Any) -> Any:
    """Of commands none may be lost and only the newest counts; who joins late must not execute an old one."""
    return ros.QoSProfile(
        history=ros.HistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=ros.ReliabilityPolicy.RELIABLE,
        durability=ros.DurabilityPolicy.VOLATILE,
    )


def _between(value: float, here: tuple[float, float], there: tuple[float, float]) -> float:
    """`value` on the line that takes the two numbers of `here` to those of `there`."""
    share = (value - here[0]) / (here[1] - here[0]) if here[0] != here[1] else 0.0
    return value if here == there else there[0] + share * (there[1] - there[0])


def _ros() -> Any:
    """rclpy and what is used of it and of the message packages; ConfigError where ROS 2 is missing."""
    try:
        found = {"rclpy": importlib.import_module("rclpy")}
        for module, names in _TYPES.items():
            found |= {name: getattr(importlib.import_module(module), name) for name in names}
    except ImportError as error:
        raise ConfigError(
            f"ROS 2 is missing here ({error}). It does not come from PyPI: install one whose Python is this package's, "
            "3.11 or newer (https://docs.ros.org), and source its setup file."
        ) from None
    return SimpleNamespace(**found)


if __name__ == "__main__":
    sys.exit(main())
