"""The observation monitor: each fault of a reading is detected by name, and valid readings have none."""

import numpy as np
import pytest

from vla.config import SafetyConfig
from vla.control.observation_monitor import ObservationMonitor
from vla.control.robot import Reading
from vla.spec import RobotSpec

SPEC = RobotSpec(cameras=("front", "wrist"), state_names=("x", "y"), action_names=("x", "y"))


def observation(**pixels) -> dict:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in SPEC.cameras}
    return {"pixels": images | pixels, "agent_pos": np.zeros(2, np.float32)}


def test_a_good_reading_has_no_fault_until_it_is_old():
    monitor, reading = ObservationMonitor(SPEC, SafetyConfig(max_age_s=0.5)), Reading(observation(), time=10.0)
    assert monitor.fault(reading, now=10.4) is None
    assert monitor.fault(reading, now=10.6) == "stale observation"


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"pixels": {"front": observation()["pixels"]["front"]}}, "missing camera"),
        ({"pixels": None}, "missing camera"),
        ({}, "missing camera"),
        (observation(wrist=np.zeros((48, 64), np.uint8)), "malformed image"),
        (observation(wrist=np.ones((48, 64, 3), np.float32)), "malformed image"),
        (observation(wrist=np.full((24, 32, 3), 99, np.uint8)), "image of another size"),
        (observation(wrist=np.zeros((48, 64, 3), np.uint8)), "dark camera"),
        (observation() | {"agent_pos": np.array([0.0, np.nan])}, "state not finite"),
        (observation() | {"agent_pos": np.zeros(3)}, "state not finite"),
        ({"pixels": observation()["pixels"]}, "state not finite"),
    ],
)
def test_every_fault_has_a_name_and_clears(bad, name):
    monitor = ObservationMonitor(SPEC, SafetyConfig())
    assert monitor.fault(Reading(observation(), 1.0), 1.0) is None
    assert monitor.fault(Reading(bad, 1.1), 1.1) == name
    assert monitor.fault(Reading(observation(), 1.2), 1.2) is None


def test_a_repeated_image_is_a_frozen_camera_if_configured():
    careful, easy = ObservationMonitor(SPEC, SafetyConfig(max_frozen_s=0.35)), ObservationMonitor(SPEC, SafetyConfig())
    for tick in range(10):
        reading = Reading(observation(), tick * 0.1)
        assert careful.fault(reading, tick * 0.1) == ("frozen camera" if tick > 3 else None)
        assert easy.fault(reading, tick * 0.1) is None
    moved = Reading(observation(front=np.full((48, 64, 3), 9, np.uint8), wrist=np.full((48, 64, 3), 9, np.uint8)), 1.0)
    assert careful.fault(moved, 1.0) is None
