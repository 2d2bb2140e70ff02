"""The ROS 2 node with its parameters: ros2 launch configs/deploy/ros2.launch.py [activate:=true]

vla must be installed for the Python that runs `ros2 launch`. Relative paths in the parameter file refer to the working
directory. The node is configured at once. The robot moves only after `ros2 lifecycle set /vla activate`, unless
`activate:=true`. Written for launch_ros of Humble and newer; not tested with ROS.
"""

import sys
from pathlib import Path

import launch
import launch.events
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition


def generate_launch_description() -> launch.LaunchDescription:
    """Start and configure the node, and activate it if `activate` is true."""
    node = LifecycleNode(
        executable=sys.executable,  # the Python that has both rclpy and vla
        arguments=["-m", "vla.control.robots.ros2"],
        name="vla",
        namespace="",
        parameters=[LaunchConfiguration("params")],
        output="screen",
    )

    def change(transition: int) -> EmitEvent:
        matcher = launch.events.matches_action(node)
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matcher, transition_id=transition))

    configured = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[change(Transition.TRANSITION_ACTIVATE)],
    )
    return launch.LaunchDescription(
        [
            DeclareLaunchArgument("params", default_value=str(Path(__file__).with_name("ros2.yaml"))),
            DeclareLaunchArgument("activate", default_value="false"),
            RegisterEventHandler(configured, condition=IfCondition(LaunchConfiguration("activate"))),
            node,
            change(Transition.TRANSITION_CONFIGURE),
        ]
    )
