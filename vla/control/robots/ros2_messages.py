"""Conversion of ROS 2 messages: images and joint states to arrays, and actions to commands.

Owns: the encodings of messages, and QoS profiles. It does not know nodes or policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla.errors import SpecError, unknown

#: For sensors: keep only the newest message, and do not resend lost ones. A best-effort subscription also receives from
#: reliable publishers.
LATEST = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
)
#: For commands and operator instructions: deliver reliably, keep only the newest message, and do not send earlier
#: messages to late subscribers.
RELIABLE = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)
#: Encoding -> number of channels, conversion to RGB.
_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}


def decode_image(message: Any) -> np.ndarray:
    """An Image as uint8 RGB [height, width, 3]; SpecError for an unknown encoding or an inconsistent size."""
    if message.encoding not in _ENCODINGS:
        fix = "Configure the driver to publish one of these encodings, or use its .../compressed topic."
        raise SpecError(unknown("image encoding", message.encoding, _ENCODINGS, fix))
    channels, conversion = _ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8)
    if not height * width or step < width * channels or len(data) < height * step:
        raise SpecError(f"{len(data)} bytes are not an image of {height} x {width} {message.encoding}, step {step}.")
    rows = data[: height * step].reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    return rows.copy() if conversion is None else cv2.cvtColor(rows, conversion)


def decode_compressed_image(message: Any) -> np.ndarray:
    """A CompressedImage as uint8 RGB [height, width, 3]; SpecError if it is not a JPEG or PNG."""
    data = np.frombuffer(message.data, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise SpecError(f"a compressed image ({message.format!r}, {len(data)} bytes) cannot be decoded.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def joint_positions(message: Any, names: Sequence[str]) -> dict[str, float]:
    """The positions of the joints `names` in a JointState of any order; SpecError lists missing joints."""
    found = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in names if name not in found]
    if missing:
        has = ", ".join(found) or "none"
        raise SpecError(f"the joint state has no position of {', '.join(missing)}; it has {has}.")
    return {name: float(found[name]) for name in names}


def trajectory(joints: Sequence[str], positions: list[float], seconds: float) -> JointTrajectory:
    """A JointTrajectory with one point, to be reached `seconds` from now (its stamp of zero means now)."""
    point = JointTrajectoryPoint(positions=positions, time_from_start=Duration(seconds=seconds).to_msg())
    return JointTrajectory(joint_names=list(joints), points=[point])
