"""The black box: recordings of the seconds before a fault."""

import io
import json
import time
import zipfile

import cv2
import numpy as np
import pytest

from vla.control.black_box import BlackBox
from vla.control.events import StepEvent
from vla.control.robot import Reading


def step(tick: int, reasons: tuple[str, ...] = (), decoding: dict | None = None) -> StepEvent:
    image = np.full((16, 16, 3), (tick % 250, 0, 0), np.uint8)
    observation = {"pixels": {"front": image, "wrist": image}, "agent_pos": np.array([tick, 0.5], np.float32)}
    return StepEvent(tick, 0.001, Reading(observation, float(tick)), np.array([0.1, tick]), reasons, decoding)


def read(path) -> tuple[list[dict], dict[str, np.ndarray]]:
    with zipfile.ZipFile(path) as box:
        ticks = [json.loads(line) for line in io.TextIOWrapper(box.open("ticks.jsonl"))]
        names = {name for tick in ticks for name in tick["images"].values()}
        return ticks, {name: cv2.imdecode(np.frombuffer(box.read(name), np.uint8), 1) for name in names}


def test_a_fault_leaves_the_last_seconds_on_disk(tmp_path):
    box = BlackBox(tmp_path / "box", seconds=3.0, hz=10.0)
    for tick in range(50):
        box.add(step(tick, ("range",)))
    box.add(step(50, decoding={"asked": 48, "ms": 21.0, "entropy": 0.5, "ids": [4, 5]}))
    box.add(step(51, ("stale observation",)))
    box.close()
    (path,) = box.files
    assert path.name.endswith("-stale-observation.zip") and path.parent == tmp_path / "box"
    ticks, images = read(path)
    assert [tick["tick"] for tick in ticks] == list(range(22, 52))  # three seconds at ten steps per second
    assert ticks[-1]["reasons"] == ["stale observation"] and ticks[-2]["decoding"]["ids"] == [4, 5]
    assert ticks[-1]["state"] == [51.0, 0.5] and ticks[-1]["command"] == pytest.approx([0.1, 51])
    for tick in ticks:
        for name in tick["images"].values():
            assert abs(int(images[name][8, 8, 2]) - tick["tick"]) < 8  # the red channel of the recorded image


def test_no_file_without_a_fault(tmp_path):
    box = BlackBox(tmp_path / "box", seconds=3.0, hz=10.0)
    for reason in ("no chunk yet", "on hold", "range", "jump", "velocity", "acceleration", "workspace"):
        box.add(step(1, (reason,)))
    box.close()
    assert box.files == [] and not (tmp_path / "box").exists()


@pytest.mark.parametrize("end", [{"reasons": ("underrun",)}, {"decoding": {"asked": 3, "ms": 1.0, "error": "boom"}}])
def test_the_fault_is_recorded_and_many_faults_make_one_file(tmp_path, end):
    box = BlackBox(tmp_path, seconds=30.0, hz=10.0)
    for tick in range(40):
        box.add(step(tick, **end))
    deadline = time.monotonic() + 1.2
    while time.monotonic() < deadline:  # one second passes while faults continue
        box.add(step(99, **end))
        time.sleep(0.05)
    box.end()
    box.close()
    assert 1 <= len(box.files) <= 2  # one after a second, and possibly another at the end


def test_invalid_images_are_tolerated(tmp_path):
    box = BlackBox(tmp_path, seconds=3.0, hz=10.0)
    for observation in ({}, {"pixels": None}, {"pixels": {"front": np.zeros(3)}}, {"pixels": {"front": "?"}}):
        box.add(StepEvent(0, 0.0, Reading(observation, 0.0), np.zeros(1), ("malformed image",), None))
    box.close()
    ticks, _ = read(box.files[0])
    assert len(ticks) == 4


def test_images_are_kept_as_long_as_their_steps(tmp_path):
    box = BlackBox(tmp_path, seconds=3.0, hz=10.0)
    for tick in range(60):
        seen = step(tick)
        if tick == 59:
            del seen.reading.observation["pixels"]["wrist"]
        box.add(seen)
    box.add(step(60, ("missing camera",)))
    box.close()
    ticks, images = read(box.files[0])  # reads every image that a step refers to
    assert len(ticks) == 30 and len(images) == 59


def test_errors_do_not_affect_later_recordings(tmp_path):
    (tmp_path / "file").touch()
    box = BlackBox(tmp_path / "file" / "box", seconds=0.1, hz=10.0)  # a folder that cannot be created
    strange = {"pixels": {"front": np.zeros((0, 8, 3), np.uint8)}, "agent_pos": ["left", "right"]}
    box.add(StepEvent(0, 0.0, Reading(strange, 0.0), np.zeros(1), ("underrun",), None))
    box.end()
    deadline = time.monotonic() + 10
    while box.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "NotADirectoryError" in box.problem
    box._folder = tmp_path / "box"  # the problem has been fixed
    box.add(StepEvent(1, 0.0, Reading(strange, 1.0), np.zeros(1), ("underrun",), None))
    box.close()
    ticks, _ = read(box.files[0])
    assert ticks[0]["tick"] == 1 and "left" in ticks[0]["state"]


@pytest.mark.realtime
def test_a_slow_box_reports_it_and_limits_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(BlackBox, "_keep", lambda *_: time.sleep(0.01))
    box = BlackBox(tmp_path, seconds=1.0, hz=10.0)
    for tick in range(300):
        box.add(step(tick))
    assert box._queue.qsize() <= 100 and "recording was too slow" in box.problem
    box.close()
