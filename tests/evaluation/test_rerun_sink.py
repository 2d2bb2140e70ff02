"""Recordings for Rerun contain the observations, actions and entropies exactly, at the right steps.

Most tests need rerun-sdk, which is not part of `dev`: pip install 'rerun-sdk>=0.41,<0.42', or scripts/setup dev,rerun.
"""

import importlib.util
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests.data.recordings import record
from tests.jobs.test_rollout import Slider, settings
from vla.config import AdapterConfig, InspectConfig, RolloutConfig
from vla.data.reader import Demonstrations
from vla.errors import ConfigError
from vla.evaluation.rerun_sink import EpisodeRecording
from vla.evaluation.results import Episode
from vla.jobs.inspect import inspect
from vla.jobs.rollout import rollout
from vla.policy import Policy, Prediction

needs_rerun = pytest.mark.skipif(importlib.util.find_spec("rerun") is None, reason="rerun-sdk is not installed")


def read(path, hz: float = 20) -> dict[str, tuple[list[int], list]]:
    """(steps, values) of each entity, read with Rerun's own reader; values of instructions and names are strings."""
    from rerun.chunk import RrdReader

    found: dict[str, tuple[list[int], list]] = {}
    for chunk in RrdReader(path).stream().to_chunks():
        batch = chunk.to_record_batch()
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        entity = chunk.entity_path.strip("/")
        steps = columns["step"].to_pylist() if "step" in columns else []
        seconds = [time.total_seconds() for time in columns["time"].to_pylist()] if steps else []
        np.testing.assert_allclose(seconds, np.array(steps) / hz, atol=1e-6)
        if "Scalars:scalars" in columns:
            found[entity] = (steps, columns["Scalars:scalars"].to_pylist())
        elif "EncodedImage:blob" in columns:
            files = [np.asarray(blob[0], np.uint8) for blob in columns["EncodedImage:blob"].to_pylist()]
            found[entity] = (steps, [cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1] for file in files])
        elif "SeriesLines:names" in columns:
            found[f"{entity} names"] = (steps, columns["SeriesLines:names"].to_pylist()[0])
        elif "TextDocument:text" in columns:
            found[entity] = (steps, columns["TextDocument:text"].to_pylist()[0])
    return found


def predict(robot, rng, tokens: int) -> Prediction:
    chunks = rng.normal(size=(1, 4, robot.action_dim)).astype(np.float32)
    return Prediction(chunks, np.zeros((1, tokens)), np.zeros((1, tokens)), rng.random((1, tokens), np.float32), 1, ())


@needs_rerun
@pytest.mark.parametrize("tokens", [("dx", "dz", "gripper"), ()], ids=["tokens of an action", "tokens of a chunk"])
def test_round_trip(robot, observations, tmp_path, tokens):
    rng, seen, path = np.random.default_rng(0), observations(3), tmp_path / "deep" / "one.rrd"
    recording = EpisodeRecording(robot, "go", tokens)
    predictions = [predict(robot, rng, 4 * len(tokens) or 10) for _ in range(2)]
    for step, observation, prediction, executed in zip((0, 4), seen, predictions, (4, 3), strict=False):
        recording.observe(step, observation)
        recording.execute(step, prediction, executed)
    recording.observe(7, seen[2])
    recording.save(path, "one")
    found = read(path)
    for camera in robot.cameras:
        steps, images = found[f"cameras/{camera}"]
        assert steps == [0, 4, 7]
        np.testing.assert_array_equal(images, [observation["pixels"][camera] for observation in seen])
    assert found["state"][0] == [0, 4, 7]
    np.testing.assert_array_equal(found["state"][1], [observation["agent_pos"] for observation in seen])
    assert found["action"][0] == list(range(7))
    np.testing.assert_array_equal(
        found["action"][1], np.concatenate([predictions[0].chunks[0], predictions[1].chunks[0][:3]])
    )
    assert found["action names"][1] == list(robot.action_names) and found["instruction"][1] == ["go"]
    steps, entropies = found["entropy"]
    if tokens:
        assert steps == list(range(7)) and found["entropy names"][1] == list(tokens)
        expected = np.concatenate([prediction.entropy[0].reshape(4, 3) for prediction in predictions])[:7]
        np.testing.assert_array_equal(entropies, expected)
    else:
        assert steps == [0, 4] and found["entropy names"][1] == ["mean of the chunk"]
        np.testing.assert_allclose(entropies, [[prediction.entropy.mean()] for prediction in predictions])
    verified = subprocess.run([sys.executable, "-m", "rerun", "rrd", "verify", path], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr


@needs_rerun
def test_a_rollout_records_the_first_episodes_and_failures(tmp_path):
    class OneWay(Slider):
        def _plan(self, observation):
            return np.minimum(super()._plan(observation), 0)

    info = rollout(settings(tmp_path / "r", rerun=1, n_envs=2, episodes=8), OneWay())
    kept = [episode for episode in info["per_episode"] if episode["rerun_path"]]
    failures = [episode for episode in info["per_episode"][1:] if not episode["success"]]
    assert failures and kept == [info["per_episode"][0], failures[0]]
    page = (tmp_path / "r/report.html").read_text()
    assert re.findall(r'<a href="(rerun/[^"]+)"', page) == [episode["rerun_path"] for episode in kept]
    found = read(tmp_path / "r" / kept[0]["rerun_path"], hz=10)
    assert found["action"][0] == list(range(kept[0]["length"]))
    assert found["cameras/front"][0] == [*range(0, kept[0]["length"], 4), kept[0]["length"]]
    assert found["entropy names"][1] == ["mean of the chunk"]
    again = rollout(settings(tmp_path / "r", n_envs=1, episodes=2, overwrite=True), Slider())
    assert not list((tmp_path / "r").rglob("*.rrd")) and again["per_episode"][0]["rerun_path"] is None


@needs_rerun
def test_entropies_are_named_by_the_encoded_entries(nano, robot, tmp_path):
    policy = Policy(*nano)  # its rotations are constant, so they have no tokens
    adapter = AdapterConfig(robot={"state_names": robot.state_names, "action_names": robot.action_names})
    config = RolloutConfig(
        env=("envs:vla/Reach-v0",), episodes=1, n_envs=1, rerun=1, videos=0, out=tmp_path / "r", adapter=adapter
    )
    (episode,) = rollout(config, policy)["per_episode"]
    steps, entropies = read(tmp_path / "r" / episode["rerun_path"])["entropy"]
    assert steps == list(range(episode["length"])) and np.shape(entropies) == (len(steps), 4)
    assert read(tmp_path / "r" / episode["rerun_path"])["entropy names"][1] == ["dx", "dy", "dz", "gripper"]
    assert np.min(entropies) > 0 and np.max(entropies) < np.log(31) + 1e-5


@needs_rerun
def test_a_dataset_is_recorded_frame_by_frame(tmp_path):
    root = record(tmp_path / "set", [9, 7, 8]).root
    inspect(InspectConfig(data=root, out=tmp_path / "report", rerun=2))
    demos = Demonstrations(root)
    assert {path.name for path in (tmp_path / "report/rerun").iterdir()} == {"episode-0.rrd", "episode-2.rrd"}
    found, rows = read(tmp_path / "report/rerun/episode-2.rrd", demos.fps), demos.episodes[2].rows
    np.testing.assert_array_equal(found["action"][1], demos.actions[rows])
    np.testing.assert_array_equal(found["state"][1], demos.states[rows])
    np.testing.assert_array_equal(found["cameras/front"][1], list(demos.frames(2, "front")))
    assert found["action"][0] == found["cameras/front"][0] == list(range(8)) and "entropy" not in found


def test_without_rerun_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    root = record(tmp_path / "set", [9]).root
    for start in (
        lambda: rollout(settings(tmp_path / "r", rerun=1), Slider()),
        lambda: inspect(InspectConfig(data=root, out=tmp_path / "r", rerun=1)),
    ):
        with pytest.raises(ConfigError, match="--rerun needs rerun-sdk, which cannot be imported"):
            start()
    assert not (tmp_path / "r").exists()


def test_older_results_have_no_recordings():
    values = Episode(0, "toy/Slide-v0", 1).to_dict()
    del values["rerun_path"]
    assert Episode.from_dict(values) == Episode(0, "toy/Slide-v0", 1)
