"""A robot behind ROS 2 topics.

Owns: the conversion of messages to observations and of actions to messages, and its parameters. It does not know when a
command is due (`controller`), which commands are safe (`safety`), or the hardware (drivers, ros2_control).

A reading is as old as its oldest message, counted from its arrival by this machine's monotonic clock. Time stamps in
messages are not used, so the age does not include transport.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from vla.config.files import Strict
from vla.control.robot import Reading, Robot
from vla.control.robots import ros2_messages as messages
from vla.errors import ConfigError, SpecError, unknown
from vla.spec import RobotSpec


def _parameter(description: str, default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"description": description})


@dataclasses.dataclass(frozen=True)
class Parameters(Strict):
    """The node's parameters. Unknown names and wrong types are errors."""

    policy: str = _parameter('"nano", a run folder, a checkpoint folder, or the address of a `vla serve`', "nano")
    device: str = _parameter('device of the policy: "auto", "cpu", "cuda"', "auto")
    unnorm_key: str | None = _parameter("statistics that un-normalise actions; required if a checkpoint has several")
    n_action_steps: int | None = _parameter("executed actions per chunk; unset: as in the checkpoint")
    instruction: str = _parameter("the first instruction; empty: wait for ~/instruction", "")
    control_config: str = _parameter("YAML file of the control loop and the safety limits; empty: defaults", "")
    black_box_dir: str = _parameter("folder of the black box recordings; empty: no recordings", "")
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)  # the parameters cameras.<name>
    joint_state_topic: str = _parameter("topic of JointState messages, each with all joints", "/joint_states")
    state_joints: tuple[str, ...] = _parameter("joint of each state dimension, in order; unset: same names", ())
    command_topic: str = _parameter("topic of the commands", "/joint_trajectory_controller/joint_trajectory")
    command_type: Literal["trajectory", "array"] = _parameter(
        '"trajectory": JointTrajectory of positions; "array": Float64MultiArray of the policy\'s actions', "trajectory"
    )
    command_joints: tuple[str, ...] = _parameter("joint of each action dimension, in order; unset: same names", ())
    gripper_open: float | None = _parameter("command that opens the robot's gripper; unset: the policy's value")
    gripper_closed: float | None = _parameter("command that closes the gripper; unset: the policy's value")

    def completed(self, spec: RobotSpec) -> Parameters:
        """Fill unset parameters from `spec`. ConfigError if the parameters do not fit `spec`."""
        for camera in self.cameras:
            if camera not in spec.cameras:
                raise ConfigError(f"cameras.{camera}: {unknown('camera', camera, spec.cameras)}")
        if missing := [f"cameras.{camera}" for camera in spec.cameras if camera not in self.cameras]:
            raise ConfigError(f"the policy needs the cameras {', '.join(spec.cameras)}. Set {', '.join(missing)}.")
        state, command = self.state_joints or spec.state_names, self.command_joints or spec.action_names
        for name, joints, entries in (("state", state, spec.state_names), ("command", command, spec.action_names)):
            if len(joints) != len(entries):
                raise ConfigError(
                    f"{name}_joints must have one name for each of {', '.join(entries)}, got {len(joints)} names."
                )
        if self.command_type == "trajectory" and spec.action_space.relative:
            raise ConfigError(
                f'command_type "trajectory" needs positions, but the actions are {spec.action_space}. Use "array".'
            )
        gripper = self.gripper_closed, self.gripper_open
        if gripper != (None, None) and (spec.gripper_index is None or None in gripper or gripper[0] == gripper[1]):
            raise ConfigError(
                f"gripper_closed and gripper_open must be two different numbers, got {gripper[0]} and {gripper[1]}."
                if spec.gripper_index is not None
                else "gripper_closed and gripper_open are set, but the robot has no gripper."
            )
        cameras = {camera: self.cameras[camera] for camera in spec.cameras}
        return dataclasses.replace(self, cameras=cameras, state_joints=state, command_joints=command)


class Ros2Robot(Robot):
    """The robot behind the topics of `node`. Only the latest valid message of each topic is used.

    Args:
        node: the node; commands are only sent while it is active.
        spec: the RobotSpec that the policy was trained for.
        hz: commands per second.
    Attributes:
        faults: topic -> error of its last message.
    Raises:
        ConfigError: cameras, joints or the command type are incompatible with the robot.
    """

    def __init__(self, node: LifecycleNode, spec: RobotSpec, parameters: Parameters, hz: float) -> None:
        self.spec, self.faults = spec, dict[str, str]()
        self._node, self._wiring, self._period = node, parameters.completed(spec), 1.0 / hz
        # Dimensions that hold a position. Before the first command, this is the measured position.
        repeated = [i for i in range(spec.action_dim) if not spec.hold or spec.hold[i] is None]
        self._positions = [i for i in repeated if i != self._gripper and not spec.action_space.relative]
        needed = [*self._wiring.state_joints, *(self._wiring.command_joints[i] for i in self._positions)]
        self._joints = tuple(dict.fromkeys(needed))
        self._lock = threading.Lock()
        self._parts: dict[str, tuple[float, Any]] = {}  # topic -> arrival time, decoded message
        self._measured: dict[str, float] = {}  # the last finite joint positions
        self._reading: Reading | None = None
        self._last: np.ndarray | None = None  # the last command
        self._topics, self._subscriptions = [], []
        for topic, kind, decode in self._inputs():
            receive, group = functools.partial(self._receive, topic, decode), MutuallyExclusiveCallbackGroup()
            self._topics.append(topic)
            self._subscriptions.append(
                node.create_subscription(kind, topic, receive, messages.LATEST, callback_group=group)
            )
        kind = JointTrajectory if self._wiring.command_type == "trajectory" else Float64MultiArray
        self._publisher = node.create_lifecycle_publisher(kind, self._wiring.command_topic, messages.RELIABLE)

    def observe(self) -> Reading | None:
        """The latest images, uint8 [height, width, 3], and state, float32 [S]; None until every topic has a message."""
        if self.awaited():
            return None
        with self._lock:
            if self._reading is None:
                pixels = {camera: self._parts[topic][1] for camera, topic in self._wiring.cameras.items()}
                observation: dict[str, Any] = {"pixels": pixels}
                if self.spec.state_dim:
                    at = self._parts[self._wiring.joint_state_topic][1]
                    observation["agent_pos"] = np.array([at[name] for name in self._wiring.state_joints], np.float32)
                self._reading = Reading(observation, min(arrived for arrived, _ in self._parts.values()))
            return self._reading

    def command(self, action: np.ndarray) -> None:
        """Publish `action`, float32 [D] in the policy's units and order, with the names of its joints."""
        self._last = np.array(action, np.float32)
        values = self._last.astype(np.float64)
        if self._gripper is not None:
            values[self._gripper] = _interpolate(values[self._gripper], self._policy_gripper, self._robot_gripper)
        if self._wiring.command_type == "array":
            self._publisher.publish(Float64MultiArray(data=values.tolist()))
        else:
            joints = self._wiring.command_joints
            self._publisher.publish(messages.trajectory(joints, values.tolist(), self._period))

    def close(self) -> None:
        """Unsubscribe, and destroy the publisher."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._node.destroy_lifecycle_publisher(self._publisher)

    def hold_reference(self) -> np.ndarray:
        """The last command, float32 [D]. Before the first command, the measured joint positions, and 0 for dimensions
        that are not positions."""
        if self._last is not None:
            return self._last
        at, reference = self._measured, np.zeros(self.spec.action_dim, np.float32)
        for i in self._positions:
            reference[i] = at[self._wiring.command_joints[i]]
        # A measured gripper position has the unit of the command only if commands are positions.
        if self._positions and self._gripper is not None:
            measured = at.get(self._wiring.command_joints[self._gripper], sum(self._robot_gripper) / 2)
            position = _interpolate(measured, self._robot_gripper, self._policy_gripper)
            reference[self._gripper] = np.clip(position, min(self._policy_gripper), max(self._policy_gripper))
        return reference

    def awaited(self) -> list[str]:
        """The topics that have not sent a valid message."""
        return [topic for topic in self._topics if topic not in self._parts]

    def forget(self) -> None:
        """Forget the last command, because the robot may have been moved."""
        self._last = None

    def _inputs(self) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
        """(topic, message type, decoder) of each subscription."""
        for topic in dict.fromkeys(self._wiring.cameras.values()):
            if topic.endswith("/compressed"):  # image_transport's convention
                yield topic, CompressedImage, messages.decode_compressed_image
            else:
                yield topic, Image, messages.decode_image
        if self._joints:
            yield self._wiring.joint_state_topic, JointState, self._decode_joints

    def _receive(self, topic: str, decode: Callable[[Any], Any], message: Any) -> None:
        arrived = time.monotonic()
        try:
            value = decode(message)
        except Exception as error:  # an invalid message must not stop the control loop
            if self.faults.get(topic) != str(error):
                self._node.get_logger().error(f"{topic}: {error}")
            self.faults[topic] = str(error)
            return
        with self._lock:
            self.faults.pop(topic, None)
            self._parts[topic], self._reading = (arrived, value), None

    def _decode_joints(self, message: Any) -> dict[str, float]:
        at = messages.joint_positions(message, self._joints)
        if np.isfinite(list(at.values())).all():
            self._measured = at
        elif not self._measured:
            raise SpecError(f"the joint state is not finite: {at}.")
        return at

    @property
    def _gripper(self) -> int | None:
        index = self.spec.gripper_index
        return None if index is None else index % self.spec.action_dim

    @property
    def _policy_gripper(self) -> tuple[float, float]:
        """(closed, open) in the policy's units."""
        return self.spec.gripper_closed, self.spec.gripper_open

    @property
    def _robot_gripper(self) -> tuple[float, float]:
        """(closed, open) in the robot's units."""
        closed, opened = self._wiring.gripper_closed, self._wiring.gripper_open
        return self._policy_gripper if closed is None or opened is None else (closed, opened)


def _interpolate(value: float, source: tuple[float, float], target: tuple[float, float]) -> float:
    """Map `value` linearly, so that the two numbers of `source` become the two numbers of `target`."""
    share = (value - source[0]) / (source[1] - source[0]) if source[0] != source[1] else 0.0
    return value if source == target else target[0] + share * (target[1] - target[0])
