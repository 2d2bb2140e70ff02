"""The ROS 2 lifecycle node that drives a robot with a policy.

    python -m vla.control.robots.ros2 --ros-args --params-file configs/deploy/ros2.yaml

Owns: the transitions of the managed node, the operator's commands, the diagnostics, and the process. Topics are handled
by `ros2_robot`, messages by `ros2_messages`.

configure loads the policy and connects the topics. activate starts the control loop, which waits for an image of every
camera, a joint state and an instruction. deactivate ends the loop with the hold command. cleanup releases everything.

    in        cameras.<name> (Image or CompressedImage), joint_state_topic (JointState), ~/instruction (String)
    out       command_topic (JointTrajectory or Float64MultiArray), /diagnostics, once per second
    services  ~/hold (SetBool: true holds, false continues), ~/emergency_stop, ~/release (Trigger)

SIGINT and SIGTERM trigger the node's shutdown transition: the loop ends with the hold command, then ROS shuts down, and
the exit status is 0. A second signal, at least a second later, has its usual effect. After a SIGKILL, only the robot's
own controller can stop the robot: configure a command timeout in it. ~/emergency_stop is software and does not replace
an emergency stop button.

rclpy comes with ROS 2 and must support this package's Python, 3.11 or newer. This excludes the standard build of
Humble, but not of Jazzy. The code follows rclpy's sources from Humble to Rolling, but has only been tested with a fake
rclpy: first try it where it is safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from rcl_interfaces.msg import ParameterDescriptor
    from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
    from rclpy.clock import Clock, ClockType
    from rclpy.executors import MultiThreadedExecutor
    from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
    from rclpy.signals import SignalHandlerOptions
    from std_msgs.msg import String
    from std_srvs.srv import SetBool, Trigger
except ImportError as missing:
    sys.stderr.write(
        f"vla: ROS 2 cannot be imported ({missing}). It is not on PyPI: install a ROS 2 distribution that uses this "
        "package's Python, 3.11 or newer (https://docs.ros.org), and source its setup file.\n"
    )
    raise SystemExit(2) from None

from vla.config import ControlConfig, from_dict, load
from vla.control.black_box import BlackBox
from vla.control.controller import Controller
from vla.control.events import StepEvent
from vla.control.robots.ros2_messages import RELIABLE
from vla.control.robots.ros2_robot import Parameters, Ros2Robot
from vla.errors import SpecError, VLAError
from vla.policy import ChunkPolicy
from vla.serving import client
from vla.support.statistics import percentiles

#: Parameters of rclpy itself.
_FOREIGN = ("use_sim_time", "start_type_description_service", "qos_overrides.")
_THREADS = 4  # for images, joint states, the operator and a transition in parallel
_PATIENCE_S = 10.0  # timeout for the end of the control loop, and for running callbacks
_ECHO_S = 1.0  # signals within this time count as one, because the terminal and `ros2 launch` may both send one


class PolicyNode(LifecycleNode):
    """The managed node: each transition calls a method of `controller`."""

    def __init__(self) -> None:
        # Declare every parameter of the file, to detect misspelt names.
        super().__init__("vla", automatically_declare_parameters_from_overrides=True)
        self.controller = NodeController(self)

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        return self._attempt(self.controller.configure, functools.partial(super().on_configure, state))

    def on_activate(self, state: Any) -> TransitionCallbackReturn:  # activate the publishers first
        return self._attempt(functools.partial(super().on_activate, state), self.controller.activate)

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:  # publishers last, after the hold command
        return self._attempt(self.controller.deactivate, functools.partial(super().on_deactivate, state))

    def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
        return self._attempt(self.controller.close, functools.partial(super().on_cleanup, state))

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        return self._attempt(self.controller.close, functools.partial(super().on_shutdown, state))

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        return self._attempt(self.controller.close)

    def _attempt(self, *steps: Callable[[], Any]) -> TransitionCallbackReturn:
        """Run `steps`. Returns FAILURE after an error that the user can fix, ERROR after any other error. Errors are
        logged, because rclpy hides exceptions."""
        try:
            for step in steps:
                step()
        except VLAError as error:
            self.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE
        except Exception:
            self.get_logger().error(traceback.format_exc())
            return TransitionCallbackReturn.ERROR
        return TransitionCallbackReturn.SUCCESS


class NodeController:
    """The transitions of `node`, with its policy, robot, control loop, operator commands and diagnostics.

    Attributes:
        robot, loop: the robot and its controller; None before `configure` and after `close`.
    """

    def __init__(self, node: LifecycleNode) -> None:
        self._node, self._instruction = node, ""
        self._held = self._stopped = False  # set by the operator; kept when the control loop ends
        self.robot: Ros2Robot | None = None
        self.loop: Controller | None = None
        self._policy: ChunkPolicy | None = None
        self._box: BlackBox | None = None
        self._thread: threading.Thread | None = None
        self._leaving, self._orders = threading.Event(), threading.Lock()
        self._problem = ""  # why the control loop ended or waits
        self._steps: deque[tuple[float, str | None, tuple[str, ...]]] = deque(maxlen=10_000)  # since the last report
        self._decode_ms: deque[float] = deque(maxlen=200)
        self._commands = 0
        for field in dataclasses.fields(Parameters):
            if "description" in field.metadata:
                _declare(node, field)
        operator = MutuallyExclusiveCallbackGroup()
        node.create_subscription(String, "~/instruction", self._on_instruction, RELIABLE, callback_group=operator)
        node.create_service(SetBool, "~/hold", self._on_hold, callback_group=operator)
        node.create_service(Trigger, "~/emergency_stop", self._on_emergency_stop, callback_group=operator)
        node.create_service(Trigger, "~/release", self._on_release, callback_group=operator)
        self._diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", RELIABLE)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # simulated time may be paused
        node.create_timer(1.0, self._report, callback_group=MutuallyExclusiveCallbackGroup(), clock=steady)

    def configure(self) -> None:
        """Load the policy, connect the topics, and decode one chunk as a warm-up."""
        parameters = _read(self._node)
        control = load(ControlConfig, parameters.control_config) if parameters.control_config else ControlConfig()
        named = parameters.policy, parameters.device, parameters.unnorm_key, parameters.n_action_steps
        policy = self._policy = client.load(*named)
        try:
            self.robot = Ros2Robot(self._node, policy.robot, parameters, control.hz or policy.robot.control_hz)
            self.loop = Controller(self.robot, policy, control)
            self.loop.listeners.append(self._listen)
            if parameters.black_box_dir and control.black_box_s:
                self._box = BlackBox(Path(parameters.black_box_dir), control.black_box_s, self.loop.hz)
                self.loop.listeners.append(self._box.add)
            with self._orders:
                self._apply_orders()
            self.loop.configure()
        except BaseException:
            self.close()
            raise
        self._instruction, self._problem, self._commands = self._instruction or parameters.instruction, "", 0

    def activate(self) -> None:
        """Start the control loop in a background thread."""
        assert self.robot is not None and self.loop is not None
        self.robot.forget()
        self.loop.safety.forget()
        self._problem = ""
        self._leaving.clear()
        self._thread = threading.Thread(target=self._drive, daemon=True, name="vla-control")
        self._thread.start()

    def deactivate(self) -> None:
        """End the control loop with the hold command."""
        if self._thread is None:
            return
        assert self.loop is not None
        self._leaving.set()
        self.loop.stop()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            raise RuntimeError(f"the control loop did not end within {_PATIENCE_S:g} s.")
        self._thread = None
        if self._box is not None:
            self._box.end()

    def close(self) -> None:
        """Deactivate and release everything."""
        self.deactivate()
        if self.loop is not None:
            self.loop.close()
        elif self.robot is not None:
            self.robot.close()
        if self._box is not None:
            self._box.close()
            if self._box.problem is not None:
                self._node.get_logger().error(f"the black box recording is incomplete: {self._box.problem}")
        if isinstance(self._policy, client.RemotePolicy):
            self._policy.close()
        self.robot = self.loop = self._policy = self._box = None
        self._instruction = ""  # another policy may need another instruction

    def _drive(self) -> None:
        assert self.robot is not None and self.loop is not None
        try:
            # In a loop, because a late `stop` for the previous run may end this one.
            while not self._leaving.is_set():
                if self.robot.awaited() or not self._instruction:
                    self._leaving.wait(0.02)
                else:
                    self._run(self.loop)
        except Exception as error:
            self._problem = f"the control loop ended: {error}"
            self._node.get_logger().error(traceback.format_exc())

    def _run(self, loop: Controller) -> None:
        """Run until stopped. If the robot's position is unknown, report it and wait."""
        try:
            loop.run(self._instruction, math.inf)
        except SpecError as error:
            if not self._leaving.is_set():
                self._problem = f"waiting: {error}"
                self._node.get_logger().warning(self._problem)
                self._leaving.wait(0.5)

    # Operator commands are accepted in every state. Only `release` ends an emergency stop.

    def _on_instruction(self, message: String) -> None:
        if not message.data.strip():
            self._node.get_logger().warning("ignoring an empty instruction.")
            return
        self._instruction, loop = message.data, self.loop
        if loop is not None:
            loop.instruction = message.data

    def _on_hold(self, request: Any, response: Any) -> Any:
        with self._orders:
            self._held = bool(request.data)
            self._apply_orders()
        return _accepted(response)

    def _on_emergency_stop(self, request: Any, response: Any) -> Any:
        with self._orders:
            self._stopped = True
            self._apply_orders()
        return _accepted(response)

    def _on_release(self, request: Any, response: Any) -> Any:
        with self._orders:
            self._stopped = False
            self._apply_orders()
        return _accepted(response)

    def _apply_orders(self) -> None:
        if self.loop is None:
            return
        if self._held:
            self.loop.hold()
        else:
            self.loop.resume()
        if self._stopped:
            self.loop.safety.emergency_stop()
        else:
            self.loop.safety.release()

    def _listen(self, event: StepEvent) -> None:
        self._problem = ""
        self._commands += 1
        self._steps.append((event.lateness_s, event.fault, event.reasons))
        if event.decoding is not None and "error" not in event.decoding:
            self._decode_ms.append(event.decoding["ms"])

    def _report(self) -> None:
        """Publish the diagnostics of the time since the last report."""
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        level, message = self._judge(steps)
        values: dict[str, object] = {"instruction": self._instruction, "commands": self._commands}
        if (loop := self.loop) is not None:
            values["control"] = loop.state.value
            values |= {f"intervention: {why}": n for why, n in dict(loop.safety.interventions).items()}
        for name, ms in (("lateness", [1e3 * late for late, _, _ in steps]), ("decode", list(self._decode_ms))):
            if ms:
                values |= {f"{name} {share} ms": f"{percentiles(ms)[share]:.1f}" for share in ("p50", "p99")}
        status = DiagnosticStatus(
            level=level,
            name=f"{self._node.get_name()}: control",
            message=message,
            values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
        )
        report = DiagnosticArray(status=[status])
        report.header.stamp = self._node.get_clock().now().to_msg()
        self._diagnostics.publish(report)

    def _judge(self, steps: Sequence[tuple[float, str | None, tuple[str, ...]]]) -> tuple[bytes, str]:
        """The level and message of the diagnostics. ERROR: the loop failed, sent no commands, or held in more than half
        of the steps because of faults. WARN: fewer faults, missing inputs, or a hold by the operator."""
        error, warn, ok = DiagnosticStatus.ERROR, DiagnosticStatus.WARN, DiagnosticStatus.OK
        if self._problem:
            return error, self._problem
        robot = self.robot
        unusable = [f"{topic}: {fault}" for topic, fault in dict(robot.faults).items()] if robot else []
        if self._thread is None or robot is None:
            return (warn if unusable else ok), "; ".join(["not active", *unusable])
        awaited = robot.awaited() + ["~/instruction"] * (not self._instruction)
        if awaited:
            return (error if unusable else warn), "; ".join([f"waiting for {', '.join(awaited)}", *unusable])
        if not steps:
            return error, "no command since the last report"
        faults = Counter(fault for _, fault, _ in steps if fault is not None)
        if unusable or 2 * faults.total() > len(steps):  # a single late chunk is not an error
            return error, "; ".join([f"holding: {why}" for why, _ in faults.most_common(1)] + unusable)
        if faults:
            return warn, "held: " + ", ".join(f"{count} x {why}" for why, count in faults.items())
        return (warn, "on hold") if "on hold" in steps[-1][2] else (ok, "running")


def main(args: Sequence[str] | None = None) -> int:
    """Spin the node until SIGINT or SIGTERM, and return the exit status."""
    sys.setswitchinterval(0.0005)  # limits the time that a thread waits for the GIL
    # rclpy's own handlers would shut down ROS before the hold command is published.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    node, executor = PolicyNode(), MultiThreadedExecutor(num_threads=_THREADS)
    executor.add_node(node)
    with _signals() as stopped:
        try:
            while rclpy.ok() and not stopped.is_set():
                executor.spin_once(timeout_sec=0.1)
        finally:
            executor.shutdown(timeout_sec=_PATIENCE_S)  # waits for a running transition
            node.trigger_shutdown()
            node.destroy_node()
            rclpy.try_shutdown()
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second signal, over `_ECHO_S` later, calls the original handler."""
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


def _declare(node: LifecycleNode, field: dataclasses.Field[Any]) -> None:
    # ROS cannot check the types of unset parameters; `_read` checks all types.
    descriptor = ParameterDescriptor(description=field.metadata["description"], dynamic_typing=True)
    if node.has_parameter(field.name):
        node.set_descriptor(field.name, descriptor)
    else:
        node.declare_parameter(field.name, None if field.default == () else field.default, descriptor)


def _read(node: LifecycleNode) -> Parameters:
    """The node's parameters. ConfigError if a name is unknown or a type is wrong."""
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


def _accepted(response: Any) -> Any:
    response.success, response.message = True, ""
    return response


if __name__ == "__main__":
    sys.exit(main())
