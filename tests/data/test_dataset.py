"""Writer and reader: round trips, and the file format of LeRobot."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.recordings import ROBOT, path_of, record
from tests.data.test_video import number_of, numbered
from tests.pointworld import draw, read
from vla.data import format as v3
from vla.data import packing
from vla.data.packing import finalise
from vla.data.reader import Demonstrations
from vla.data.staging import finished, open_staging
from vla.data.writer import DemonstrationWriter, EpisodeRecorder
from vla.errors import DataError, SpecError
from vla.spec import RobotSpec

FIXTURES = Path(__file__).parent / "fixtures"


@settings(max_examples=12)
@given(
    state_dim=st.integers(0, 3),
    action_dim=st.integers(1, 8),
    cameras=st.integers(0, 2),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) > 1),
    executed=st.booleans(),
    rate=st.sampled_from([5.0, 10.0, 12.5, 30.0]),
)
def test_round_trip(tmp_path_factory, state_dim, action_dim, cameras, lengths, executed, rate):
    root = tmp_path_factory.mktemp("data") / "set"
    robot = RobotSpec(
        tuple(f"cam{i}" for i in range(cameras)),
        tuple(f"s{i}" for i in range(state_dim)),
        tuple(f"a{i}" for i in range(action_dim)),
        control_hz=rate,
    )
    rng = np.random.default_rng(len(lengths))
    actions = [rng.normal(size=(length, action_dim)).astype(np.float32) for length in lengths]
    sent = [action + 1 for action in actions]
    states = [rng.normal(size=(length, state_dim)).astype(np.float32) for length in lengths]
    number = 0
    with DemonstrationWriter(root, robot, executed_actions=executed) as writer:
        for i, length in enumerate(lengths):
            seen = []
            for step in range(length):
                pixels = {camera: numbered(number + step) for camera in robot.cameras}
                seen.append({"pixels": pixels, "agent_pos": states[i][step]})
            number += length
            writer.add_episode(
                seen, actions[i], f"task {i % 2}", executed_actions=sent[i] if executed else None, seed=i
            )
    demos = Demonstrations(root)
    assert demos.robot == robot and demos.fps == rate
    assert np.array_equal(demos.actions, np.concatenate(actions))
    assert demos.states is None if not state_dim else np.array_equal(demos.states, np.concatenate(states))
    assert (
        demos.executed_actions is None if not executed else np.array_equal(demos.executed_actions, np.concatenate(sent))
    )
    assert [episode.length for episode in demos.episodes] == lengths
    assert [episode.instruction for episode in demos.episodes] == [f"task {i % 2}" for i in range(len(lengths))]
    for episode in reversed(demos.episodes):
        for camera in demos.cameras:
            numbers = [number_of(image) for image in demos.frames(episode.index, camera)]
            assert numbers == list(range(episode.start, episode.start + episode.length))


def test_metadata_of_an_episode(tmp_path):
    episode = record(tmp_path / "set").episodes[2]
    assert (episode.env_id, episode.seed, episode.success, episode.noise) == ("test/Point-v0", 2, True, 0.2)
    assert (episode.start, episode.length, episode.rows) == (21, 15, slice(21, 36))


def test_images_belong_to_their_states_in_any_order(tmp_path):
    demos = record(tmp_path / "set", (20, 3, 30))
    mixed = [demos.frames(index, "front") for index in (2, 0, 1)]
    for index, frames in zip((2, 0, 1), mixed, strict=True):  # interleaved: all three share one video
        states = demos.states[demos.episodes[index].rows]
        seen = [read(image) for image in frames]
        assert np.abs(np.array(seen) - states[:, 0]).max() < 0.02


def test_small_file_limits_make_many_files_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(v3.Info, "data_files_size_in_mb", 0.0005)
    monkeypatch.setattr(v3.Info, "video_files_size_in_mb", 0.003)
    monkeypatch.setattr(v3.Info, "chunks_size", 2)
    demos = record(tmp_path / "set", [12] * 7)
    assert len(list((demos.root / "data").glob("chunk-*/file-*.parquet"))) > 2
    assert len(list((demos.root / "videos").glob("*/chunk-001/file-*.mp4"))) > 0
    expected = np.concatenate([path_of(12, seed)[1] for seed in range(7)])
    assert np.array_equal(demos.actions, expected)
    for episode in demos.episodes:
        seen = [read(image) for image in demos.frames(episode.index, "front")]
        assert np.abs(np.array(seen) - demos.states[episode.rows, 0]).max() < 0.02


def test_files_have_lerobots_format(tmp_path):
    root = record(tmp_path / "set").root
    info = json.loads((root / "meta/info.json").read_text())
    ours, theirs = info["features"], json.loads((FIXTURES / "lerobot_av1/meta/info.json").read_text())["features"]
    for key in ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index"):
        assert ours[key].keys() == theirs[key].keys() and ours[key]["dtype"] == theirs[key]["dtype"]
    video = ours["observation.images.front"]
    assert video.keys() == theirs["observation.images.top"].keys()
    assert set(video["info"]) <= set(theirs["observation.images.top"]["info"])
    assert (info["fps"], info["codebase_version"], info["splits"]) == (10, "v3.0", {"train": "0:3"})
    for name in ("meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        own, other = (pq.read_schema(folder / name) for folder in (root, FIXTURES / "lerobot_av1"))
        for field in other:
            if "observation.images" not in field.name and "observation.state" not in field.name:
                assert field.name in own.names, field.name
                kinds = (str(own.field(field.name).type), str(field.type))
                assert kinds[0].split("[")[0] == kinds[1].split("[")[0], field.name
    tasks = pq.read_schema(root / "meta/tasks.parquet")
    assert json.loads(tasks.metadata[b"pandas"])["index_columns"] == ["task"]
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet").to_pydict()
    assert np.allclose(rows["timestamp"], np.array(rows["frame_index"]) / 10) and rows["index"] == list(range(36))
    assert [i for i, done in enumerate(rows["next.done"]) if done] == [11, 20, 35]


def test_statistics_are_exact(tmp_path):
    demos = record(tmp_path / "set", (40, 60))
    stats = json.loads((demos.root / "meta/stats.json").read_text())
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        assert np.allclose(stats["action"][name], np.quantile(demos.actions.astype(np.float64), q, axis=0))
    assert stats["action"]["count"] == [100] and stats["index"]["max"] == [99]
    images = np.stack([image for episode in demos.episodes for image in demos.frames(episode.index, "front")])
    front = stats["observation.images.front"]
    assert np.shape(front["mean"]) == (3, 1, 1)
    assert np.allclose(np.ravel(front["mean"]), images.mean((0, 1, 2)) / 255, atol=0.02)
    episodes = pq.read_table(demos.root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert np.allclose(episodes[1]["stats/action/mean"], demos.actions[40:].mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["lerobot_av1", "lerobot_images"])
def test_datasets_that_lerobot_recorded(name):
    demos = Demonstrations(FIXTURES / name)
    assert demos.cameras == ("top",) and demos.tasks == ["do 0", "do 1"] and demos.fps == 15
    names = {"lerobot_av1": tuple(f"m{i}.pos" for i in range(6)), "lerobot_images": ("m0",)}[name]
    assert demos.robot.action_names == names and demos.actions.shape == (demos.num_frames, len(names))
    assert (demos.states is None) == (name == "lerobot_images")
    assert demos.episodes[1].instruction == "do 1" and demos.episodes[1].seed is None
    for episode in reversed(demos.episodes):
        images = list(demos.frames(episode.index, "top"))
        assert [int(image[20, 12 * bit + 6, 0] > 128) for image in images[:1] for bit in range(5)] == [
            episode.start >> bit & 1 for bit in range(5)
        ]
        assert len(images) == episode.length and images[0].shape == (48, 128, 3)


def test_the_fingerprint_changes_with_the_data(tmp_path):
    first = record(tmp_path / "a").fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Demonstrations(tmp_path / "b").fingerprint == first  # a copy has the same data
    assert record(tmp_path / "c", (12, 9, 16)).fingerprint != first
    video = next((tmp_path / "b").glob("videos/*/*/*.mp4"))
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 1
    video.write_bytes(content)
    assert Demonstrations(tmp_path / "b").fingerprint != first


# Recording


def test_an_error_keeps_finished_episodes_and_discards_the_rest(tmp_path):
    states, actions = path_of(5, 0)
    seen = [{"pixels": {"front": draw(state)}, "agent_pos": state} for state in states]
    with pytest.raises(KeyboardInterrupt), DemonstrationWriter(tmp_path / "set", ROBOT) as writer:
        writer.add_episode(seen, actions, "task")
        with writer.episode() as episode:
            episode.record(seen[0], actions[0])
            raise KeyboardInterrupt
    assert not list((tmp_path / "set/.partial").glob(".*"))
    with pytest.raises(DataError, match="unfinished recording"):
        Demonstrations(tmp_path / "set")
    with pytest.raises(DataError, match="unfinished recording of 1 episodes"):
        DemonstrationWriter(tmp_path / "set", ROBOT)
    with DemonstrationWriter(tmp_path / "set", ROBOT, resume=True) as writer:
        assert writer.finished == [0]
        writer.add_episode(seen, actions, "another")
    assert [episode.instruction for episode in Demonstrations(tmp_path / "set").episodes] == ["task", "another"]


@pytest.mark.parametrize("when", ["before its first frame", "between two frames", "after its last frame"])
def test_a_process_that_outlives_its_run_stores_no_partial_episode(tmp_path, when):
    """After a kill, workers may still record while another process resumes the run."""
    staging = open_staging(tmp_path / "set", resume=False)
    states, actions = path_of(6, 0)
    orphan = EpisodeRecorder(staging, 0, ROBOT)
    for step, (state, action) in enumerate(zip(states, actions, strict=True)):
        if step == {"before its first frame": 0, "between two frames": 3}.get(when):
            open_staging(tmp_path / "set", resume=True)
        orphan.record({"pixels": {"front": draw(state)}, "agent_pos": state}, action)
    if when == "before its first frame":  # nothing had been removed, so the episode is complete
        orphan.finish(instruction="go")
        assert finished(staging) == [0]
        return
    if when == "after its last frame":
        open_staging(tmp_path / "set", resume=True)
    with pytest.raises(DataError, match="another process has resumed it"):
        orphan.finish(instruction="go")
    orphan.discard()
    assert finished(staging) == [] and not list(staging.iterdir())


def test_a_crash_while_packing_loses_nothing(tmp_path, monkeypatch):
    """Stop before each rename in `finalise`: there is never a partial dataset, and finally the complete one."""
    whole = record(tmp_path / "whole")
    original, budget = Path.rename, [0]

    def rename(path, target):
        if budget[0] == 0:
            raise SystemExit
        budget[0] -= 1
        return original(path, target)

    with pytest.raises(SystemExit), DemonstrationWriter(tmp_path / "set", ROBOT) as writer:
        for seed, length in enumerate((12, 9, 15)):
            states, actions = path_of(length, seed)
            seen = [{"pixels": {"front": draw(state)}, "agent_pos": state} for state in states]
            writer.add_episode(
                seen, actions, f"task {seed % 2}", env_id="test/Point-v0", seed=seed, success=True, noise=0.1 * seed
            )
        monkeypatch.setattr(Path, "rename", rename)
    for allowed in (1, 2):
        budget[0] = allowed
        with pytest.raises(DataError, match="unfinished recording"):
            Demonstrations(tmp_path / "set")
        with pytest.raises(SystemExit):
            finalise(tmp_path / "set")
    budget[0] = 9
    finalise(tmp_path / "set")
    assert Demonstrations(tmp_path / "set").fingerprint == whole.fingerprint
    assert not (tmp_path / "set/.partial").exists()


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "concatenate", full)
    with pytest.raises(DataError, match="disk is full"):
        record(tmp_path / "set")
    monkeypatch.undo()
    finalise(tmp_path / "set")
    assert Demonstrations(tmp_path / "set").num_frames == 36


def test_folders_with_other_contents_are_unchanged(tmp_path):
    record(tmp_path / "set", (3,))
    with pytest.raises(DataError, match="already contains a dataset"):
        DemonstrationWriter(tmp_path / "set", ROBOT)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    with pytest.raises(DataError, match="not a recording"):
        DemonstrationWriter(tmp_path / "photos", ROBOT, resume=True)
    assert (tmp_path / "photos/cat.png").exists()


def test_data_that_do_not_match_the_robot_are_rejected(tmp_path):
    state, action = np.zeros(2, np.float32), np.zeros(3)
    good = {"pixels": {"front": draw(state)}, "agent_pos": state}
    with pytest.raises(DataError, match="no episode is finished"), DemonstrationWriter(tmp_path / "a", ROBOT) as writer:
        episode = writer.episode()
        with pytest.raises(SpecError, match="expected 3 entries"):
            episode.record(good, np.zeros(2))
        with pytest.raises(SpecError, match="not finite"):
            episode.record(good, action * np.nan)
        with pytest.raises(SpecError, match="unknown camera"):
            episode.record({**good, "pixels": {"wrist": draw(state)}}, action)
        with pytest.raises(DataError, match="at least one frame"):
            episode.finish(instruction="task")
        episode.record(good, action)
        with pytest.raises(DataError, match="as in the first frame"):
            episode.record({**good, "pixels": {"front": draw(state)[:40]}}, action)
        with pytest.raises(DataError, match="instruction"):
            episode.finish(instruction=" ")
        episode.discard()
