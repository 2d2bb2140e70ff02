"""A mock of the parts of rclpy and its message packages that `vla.control.robots.ros2*` use.

Importing it installs it in `sys.modules`; import it before those modules.

It follows rclpy's sources (Humble to Rolling) in names, arguments and the behaviour that matters here: exceptions in
transitions are swallowed, lifecycle publishers are silent unless active, best-effort publishers do not reach reliable
subscribers, and messages reject values of the wrong type. Unlike ROS, it has one process, messages are delivered
immediately in the publisher's thread, and no message is lost.
"""

from __future__ import annotations

import array
import enum
import inspect
import sys
import time
import types
from typing import Any, ClassVar


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, float)  # rclpy's setters reject integers and numpy's float32


def is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def is_byte(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == 1


def each(check: Any) -> Any:
    return lambda value: isinstance(value, list | tuple | array.array) and all(map(check, value))


def a(name: str) -> Any:
    return lambda value: type(value).__name__ == name


class Message:
    """A message with defaults and type checks for its fields, as in generated messages."""

    FIELDS: ClassVar[
        dict[str, tuple[Any, Any]]
    ] = {}  # name -> (function that makes the default, function that checks a value)

    def __init__(self, **values: Any) -> None:
        assert set(values) <= set(self.FIELDS), f"{type(self).__name__} has no {set(values) - set(self.FIELDS)}"
        for name, (default, _) in self.FIELDS.items():
            setattr(self, name, values.get(name, default()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.FIELDS:
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        if not self.FIELDS[name][1](value):
            raise AssertionError(f"{type(self).__name__}.{name} cannot be {value!r}")
        object.__setattr__(self, name, value)


def message(name: str, /, **fields: tuple[Any, Any]) -> type[Message]:
    return type(name, (Message,), {"FIELDS": fields})


TEXT, TEXTS, NUMBERS = (str, is_text), (list, each(is_text)), (lambda: array.array("d"), each(is_number))
SIZE, FLAG = (int, is_size), (bool, lambda value: isinstance(value, bool))
BYTES = (lambda: array.array("B"), lambda value: isinstance(value, array.array) and value.typecode == "B")
Time = message("Time", sec=(int, is_size), nanosec=SIZE)
DurationMsg = message("Duration", sec=(int, is_size), nanosec=SIZE)
Header = message("Header", stamp=(Time, a("Time")), frame_id=TEXT)
HEADER = (Header, a("Header"))
Image = message(
    "Image", header=HEADER, height=SIZE, width=SIZE, encoding=TEXT, is_bigendian=SIZE, step=SIZE, data=BYTES
)
CompressedImage = message("CompressedImage", header=HEADER, format=TEXT, data=BYTES)
JointState = message("JointState", header=HEADER, name=TEXTS, position=NUMBERS, velocity=NUMBERS, effort=NUMBERS)
String = message("String", data=TEXT)
Float64MultiArray = message("Float64MultiArray", layout=(object, lambda _: True), data=NUMBERS)
JointTrajectoryPoint = message(
    "JointTrajectoryPoint",
    positions=NUMBERS,
    velocities=NUMBERS,
    accelerations=NUMBERS,
    effort=NUMBERS,
    time_from_start=(DurationMsg, a("Duration")),
)
JointTrajectory = message(
    "JointTrajectory", header=HEADER, joint_names=TEXTS, points=(list, each(a("JointTrajectoryPoint")))
)
KeyValue = message("KeyValue", key=TEXT, value=TEXT)
DiagnosticStatus = message(
    "DiagnosticStatus",
    level=(lambda: b"\x00", is_byte),
    name=TEXT,
    message=TEXT,
    hardware_id=TEXT,
    values=(list, each(a("KeyValue"))),
)
for code, level in enumerate(("OK", "WARN", "ERROR", "STALE")):
    setattr(DiagnosticStatus, level, bytes([code]))
DiagnosticArray = message("DiagnosticArray", header=HEADER, status=(list, each(a("DiagnosticStatus"))))
ParameterDescriptor = message("ParameterDescriptor", name=TEXT, description=TEXT, dynamic_typing=FLAG, read_only=FLAG)


class Trigger:
    Request = message("Trigger_Request")
    Response = message("Trigger_Response", success=FLAG, message=TEXT)


class SetBool:
    Request = message("SetBool_Request", data=FLAG)
    Response = message("SetBool_Response", success=FLAG, message=TEXT)


class HistoryPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, KEEP_LAST, KEEP_ALL = range(3)


class ReliabilityPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, RELIABLE, BEST_EFFORT = range(3)


class DurabilityPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, TRANSIENT_LOCAL, VOLATILE = range(3)


class QoSProfile:
    def __init__(self, history: Any = None, depth: int | None = None, reliability: Any = None, durability: Any = None):
        assert history == HistoryPolicy.KEEP_LAST and isinstance(depth, int)
        self.history, self.depth = history, depth
        self.reliability, self.durability = ReliabilityPolicy(reliability), DurabilityPolicy(durability)


class TransitionCallbackReturn(enum.Enum):
    SUCCESS, FAILURE, ERROR = range(3)


class SignalHandlerOptions(enum.Enum):
    NO, SIGINT, SIGTERM, ALL = 0, 1, 2, 3


class ClockType(enum.IntEnum):
    ROS_TIME, SYSTEM_TIME, STEADY_TIME = 1, 2, 3


class Duration:
    def __init__(self, *, seconds: float = 0, nanoseconds: int = 0) -> None:
        self.nanoseconds = int(seconds * 10**9) + nanoseconds

    def to_msg(self) -> Message:
        return DurationMsg(sec=self.nanoseconds // 10**9, nanosec=self.nanoseconds % 10**9)


class Clock:
    def __init__(self, *, clock_type: ClockType = ClockType.SYSTEM_TIME) -> None:
        self.clock_type = clock_type

    def now(self) -> Any:
        stamp = Time(sec=int(time.time()), nanosec=0)
        return types.SimpleNamespace(to_msg=lambda: stamp)


class MutuallyExclusiveCallbackGroup:
    pass


class Endpoint:
    def __init__(self, kind: Any, topic: str, qos: QoSProfile, callback: Any = None, group: Any = None) -> None:
        assert isinstance(qos, QoSProfile)
        self.kind, self.topic, self.qos, self.callback, self.group = kind, topic, qos, callback, group
        self.sent: list[tuple[float, Any]] = []

    def publish(self, message: Any) -> None:
        assert type(message) is self.kind
        if not Context.alive:
            raise RuntimeError("publisher's context is invalid")  # RCLError
        self.sent.append((time.monotonic(), message))


class LifecyclePublisher(Endpoint):
    enabled = False

    def publish(self, message: Any) -> None:
        if self.enabled:
            super().publish(message)


class Parameter:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value


class Context:
    """The default context: whether ROS is initialised, the values of the parameter file, and all nodes."""

    alive = False
    overrides: ClassVar[dict[str, Any]] = {}
    nodes: ClassVar[list[LifecycleNode]] = []


class LifecycleNode:
    def __init__(self, node_name: str, *, automatically_declare_parameters_from_overrides: bool = False) -> None:
        assert Context.alive, "cannot create node"  # NotInitializedException
        self._name, self.label = node_name, "unconfigured"
        self.subscriptions: list[Endpoint] = []
        self.publishers: list[Endpoint] = []
        self._ever: list[Endpoint] = []  # all publishers, including destroyed ones
        self.services: dict[str, tuple[Any, Any]] = {}
        self.timers: list[Any] = []
        self.log: list[tuple[str, str]] = []
        self.descriptors: dict[str, Any] = {}
        self._parameters: dict[str, Parameter] = {"use_sim_time": Parameter("use_sim_time", False)}
        if automatically_declare_parameters_from_overrides:
            for name, value in Context.overrides.items():
                self._parameters[name] = Parameter(name, value)
        Context.nodes.append(self)

    # rclpy.node.Node

    def get_name(self) -> str:
        return self._name

    def get_clock(self) -> Clock:
        return Clock()

    def get_logger(self) -> Any:
        def says(level: str) -> Any:
            return lambda text: self.log.append((level, text))

        return types.SimpleNamespace(info=says("info"), warning=says("warning"), error=says("error"))

    def has_parameter(self, name: str) -> bool:
        return name in self._parameters

    def declare_parameter(self, name: str, value: Any = None, descriptor: Any = None) -> Parameter:
        assert name not in self._parameters  # ParameterAlreadyDeclaredException
        if isinstance(value, list | tuple):
            assert value, "an empty array has no type in ROS"
        assert value is not None or descriptor.dynamic_typing
        self.descriptors[name] = descriptor
        self._parameters[name] = Parameter(name, Context.overrides.get(name, value))
        return self._parameters[name]

    def set_descriptor(self, name: str, descriptor: Any) -> None:
        assert name in self._parameters  # ParameterNotDeclaredException
        self.descriptors[name] = descriptor

    def get_parameters_by_prefix(self, prefix: str) -> dict[str, Parameter]:
        prefix = f"{prefix}." if prefix else ""
        return {name[len(prefix) :]: p for name, p in self._parameters.items() if name.startswith(prefix)}

    def create_subscription(
        self, msg_type: Any, topic: str, callback: Any, qos_profile: Any, *, callback_group: Any = None
    ) -> Endpoint:
        inspect.signature(callback).bind(object())  # as Jazzy does, to determine the kind of callback
        self.subscriptions.append(Endpoint(msg_type, self._resolve(topic), qos_profile, callback, callback_group))
        return self.subscriptions[-1]

    def destroy_subscription(self, subscription: Endpoint) -> bool:
        self.subscriptions.remove(subscription)
        return True

    def create_publisher(self, msg_type: Any, topic: str, qos_profile: Any) -> Endpoint:
        self.publishers.append(Endpoint(msg_type, self._resolve(topic), qos_profile))
        self._ever.append(self.publishers[-1])
        return self.publishers[-1]

    def create_service(self, srv_type: Any, srv_name: str, callback: Any, *, callback_group: Any = None) -> None:
        self.services[self._resolve(srv_name)] = (srv_type, callback)

    def create_timer(
        self, timer_period_sec: float, callback: Any, callback_group: Any = None, clock: Any = None
    ) -> Any:
        self.timers.append(types.SimpleNamespace(period=timer_period_sec, callback=callback, clock=clock))
        return self.timers[-1]

    def destroy_node(self) -> None:
        Context.nodes.remove(self)

    # rclpy.lifecycle

    def create_lifecycle_publisher(self, msg_type: Any, topic: str, qos_profile: Any) -> LifecyclePublisher:
        publisher = LifecyclePublisher(msg_type, self._resolve(topic), qos_profile)
        self.publishers.append(publisher)
        self._ever.append(publisher)
        return publisher

    def destroy_lifecycle_publisher(self, publisher: LifecyclePublisher) -> bool:
        self.publishers.remove(publisher)
        return True

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    on_cleanup = on_shutdown = on_error = on_configure

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        return self._enable(True)

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        return self._enable(False)

    def trigger_configure(self) -> TransitionCallbackReturn:
        return self._change("unconfigured", self.on_configure, "inactive")

    def trigger_activate(self) -> TransitionCallbackReturn:
        return self._change("inactive", self.on_activate, "active")

    def trigger_deactivate(self) -> TransitionCallbackReturn:
        return self._change("active", self.on_deactivate, "inactive")

    def trigger_cleanup(self) -> TransitionCallbackReturn:
        return self._change("inactive", self.on_cleanup, "unconfigured")

    def trigger_shutdown(self) -> TransitionCallbackReturn | None:
        if self.label in ("unconfigured", "inactive", "active"):
            return self._change(self.label, self.on_shutdown, "finalized")
        return None

    def _change(self, start: str, callback: Any, goal: str) -> TransitionCallbackReturn:
        if self.label != start:
            return TransitionCallbackReturn.ERROR  # the state machine rejects the transition
        self.label = "transition"
        outcome = self._call(callback, start)
        if outcome is TransitionCallbackReturn.SUCCESS:
            self.label = goal
        elif outcome is TransitionCallbackReturn.FAILURE:
            self.label = start
        else:
            mended = self._call(self.on_error, start) is TransitionCallbackReturn.SUCCESS
            self.label = "unconfigured" if mended else "finalized"
        return outcome

    def _call(self, callback: Any, state: str) -> TransitionCallbackReturn:
        try:
            outcome = callback(types.SimpleNamespace(label=state))
        except Exception:  # as rclpy does, without a message
            return TransitionCallbackReturn.ERROR
        assert isinstance(outcome, TransitionCallbackReturn)
        return outcome

    def _enable(self, enabled: bool) -> TransitionCallbackReturn:
        for publisher in self.publishers:
            if isinstance(publisher, LifecyclePublisher):
                publisher.enabled = enabled
        return TransitionCallbackReturn.SUCCESS

    def _resolve(self, topic: str) -> str:
        return topic.replace("~", f"/{self._name}", 1)

    # Called by tests in place of other nodes.

    def hear(self, topic: str, message: Any, reliability: Any = ReliabilityPolicy.RELIABLE) -> int:
        """Publish to this node's subscriptions. Returns the number of subscriptions reached."""
        reached = [s for s in self.subscriptions if s.topic == topic and s.qos.reliability >= reliability]
        for subscription in reached:
            assert type(message) is subscription.kind, f"{topic} is a topic of {subscription.kind.__name__}"
            subscription.callback(message)
        return len(reached)

    def sent(self, topic: str) -> list[tuple[float, Any]]:
        return [found for publisher in self._ever if publisher.topic == topic for found in publisher.sent]

    def call(self, service: str, **request: Any) -> Any:
        kind, callback = self.services[service]
        return callback(kind.Request(**request), kind.Response())

    def diagnose(self) -> Any:
        """Call the timer of the diagnostics, and return the status."""
        self.timers[0].callback()
        return self.sent("/diagnostics")[-1][1].status[0]


class MultiThreadedExecutor:
    """Does nothing; tests replace `spin_once`."""

    def __init__(self, num_threads: int | None = None) -> None:
        self.nodes: list[LifecycleNode] = []

    def add_node(self, node: LifecycleNode) -> bool:
        self.nodes.append(node)
        return True

    def spin_once(self, timeout_sec: float | None = None) -> None:
        raise AssertionError("a test that spins must replace spin_once.")

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        return True


def init(*, args: Any = None, signal_handler_options: Any = None) -> None:
    assert not Context.alive
    Context.alive, Context.signals = True, signal_handler_options


def try_shutdown() -> None:
    Context.alive = False


def start(monkeypatch: Any, **overrides: Any) -> None:
    """Set up ROS without nodes, not initialised; `overrides` are the values of the parameter file."""
    monkeypatch.setattr(Context, "alive", False)
    monkeypatch.setattr(Context, "overrides", overrides)
    monkeypatch.setattr(Context, "nodes", [])


def install() -> None:
    """Install the mock packages in `sys.modules`."""
    packages = {
        "rclpy": {"init": init, "ok": lambda: Context.alive, "try_shutdown": try_shutdown},
        "rclpy.callback_groups": (MutuallyExclusiveCallbackGroup,),
        "rclpy.clock": (Clock, ClockType),
        "rclpy.duration": (Duration,),
        "rclpy.executors": (MultiThreadedExecutor,),
        "rclpy.lifecycle": (LifecycleNode, TransitionCallbackReturn),
        "rclpy.qos": (DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy),
        "rclpy.signals": (SignalHandlerOptions,),
        "rcl_interfaces.msg": (ParameterDescriptor,),
        "sensor_msgs.msg": (CompressedImage, Image, JointState),
        "std_msgs.msg": (Float64MultiArray, String),
        "trajectory_msgs.msg": (JointTrajectory, JointTrajectoryPoint),
        "diagnostic_msgs.msg": (DiagnosticArray, DiagnosticStatus, KeyValue),
        "std_srvs.srv": (SetBool, Trigger),
    }
    for name, content in packages.items():
        module = types.ModuleType(name)
        vars(module).update(content if isinstance(content, dict) else {found.__name__: found for found in content})
        sys.modules[name] = module


install()
