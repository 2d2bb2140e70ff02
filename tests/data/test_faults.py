"""Unreadable datasets: each raises one DataError that names the file or value and suggests a fix."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.recordings import record
from vla.data import format as v3
from vla.data.format import Info
from vla.data.reader import Demonstrations
from vla.errors import DataError

DATA = "data/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return record(tmp_path_factory.mktemp("faults") / "whole").root


@pytest.fixture
def root(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "damaged")


def change_info(root, **values):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | values))


def change_column(root, name, values):
    path = root / DATA
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def test_no_dataset(tmp_path, whole):
    with pytest.raises(DataError, match=r"no folder .*whol.*Did you mean 'whole'"):
        Demonstrations(whole.parent / "whol")
    with pytest.raises(DataError, match="is a folder of datasets; choose one of them"):
        Demonstrations(whole.parent)
    (tmp_path / "x.tfrecord").touch()
    with pytest.raises(DataError, match=r"it has no meta/info.json \(it contains x.tfrecord\)"):
        Demonstrations(tmp_path)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("v2.1", "convert_dataset_v21_to_v30"),
        ("v2.0", "Convert it to v2.1"),
        ("v4.0", "This package reads v3.0"),
    ],
)
def test_other_versions(root, version, words):
    change_info(root, codebase_version=version)
    with pytest.raises(DataError, match=f"format {version}; v3.0 is needed.*{words}"):
        Demonstrations(root)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"features": {}}, "'features' is missing or empty"),
        ({"fps": -1}, "fps must be a positive number, got -1"),
        ({"features": {"state": {"dtype": "float32", "shape": [2]}}}, "no feature 'action'"),
        ({"features": {"action": {"dtype": "float32"}}}, '\'action\' needs "dtype" and "shape"'),
        ({"total_episodes": 5}, "counts 5 episodes, meta/episodes lists 3.*interrupted"),
        ({"robot": {"cameras": [], "state_names": [], "action_names": ["x"]}}, "has 0 state and 1 action entries"),
        ({"robot": {"camera": []}}, "unknown robot property 'camera'"),
        ({"robot": {"cameras": [], "state_names": [], "action_names": ["x"], "control_hz": "9"}}, "not a robot descr"),
        ({"fps": float("inf")}, "fps must be a positive number, got inf"),
        ({"fps": 20}, 'fps is 20, but "robot" has control_hz 10'),
        ({"features": [1]}, '"features" must map names to features'),
        ({"features": {"action": {"dtype": "float32", "shape": 2}}}, "must be a list of sizes, got 2"),
        ({"features": {"action": {"dtype": "float32", "shape": [0]}}, "robot": None}, r"is empty \(shape \[0\]\)"),
        (
            {"data_path": "data/chunk-{episode_chunk:03d}/{episode_index}.parquet"},
            "conversion to v3.0 may be incomplete",
        ),
        ({"video_path": "videos/{0}/{video_key}.mp4"}, r"format v3\.0 has {video_key}, {chunk_index}, {file_index}"),
        ({"data_path": None}, "the path None cannot be filled in"),
    ],
)
def test_contradictions_in_the_info(root, values, words):
    change_info(root, **values)
    with pytest.raises(DataError, match=words):
        Demonstrations(root)


def test_damaged_info(root):
    cut(root / "meta/info.json")
    with pytest.raises(DataError, match=r"info\.json cannot be read as JSON"):
        Demonstrations(root)


@pytest.mark.parametrize("name", [DATA, "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"])
def test_damaged_and_missing_tables(root, name):
    cut(root / name)
    with pytest.raises(DataError, match=rf"{name} is not a complete parquet file .*interrupted"):
        Demonstrations(root)
    (root / name).unlink()
    with pytest.raises(DataError, match=r"missing|lists 0"):
        Demonstrations(root)


def test_damaged_and_missing_videos(root):
    whole_video = (root / VIDEO).read_bytes()
    cut(root / VIDEO)
    with pytest.raises(DataError, match=r"file-000\.mp4 cannot be decoded"):
        list(Demonstrations(root).frames(2, "front"))
    (root / VIDEO).unlink()
    with pytest.raises(DataError, match=r"file-000\.mp4 is missing"):
        Demonstrations(root)
    (root / VIDEO).write_bytes(whole_video)
    assert len(list(Demonstrations(root).frames(2, "front"))) == 15


def test_a_video_with_too_few_frames(root, tmp_path):
    short = record(tmp_path / "short", (12, 9)).root
    shutil.copy(short / VIDEO, root / VIDEO)
    demos = Demonstrations(root)
    assert len(list(demos.frames(1, "front"))) == 9
    with pytest.raises(DataError, match=r"ends before 2.100 s.*Episode 2 is 2.100 to 3.500 s of that video"):
        list(demos.frames(2, "front"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers(root, value):
    actions = np.concatenate([[*map(list, np.zeros((36, 3)))]]).astype(np.float32)
    actions[25, 1] = value
    change_column(root, "action", pa.FixedSizeListArray.from_arrays(actions.ravel(), 3))
    with pytest.raises(DataError, match=rf"episode 2, frame 4: action\[dy\] is {value}"):
        Demonstrations(root)


def test_actions_of_another_size(root):
    ragged = [[0.0, 0.0, 0.0]] * 36
    ragged[13] = [0.0, 0.0]
    change_column(root, "action", pa.array(ragged, pa.list_(pa.float32())))
    with pytest.raises(DataError, match=r"episode 1, frame 1: action has 2 entries instead of 3 \(dx, dy, gripper\)"):
        Demonstrations(root)
    change_column(root, "action", pa.FixedSizeListArray.from_arrays(np.zeros(72, np.float32), 2))
    with pytest.raises(DataError, match=r"action has 2 entries, but meta/info\.json has 3"):
        Demonstrations(root)


def test_missing_frames_and_columns(root):
    table = pq.read_table(root / DATA)
    pq.write_table(table.slice(0, 30), root / DATA)
    with pytest.raises(DataError, match="episode 2 should have frames 0 to 14; its data file has 9"):
        Demonstrations(root)
    pq.write_table(table.drop_columns(["action"]), root / DATA)
    with pytest.raises(DataError, match="column 'action' is missing"):
        Demonstrations(root)


def test_frames_in_another_order_are_sorted(root, whole):
    table = pq.read_table(root / DATA)
    pq.write_table(table.take(np.random.default_rng(0).permutation(36)), root / DATA)
    assert np.array_equal(Demonstrations(root).actions, Demonstrations(whole).actions)


def test_missing_instructions(root):
    change_column(root, "task_index", pa.array([0] * 20 + [7] * 16))
    with pytest.raises(DataError, match=r"frame 8 has task_index 7, but meta/tasks\.parquet has no instruction"):
        Demonstrations(root)


def test_too_few_frames(tmp_path):
    with pytest.raises(DataError, match="1 frame in total"):
        record(tmp_path / "one", (1,))
    empty = tmp_path / "empty"
    shutil.copytree(tmp_path / "one", empty)
    shutil.rmtree(empty / "meta/episodes")
    change_info(empty, total_episodes=0, total_frames=0)
    with pytest.raises(DataError, match="is empty: it has no episodes"):
        Demonstrations(empty)


def test_names_that_do_not_exist(whole):
    demos = Demonstrations(whole)
    with pytest.raises(DataError, match="Did you mean 'front'"):
        list(demos.frames(0, "fornt"))
    with pytest.raises(DataError, match="no episode 3; its episodes are 0 to 2"):
        list(demos.frames(3, "front"))


def test_images_of_another_size(root):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["shape"] = [64, 64, 3]
    change_info(root, **info)
    with pytest.raises(DataError, match=r"the image is \[48, 64\], but meta/info.json has \[64, 64\]"):
        list(Demonstrations(root).frames(0, "front"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ("a", "b")),
        ({"motors": ["a", "b"]}, ("a", "b")),
        ({"b": 1, "a": 0}, ("a", "b")),
        (None, ("action_0", "action_1")),
        (["a"], ("action_0", "action_1")),
        (["a", "a"], ("action_0", "action_1")),
    ],
)
def test_all_ways_to_write_names(names, expected):
    action = {"dtype": "float32", "shape": [2], "names": names}
    assert Info(10, {"action": action}).describe_robot().action_names == expected


def test_the_orders_of_names_must_agree(root):
    info = json.loads((root / "meta/info.json").read_text())
    info["robot"]["action_names"] = ["dy", "dx", "gripper"]
    change_info(root, **info)
    with pytest.raises(DataError, match='"robot" lists the action as dy, dx, gripper, the feature as dx, dy, gripper'):
        Demonstrations(root)


def test_cameras_that_share_a_name_or_a_file(root):
    info = json.loads((root / "meta/info.json").read_text())
    front = info["features"]["observation.images.front"]
    assert list(Info(10, {"observation.images.front": front, "observation.front": front}).cameras) == [
        "front",
        "observation.front",
    ]
    for key, path, words in (
        ("observation.images.wrist", VIDEO, "gives the same file for all cameras"),
        ("observation.images.../../out", v3.VIDEO, "must not contain a slash"),
    ):
        change_info(root, features=info["features"] | {key: front}, video_path=path)
        with pytest.raises(DataError, match=words):
            Demonstrations(root)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([48, 64, 3], ["height", "width", "channels"]),
        ([3, 48, 64], ["height", "width", "channels"]),  # copied from another recorder
        ([4, 48, 64], None),
        ([48, 64], None),
        ([48, 64, 1], {"axes": ["height", "width", "channel"]}),
    ],
)
def test_all_ways_to_write_an_images_shape(shape, names):
    features = {"observation.images.a": {"dtype": "image", "shape": shape, "names": names}}
    assert Info(10, features).image_shape("a") == (48, 64)


def test_cameras_by_short_name_without_depth():
    image = {"dtype": "video", "shape": [3, 48, 64], "names": ["channels", "height", "width"]}
    features = {
        "observation.image": image,
        "observation.images.left": {**image, "shape": [48, 64, 3]},
        "observation.images.depth": {**image, "info": {"is_depth_map": True}},
        "action": {"dtype": "float32", "shape": [1], "names": None},
    }
    info = Info(10, features)
    assert list(info.cameras) == ["image", "left"]
    assert info.image_shape("image") == info.image_shape("left") == (48, 64)
