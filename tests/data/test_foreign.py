"""Datasets of other recorders: metadata, columns and videos are read, not assumed."""

import json
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.recordings import ROBOT
from tests.data.test_faults import DATA, VIDEO, change_column, change_info
from tests.data.test_video import number_of, numbered
from vla.data.checks import check
from vla.data.reader import Demonstrations
from vla.data.video import VideoReader, VideoWriter
from vla.data.writer import DemonstrationWriter
from vla.errors import DataError

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
CAMERA = "observation.images.front"
LENGTHS = (9, 7, 8)


@pytest.fixture
def root(tmp_path):
    """Three episodes. Images and actions encode the number of the frame in the recording."""
    return recorded(tmp_path / "set")


def recorded(root):
    start = 0
    with DemonstrationWriter(root, ROBOT) as writer:
        for episode, length in enumerate(LENGTHS):
            frames = np.arange(start, start + length)
            seen = [{"pixels": {"front": numbered(i)}, "agent_pos": np.zeros(2, np.float32)} for i in frames]
            writer.add_episode(seen, frames[:, None] * [1.0, 0.0, 0.0], f"task {episode % 2}")
            start += length
    return root


def change_rows(root, change):
    """Apply `change` to each row of meta/episodes; rows for which it returns False are removed."""
    table = pq.read_table(root / EPISODES)
    rows = [row for row in table.to_pylist() if change(row) is not False]
    pq.write_table(pa.Table.from_pylist(rows), root / EPISODES)
    change_info(root, total_episodes=len(rows))


def as_images(root, encode, shape=(32, 80, 3)):
    """Store the images in the data file, encoded by `encode(image)`, instead of as a video."""
    images = [numbered(i) for i in range(sum(LENGTHS))]
    stored = pa.array([{"bytes": encode(image), "path": None} for image in images])
    table = pq.read_table(root / DATA).append_column(CAMERA, stored)
    pq.write_table(table, root / DATA)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][CAMERA] = {"dtype": "image", "shape": list(shape), "names": None}
    change_info(root, **info)


def png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def seen(demos):
    return [number_of(image) for episode in demos.episodes for image in demos.frames(episode.index, "front")]


def encode(path, times, fps=10, codec="libx264", pixels="yuv420p", container="mp4", grain=1, **options):
    """A video with frame `i` at `times[i]` seconds, whatever `fps` the file declares."""
    base, rng = Fraction(1, 10_000), np.random.default_rng(0)
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = 32, 80
        stream.pix_fmt, stream.codec_context.time_base = pixels, base
        for number, seconds in enumerate(times):
            image = numbered(number) + rng.integers(0, grain, (32, 80, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round(seconds / base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


# Times and keys


@settings(max_examples=10)
@given(data=st.data(), jitter=st.floats(-0.1, 0.1))
def test_frames_removed_from_the_tables_but_not_from_the_video(tmp_path_factory, data, jitter):
    """For any remaining rows and any jitter of the timestamps, each row has the image at its timestamp."""
    root = recorded(tmp_path_factory.mktemp("kept") / "set")
    keep = [data.draw(st.sets(st.integers(3, length - 1)).map(sorted)) for length in LENGTHS]
    keep = [[0, 1, 2, *some] for some in keep]
    table, starts = pq.read_table(root / DATA), np.cumsum([0, *LENGTHS])
    rows = np.concatenate([start + np.array(some) for start, some in zip(starts, keep, strict=False)])
    table = table.take(rows)
    noise = jitter / ROBOT.control_hz * np.sin(3 * rows)
    for name, values in (
        ("frame_index", np.concatenate([np.arange(len(some)) for some in keep])),
        ("timestamp", (table["timestamp"].to_numpy() + noise).astype(np.float32)),
    ):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, root / DATA)
    change_rows(root, lambda row: row.update(length=len(keep[row["episode_index"]])))
    demos = Demonstrations(root)
    assert seen(demos) == rows.tolist() == demos.actions[:, 0].tolist()
    skipped = tuple(i for i, some in enumerate(keep) if some != list(range(len(some))))
    assert {finding.what: finding.episodes for finding in check(demos)}.get("time gaps", ()) == skipped


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda time: time + 0.05, r"episode 0, frame 0: the timestamp 0\.0500 s is not a multiple of 1/10 s"),
        (lambda time: time * 0, r"episode 0, frame 1: the timestamp 0\.0000 s is not"),
        (lambda time: time * np.nan, "timestamp nan s"),
        (lambda time: time / 2, r"0\.05 s apart, but meta/info\.json has fps 10"),
        (lambda time: time + 0.1, "the last timestamp of episode 0 is 0.900 s, but its segment of the video"),
        (lambda time: time + 1.7e9, "the last timestamp of episode 0 is 17"),
    ],
)
def test_timestamps_without_an_image(root, change, words):
    change_column(root, "timestamp", pa.array(change(pq.read_table(root / DATA)["timestamp"].to_numpy().astype(float))))
    with pytest.raises(DataError, match=words):
        Demonstrations(root)


def test_timestamps_are_not_needed_without_a_video(root):
    as_images(root, png)
    change_column(root, "timestamp", pa.array(np.zeros(sum(LENGTHS), np.float32)))
    demos = Demonstrations(root)
    assert seen(demos) == list(range(sum(LENGTHS)))
    assert "odd timestamps" in {finding.what for finding in check(demos)}


def test_episodes_removed_from_the_list(root):
    table = pq.read_table(root / DATA)
    actions = np.array(table["action"].to_pylist(), np.float32)
    actions[10] = np.nan  # in an episode that is not read
    change_column(root, "action", pa.FixedSizeListArray.from_arrays(actions.ravel(), 3))
    change_rows(root, lambda row: row["episode_index"] != 1)
    demos = Demonstrations(root)
    assert [(episode.index, episode.start) for episode in demos.episodes] == [(0, 0), (2, 9)]
    assert seen(demos) == [*range(9), *range(16, 24)] == demos.actions[:, 0].tolist()
    assert {"unlisted episodes"} <= {finding.what for finding in check(demos)}


def test_frame_numbers_that_do_not_start_at_zero(root):
    change_column(root, "frame_index", pa.array(range(100, 124)))
    assert seen(Demonstrations(root)) == list(range(24))
    change_column(root, "frame_index", pa.array([0] * 24))
    with pytest.raises(DataError, match="episode 0 has frame_index 0 twice"):
        Demonstrations(root)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"length": 0}, "episode 0 has length 0"),
        ({"length": 10}, r"its data file has 9 frames\. The recording was interrupted"),
        ({"length": 8}, r"its data file has 9 frames\. Correct its length"),
        ({"data/file_index": 0.5}, "'data/file_index' must be a whole number >= 0, got 0.5"),
        ({f"videos/{CAMERA}/from_timestamp": float("nan")}, "must be a time in seconds >= 0, got nan"),
        ({"episode_index": 1}, "lists episode 1 twice"),
    ],
)
def test_invalid_rows_of_the_list(root, values, words):
    change_rows(root, lambda row: row.update(values) if row["episode_index"] == 0 else None)
    with pytest.raises(DataError, match=words):
        Demonstrations(root)


def test_whole_numbers_that_pandas_made_floats(root):
    change_rows(root, lambda row: row.update({"length": float(row["length"]), "data/file_index": 0.0}))
    assert Demonstrations(root).num_frames == sum(LENGTHS)


def test_success_is_a_flag_or_unknown(root):
    for value, expected in ((True, True), (0, False), (1.0, True), ("failure", None), (None, None)):
        change_rows(root, lambda row, value=value: row.update(success=value))
        assert Demonstrations(root).episodes[0].success is expected


# Instructions

SAID = ["turn left", "turn right"]


def tasks(index=(0, 1), frame=None, **columns):
    table = pa.table({"task_index": list(index), **columns})
    return table.replace_schema_metadata({"pandas": json.dumps({"index_columns": [frame]})}) if frame else table


@pytest.mark.parametrize(
    "table",
    [
        tasks(name=["l", "r"], task=SAID),
        tasks(name=["l", "r"], task=["x", "y"], said=SAID, frame="said"),
        tasks(kind=["A", "B"], __index_level_0__=SAID),
        tasks(instruction=SAID),
        tasks(task=pa.array(SAID).dictionary_encode()),
        tasks(task=pa.array(SAID, pa.string_view())),
        tasks(index=(1, 0), task=SAID[::-1]),
        tasks(index=(0.0, 1.0), task=SAID),
        tasks(index=(0, 1, 10**9), task=[*SAID, "never used"]),
    ],
)
def test_the_instruction_column(root, table):
    pq.write_table(table, root / "meta/tasks.parquet")
    demos = Demonstrations(root)
    assert [episode.instruction for episode in demos.episodes] == [SAID[0], SAID[1], SAID[0]]
    assert "other instructions" in {finding.what for finding in check(demos)}  # meta/episodes still has the old ones


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (tasks(index=(0, 2), task=SAID), "episode 1, frame 0 has task_index 1, .* no instruction with that index"),
        (tasks(task=["x", None]), "no instruction with that index"),
        (tasks(a=SAID, b=SAID), "with 2 text columns"),
        (tasks(index=(0, 0), task=SAID), "task_index 0 has two instructions, 'turn left' and 'turn right'"),
    ],
)
def test_unknown_instructions(root, table, words):
    pq.write_table(table, root / "meta/tasks.parquet")
    with pytest.raises(DataError, match=words):
        Demonstrations(root)


# Columns

ACTIONS = np.arange(72, dtype=np.float32).reshape(24, 3)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ACTIONS.tolist(), pa.list_view(pa.float64())),
        pa.FixedShapeTensorArray.from_numpy_ndarray(ACTIONS),
        pa.array(ACTIONS.astype(int).tolist(), pa.large_list(pa.int16())),
        pa.array(ACTIONS.tolist(), pa.list_(pa.float32())).cast(pa.list_(pa.decimal128(9, 2))),
    ],
)
def test_numbers_in_any_type(root, column):
    try:
        change_column(root, "action", column)
    except pa.ArrowNotImplementedError as error:  # pyarrow 22 cannot write list views
        pytest.skip(str(error))
    assert np.array_equal(Demonstrations(root).actions, ACTIONS)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([["0", "1", "2"]] * 24), "action contains values of type string, not numbers"),
        (pa.array([[[0.0], [1.0], [2.0]]] * 24), "Flatten it to one list per frame"),
        (pa.array([[0.0, 1.0, 1e300]] * 24), r"episode 0, frame 0: action\[gripper\] is inf"),
        (pa.array([None, *[[0.0, 1.0, 2.0]] * 23]), "episode 0, frame 0: action has 0 entries instead of 3"),
        (pa.array([1.0] * 24), r"one number per frame, but meta/info\.json has 3"),
    ],
)
def test_columns_that_are_not_actions(root, column, words):
    change_column(root, "action", column)
    with pytest.raises(DataError, match=words):
        Demonstrations(root)


# Images


@pytest.mark.parametrize(
    ("encode_image", "shape"),
    [
        (lambda image: png(cv2.cvtColor(image, cv2.COLOR_RGB2BGRA)), (4, 32, 80)),
        (lambda image: png(image[..., 0]), (32, 80, 1)),
        (lambda image: png(image[..., 0]), (32, 80)),
    ],
)
def test_alpha_and_grey(root, encode_image, shape):
    as_images(root, encode_image, shape)
    assert seen(Demonstrations(root)) == list(range(24))


def test_depth_is_skipped_or_rejected(root):
    as_images(root, lambda image: png(image[..., 0].astype(np.uint16) * 20), (32, 80, 1))
    demos = Demonstrations(root)
    assert demos.cameras == () and demos.info.depth == [CAMERA]
    assert "depth" in {finding.what for finding in check(demos)}
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][CAMERA]["shape"] = [32, 80, 3]
    change_info(root, **info)
    with pytest.raises(DataError, match=r"is a depth image, not RGB\. Declare it in meta/info\.json"):
        seen(Demonstrations(root))


def test_depth_in_a_video(root):
    encode(root / VIDEO, np.arange(24) / 10, codec="ffv1", pixels="gray16le", container="matroska")
    with pytest.raises(DataError, match="is a depth video, not RGB"):
        seen(Demonstrations(root))
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][CAMERA]["shape"] = [32, 80, 1]
    change_info(root, **info)
    assert Demonstrations(root).info.depth == [CAMERA]


def test_paths_outside_the_dataset_are_rejected(root, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(numbered(3)))
    as_images(root, png)
    change_column(root, CAMERA, pa.array([{"bytes": None, "path": "../secret.png"}] * 24))
    with pytest.raises(DataError, match=r"'\.\./secret\.png' is outside the dataset folder"):
        seen(Demonstrations(root))
    change_info(root, data_path="../{chunk_index}/{file_index}.parquet")
    with pytest.raises(DataError, match="is outside the dataset folder"):
        Demonstrations(root)


def test_links_into_a_cache_are_followed(root, tmp_path):
    (root / VIDEO).rename(tmp_path / "blob")
    (root / VIDEO).symlink_to(tmp_path / "blob")
    assert seen(Demonstrations(root)) == list(range(24))


# Videos


def turned(path, a, b, c, d):
    """Write a display matrix into an mp4: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    content = path.read_bytes()
    place = content.index(b"tkhd") + 44
    entries = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:place] + struct.pack(">9i", *entries) + content[place + 36 :])


@pytest.mark.parametrize(
    ("matrix", "show"),
    [
        ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    ],
)
def test_the_display_matrix_is_applied(tmp_path, matrix, show):
    with VideoWriter(path := tmp_path / "v.mp4", 32, 80, 10) as video:
        video.add(numbered(0b1011001))
    plain = VideoReader(path, 10).at(0)
    turned(path, *matrix)
    assert np.array_equal(VideoReader(path, 10).at(0), show(plain))


def test_other_angles_are_rejected(tmp_path):
    turned(encode(tmp_path / "v.mp4", [0.0]), 1, 1, -1, 1)
    with pytest.raises(DataError, match="not a multiple of 90 degrees"):
        VideoReader(tmp_path / "v.mp4", 10).at(0)


@pytest.mark.parametrize("options", [{"bf": "3", "g": "250"}, {"x264-params": "open-gop=1:keyint=6:bframes=3"}])
def test_frames_are_found_by_time_in_any_order(tmp_path, options):
    """A video with twice the rate, whose timestamps jitter and start late."""
    times = np.arange(48) / 20 + 0.01 * np.sin(np.arange(48)) + 0.01
    reader = VideoReader(encode(tmp_path / "v.mp4", times, fps=20, **options), 10)
    for number in np.random.default_rng(0).permutation(24).tolist():
        assert number_of(reader.at(number / 10)) == 2 * number


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (np.arange(24) / 20, "ends before 1.200 s, at 1.150 s"),
        (np.arange(24) / 5, r"no frame at 0\.100 s; the nearest is at 0\.\d00 s"),
        (np.arange(24) / 10 + 0.5, r"no frame at 0\.000 s; the nearest is at 0\.500 s"),
        ([i / 10 for i in range(25) if i != 14], r"no frame at 1\.400 s"),
    ],
)
def test_videos_without_the_frames(root, times, words):
    encode(root / VIDEO, times)
    with pytest.raises(DataError, match=words):
        seen(Demonstrations(root))


def test_an_unknown_codec(root):
    content = (root / VIDEO).read_bytes()
    (root / VIDEO).write_bytes(content.replace(b"avc1", b"zzzz"))
    with pytest.raises(DataError, match="does not know its codec"):
        seen(Demonstrations(root))


def test_damage_inside_a_video_is_detected(tmp_path):
    """FFmpeg conceals damage and continues, but marks most of the affected frames."""
    path, refused, rng = tmp_path / "v.mp4", 0, np.random.default_rng(0)
    encode(path, np.arange(40) / 10, grain=30, g="6", bf="0", crf="20")
    content = path.read_bytes()
    for place in np.linspace(len(content) // 5, len(content) // 2, 20, dtype=int):
        path.write_bytes(content[:place] + rng.bytes(30) + content[place + 30 :])
        reader = VideoReader(path, 10)
        try:
            for number in range(40):
                reader.at(number / 10)
        except DataError:
            refused += 1
    assert refused > 5
