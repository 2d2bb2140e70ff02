"""The LeRobotDataset v3 layout: file paths, `meta/info.json`, and the features that describe a robot.

Owns: the paths, the `Info` record, the features of recorded datasets, and the RobotSpec of a dataset. It does not know
how frames are encoded, or how a dataset is read or written.

    meta/info.json                                      features, frame rate, counts
    meta/stats.json                                     statistics over all frames
    meta/tasks.parquet                                  instruction -> task_index
    meta/episodes/chunk-000/file-000.parquet            one row per episode: location of its frames
    data/chunk-000/file-000.parquet                     one row per frame, many episodes per file
    videos/<camera key>/chunk-000/file-000.mp4          many episodes per file, concatenated
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vla.errors import DataError, SpecError
from vla.spec import RobotSpec

VERSION = "v3.0"

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

#: Staging folder for the episodes of an unfinished recording. A folder without `meta` is not a dataset yet.
STAGING = ".partial"

#: The configuration of the job that collected the dataset, stored in its folder.
PLAN = "collect.yaml"

ACTION = "action"
EXECUTED = "executed_action"  # the action sent to the robot, if `action` is the clean label of a noisy expert
STATE = "observation.state"
IMAGES = "observation.images."
DONE, SUCCESS = "next.done", "next.success"

#: Columns of every LeRobotDataset besides observations and actions.
BOOKKEEPING = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


@dataclasses.dataclass(frozen=True)
class Info:
    """Contents of `meta/info.json`.

    Attributes:
        features: column or camera key -> {"dtype", "shape", "names"} and, for videos, "info".
        robot: a RobotSpec as plain values. Only this package writes it; LeRobot ignores it.
    """

    fps: float
    features: dict[str, dict[str, Any]]
    total_episodes: int = 0
    total_frames: int = 0
    total_tasks: int = 0
    codebase_version: str = VERSION
    robot_type: str | None = None
    chunks_size: int = 1000
    data_files_size_in_mb: int = 100
    video_files_size_in_mb: int = 200
    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    data_path: str = DATA
    video_path: str | None = VIDEO
    robot: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. A whole-numbered fps is written as an integer, as LeRobot expects."""
        values = dataclasses.asdict(self)
        values["fps"] = int(self.fps) if float(self.fps).is_integer() else self.fps
        return {key: value for key, value in values.items() if key != "robot" or value is not None}

    @classmethod
    def load(cls, root: Path) -> Info:
        """Read and validate the info of the dataset at `root`. DataError if it is missing or invalid."""
        path = root / INFO
        if not path.is_file():
            raise DataError(_no_dataset(root))
        values = read_json(path)
        _check_version(root, values)
        for key in ("features", "fps"):
            if not values.get(key):
                raise DataError(f"{path}: {key!r} is missing or empty. Copy the dataset again.")
        known = {field.name for field in dataclasses.fields(cls)}
        info = cls(**{key: value for key, value in values.items() if key in known})
        number = isinstance(info.fps, int | float) and not isinstance(info.fps, bool)
        if not (number and math.isfinite(info.fps) and info.fps > 0):
            raise DataError(f"{path}: fps must be a positive number, got {info.fps!r}.")
        if not isinstance(info.features, dict):
            raise DataError(f'{path}: "features" must map names to features, got {info.features!r}.')
        for key, feature in info.features.items():
            _check_feature(path, key, feature)
        if ACTION not in info.features:
            raise DataError(f"{path}: there is no feature {ACTION!r}. Features: {', '.join(info.features)}.")
        place = {"chunk_index": 0, "file_index": 0}
        fill(root, info.data_path, **place)
        if len({fill(root, info.video_template, video_key=key, **place) for key in info.video_keys}) < len(
            info.video_keys
        ):
            raise DataError(
                f"{path}: video_path {info.video_path!r} gives the same file for all cameras. Add {{video_key}} to it."
            )
        return info

    @functools.cached_property
    def cameras(self) -> dict[str, str]:
        """Camera name -> feature key, in file order. Depth images are excluded."""
        found: dict[str, str] = {}
        for key, feature in self.features.items():
            if is_image(feature) and key not in self.depth:
                name = key.removeprefix(IMAGES).removeprefix("observation.")
                found[key if name in found else name] = key
        return found

    @functools.cached_property
    def depth(self) -> list[str]:
        """Feature keys of the depth images, which are not read."""
        return [key for key, feature in self.features.items() if is_image(feature) and _declares_depth(feature)]

    @functools.cached_property
    def video_keys(self) -> list[str]:
        """Feature keys of the cameras that are stored as videos."""
        return [key for key in self.cameras.values() if self.features[key]["dtype"] == "video"]

    @property
    def video_template(self) -> str:
        return VIDEO if self.video_path is None else self.video_path

    @property
    def unread(self) -> list[str]:
        """Feature keys of numeric observations that are not read, such as a state with another name than STATE."""
        return [
            key
            for key, feature in self.features.items()
            if not is_image(feature)
            and feature["dtype"] not in ("string", "language")
            and (key.startswith("observation.") or "state" in key)
            and key != STATE
        ]

    def with_depth(self, keys: list[str]) -> Info:
        """A copy with the images `keys` marked as depth."""
        features = {key: {**self.features[key], "info": {"is_depth_map": True}} for key in keys}
        return dataclasses.replace(self, features=self.features | features)

    def image_shape(self, camera: str) -> tuple[int, int]:
        """(height, width) of a camera's images. The feature's shape may be HWC, CHW or HW."""
        feature = self.features[self.cameras[camera]]
        shape, names = feature["shape"], list(feature.get("names") or ())
        if len(shape) == 2:
            return shape[0], shape[1]
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first == last:  # the shape is ambiguous; fall back to the names
            first = len(names) == 3 and str(names[0]).startswith("channel")
        return (shape[1], shape[2]) if first else (shape[0], shape[1])

    def channels(self, key: str) -> int:
        """Declared number of channels of an image feature."""
        shape = self.features[key]["shape"]
        height, width = self.image_shape(next(name for name, own in self.cameras.items() if own == key))
        return math.prod(shape) // max(height * width, 1)

    def describe_robot(self) -> RobotSpec:
        """The recorded RobotSpec, or else one from the features' names. DataError if it contradicts the features."""
        cameras = tuple(self.cameras)
        state = _names(self.features[STATE], "state") if STATE in self.features else ()
        action = _names(self.features[ACTION], "action")
        if not action:
            raise DataError(f"{INFO}: feature {ACTION!r} is empty (shape [0]), but a policy needs actions to learn.")
        if self.robot is None:
            return RobotSpec(cameras, state, action, control_hz=float(self.fps))
        try:
            robot = RobotSpec.from_dict(self.robot)
        except (SpecError, TypeError) as error:
            raise DataError(f'{INFO}: "robot" is not a robot description: {error}') from None
        if (robot.state_dim, robot.action_dim) != (len(state), len(action)):
            raise DataError(
                f'{INFO}: "robot" has {robot.state_dim} state and {robot.action_dim} action entries, but the features '
                f'have {len(state)} and {len(action)}. Correct or remove "robot".'
            )
        if not math.isclose(robot.control_hz, self.fps, rel_tol=1e-3):
            raise DataError(
                f'{INFO}: fps is {self.fps:g}, but "robot" has control_hz {robot.control_hz:g}. Make them equal.'
            )
        for what, ours, theirs in (("state", robot.state_names, state), ("action", robot.action_names, action)):
            if ours != theirs and set(ours) == set(theirs):
                raise DataError(
                    f'{INFO}: "robot" lists the {what} as {", ".join(ours)}, the feature as {", ".join(theirs)}. '
                    "Make the orders equal."
                )
        return dataclasses.replace(robot, cameras=cameras)


def features_of(
    robot: RobotSpec, image_shapes: Mapping[str, tuple[int, int]], videos: Mapping[str, dict[str, Any]], executed: bool
) -> dict[str, dict[str, Any]]:
    """Features of a dataset recorded with this robot.

    Args:
        image_shapes: camera -> (height, width).
        videos: camera -> video properties (`vla.data.video.describe`).
        executed: whether frames also store the executed action.
    """
    features: dict[str, dict[str, Any]] = {}
    for camera in robot.cameras:
        features[IMAGES + camera] = {
            "dtype": "video",
            "shape": [*image_shapes[camera], 3],
            "names": ["height", "width", "channels"],
            "info": videos[camera],
        }
    if robot.state_dim:
        features[STATE] = _vector(robot.state_names)
    features[ACTION] = _vector(robot.action_names)
    if executed:
        features[EXECUTED] = _vector(robot.action_names)
    for key in (DONE, SUCCESS):
        features[key] = {"dtype": "bool", "shape": [1], "names": None}
    return features | {key: dict(feature) for key, feature in BOOKKEEPING.items()}


def is_image(feature: Mapping[str, Any]) -> bool:
    return feature["dtype"] in ("video", "image")


def fill(root: Path, template: str, **place: Any) -> Path:
    """Fill in a path template of `meta/info.json`. DataError if it has unknown fields, or the path is outside
    `root`."""
    try:
        path = template.format(**place)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"{root / INFO}: the path {template!r} cannot be filled in ({type(error).__name__}: {error}); format "
            f"{VERSION} has {', '.join('{' + name + '}' for name in place)}. The conversion to {VERSION} may be "
            "incomplete."
        ) from None
    return inside(root, path)


def inside(root: Path, path: str) -> Path:
    """`root / path`. DataError if it is outside `root`. Symbolic links are allowed, as in the Hub's cache."""
    pure = PurePosixPath(path)
    if ".." in pure.parts or (pure.is_absolute() and not pure.is_relative_to(root.absolute())):
        raise DataError(f"{root}: the path {path!r} is outside the dataset folder, so it is not read.")
    return root / path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. DataError if that fails."""
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Copy the dataset again.") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=4, ensure_ascii=False) + "\n")


def _vector(names: tuple[str, ...]) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}


def _check_feature(path: Path, key: str, feature: Any) -> None:
    if not isinstance(feature, dict) or "dtype" not in feature or "shape" not in feature:
        raise DataError(f'{path}: feature {key!r} needs "dtype" and "shape", got {feature!r}.')
    shape = feature["shape"]
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise DataError(f"{path}: the shape of feature {key!r} must be a list of sizes, got {shape!r}.")
    if is_image(feature) and len(shape) not in (2, 3):
        raise DataError(f"{path}: the shape of camera {key!r} must be [height, width, channels], got {shape}.")
    if is_image(feature) and ("/" in key or "\\" in key):
        raise DataError(f"{path}: camera name {key!r} must not contain a slash. Rename it there and in `videos`.")


def _declares_depth(feature: Mapping[str, Any]) -> bool:
    details = [feature.get(name) for name in ("info", "video_info")]
    return any(
        bool(detail.get(flag))
        for detail in details
        if isinstance(detail, dict)
        for flag in ("is_depth_map", "video.is_depth_map")
    )


def _names(feature: Mapping[str, Any], what: str) -> tuple[str, ...]:
    """One name per dimension, from any form that LeRobot's recorders write: a list, {"motors": [...]}, {name: position}
    or nothing."""
    shape = list(feature["shape"]) or [1]
    if len(shape) != 1:
        raise DataError(f"{INFO}: {what} must be a vector; its shape is {shape}. Flatten it before training.")
    names: Any = feature.get("names")
    if isinstance(names, dict):
        if all(isinstance(position, int) for position in names.values()):
            names = sorted(names, key=names.__getitem__)
        else:
            names = [name for group in names.values() if isinstance(group, list) for name in group]
    if not isinstance(names, list) or len(names) != shape[0] or len(set(map(str, names))) != shape[0]:
        names = [f"{what}_{i}" for i in range(shape[0])]
    return tuple(str(name) for name in names)


def _check_version(root: Path, values: Mapping[str, Any]) -> None:
    version = str(values.get("codebase_version", "unknown"))
    if version.startswith("v3."):
        return
    convert = f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<user>/{root.name} --root={root}"
    if version == "v2.1":
        fix = f"Convert it with LeRobot: `{convert}`."
    elif version.startswith(("v2", "v1")):
        fix = f"Convert it to v2.1 with the LeRobot release that wrote it, then to v3.0: `{convert}`."
    else:
        fix = "This package reads v3.0; update it, or write the dataset with a LeRobot that uses v3.0."
    raise DataError(f"{root / INFO}: the dataset is in LeRobot format {version}; {VERSION} is needed. {fix}")


def _no_dataset(root: Path) -> str:
    if (root / STAGING).is_dir():
        return (
            f"{root} contains an unfinished recording, which cannot be read yet. "
            "To continue it, run the same command again with `--resume`."
        )
    if not root.is_dir():
        near = sorted(path.parent.parent.name for path in root.parent.glob("*/" + INFO)) if root.parent.is_dir() else []
        close = difflib.get_close_matches(root.name, near, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        beside = f" Datasets in {root.parent}: {', '.join(map(repr, near))}." if near else ""
        return f"there is no folder {root}.{hint}{beside}"
    inside = [path.relative_to(root).parent.parent for path in sorted(root.glob("*/" + INFO))[:3]]
    if inside:
        return f"{root} is a folder of datasets; choose one of them, e.g. {root / inside[0]}."
    content = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    return (
        f"{root} is not a LeRobotDataset {VERSION}: it has no {INFO} (it contains {content}). "
        "Pass the folder that contains `meta`, `data` and `videos`; convert other formats with LeRobot first."
    )
