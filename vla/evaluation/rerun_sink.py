"""Recordings of episodes for Rerun (https://rerun.io): cameras, state, actions and the entropy of tokens over time.

Owns: the contents and layout of the .rrd file of an episode, for rollouts and datasets. Rerun is an optional dependency
(170 MB), imported only for recordings. It does not know where episodes come from.

Entities: `cameras/<name>` (lossless images), `state`, `action` and `entropy` (one series per entry or token), and
`instruction`. Timelines: `step` (the control step) and `time` (in seconds).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from vla.errors import ConfigError
from vla.spec import Observation, RobotSpec

if TYPE_CHECKING:
    from vla.policy import Prediction

FOLDER, SUFFIX = "rerun", ".rrd"
_PLOTS = {"action": "action", "state": "state", "entropy": "entropy of the tokens (nats)"}


class EpisodeRecording:
    """The recording of an episode, in memory until it is saved.

    Args:
        robot: names of the cameras, state and action entries, and the control rate.
        instruction: the task.
        tokens: names of the action entries that an action's tokens encode; empty if unknown, or if tokens span several
            actions.
    Raises:
        ConfigError: Rerun is not installed.
    """

    def __init__(self, robot: RobotSpec, instruction: str, tokens: Sequence[str] = ()) -> None:
        self._rr = load_rerun()
        self._robot, self._instruction, self._tokens = robot, instruction, tokens
        self._images: list[tuple[int, dict[str, bytes]]] = []  # step, PNG file of each camera
        self._rows: dict[str, list[tuple[int, np.ndarray]]] = {entity: [] for entity in _PLOTS}  # step, values

    def observe(self, step: int, observation: Observation) -> None:
        """Record the observation before the action of `step`."""
        pixels = observation["pixels"]
        self._images.append((step, {camera: _png(pixels[camera]) for camera in self._robot.cameras}))
        if self._robot.state_dim:
            self._rows["state"].append((step, np.asarray(observation["agent_pos"])))

    def act(self, step: int, action: np.ndarray) -> None:
        """Record the action [D] executed in `step`."""
        self._rows["action"].append((step, np.asarray(action)))

    def execute(self, step: int, prediction: Prediction, executed: int) -> None:
        """Record the first `executed` actions of a prediction (a batch of one) from `step` on, with the entropies of
        their tokens or, without token names, the mean entropy of the chunk."""
        chunk, entropy = prediction.chunks[0], prediction.entropy[0]
        for k in range(executed):
            self.act(step + k, chunk[k])
            if self._tokens:
                self._rows["entropy"].append((step + k, entropy.reshape(-1, len(self._tokens))[k]))
        if not self._tokens:
            self._rows["entropy"].append((step, entropy.mean(keepdims=True)))

    def save(self, path: Path, title: str) -> None:
        """Write the recording. `title` is its name in Rerun's viewer."""
        rr = self._rr
        path.parent.mkdir(parents=True, exist_ok=True)
        with rr.RecordingStream("vla") as stream:
            stream.save(path, default_blueprint=self._layout())
            stream.send_recording_name(title)
            stream.log("instruction", rr.TextDocument(self._instruction), static=True)
            for camera in self._robot.cameras:
                files = [images[camera] for _, images in self._images]
                columns = rr.EncodedImage.columns(blob=files, media_type=["image/png"] * len(files))
                stream.send_columns(f"cameras/{camera}", self._times([step for step, _ in self._images]), columns)
            names = {
                "action": self._robot.action_names,
                "state": self._robot.state_names,
                "entropy": self._tokens or ["mean of the chunk"],
            }
            for entity, rows in self._rows.items():
                if rows:
                    values = np.array([row for _, row in rows], np.float64)
                    columns = rr.Scalars.columns(scalars=values.ravel()).partition([values.shape[1]] * len(rows))
                    stream.log(entity, rr.SeriesLines(names=names[entity]), static=True)
                    stream.send_columns(entity, self._times([step for step, _ in rows]), columns)

    def _times(self, steps: Sequence[int]) -> list[Any]:
        seconds = [step / self._robot.control_hz for step in steps]
        return [self._rr.TimeColumn("step", sequence=steps), self._rr.TimeColumn("time", duration=seconds)]

    def _layout(self) -> Any:
        """Cameras and the instruction on the left, plots on the right."""
        views = importlib.import_module("rerun.blueprint")
        cameras = [views.Spatial2DView(origin=f"cameras/{camera}", name=camera) for camera in self._robot.cameras]
        task = views.TextDocumentView(origin="instruction", name="instruction")
        plots = [
            views.TimeSeriesView(origin=entity, name=name) for entity, name in _PLOTS.items() if self._rows[entity]
        ]
        left = views.Vertical(*cameras, task, row_shares=[3] * len(cameras) + [1])
        right = views.Vertical(*plots)
        return views.Blueprint(views.Horizontal(left, right, column_shares=[2, 3]), collapse_panels=True)


def load_rerun() -> Any:
    """Import `rerun` in strict mode, which raises exceptions for invalid data. ConfigError if it is not installed."""
    try:
        rerun = importlib.import_module("rerun")
    except ImportError as error:
        raise ConfigError(
            f"--rerun needs rerun-sdk, which cannot be imported ({error}). Install it with `scripts/setup rerun` or "
            "`pip install '.[rerun]'` in the checkout of this package, or omit --rerun."
        ) from None
    rerun.set_strict_mode(True)
    return rerun


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
