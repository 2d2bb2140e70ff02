"""Conversion of requests to observations.

Owns: the mapping from request keys to a policy's cameras, state and instruction. Supported are the keys of openpi
(LIBERO, DROID and ALOHA), OpenVLA, OpenVLA-OFT and vla-eval, and `{"pixels": ..., "agent_pos": ..., "prompt": ...}`. It
does not know the wire protocols.

An image is assigned to the camera whose name is the last part of its key ("images/front": "front"). Then, if only one
camera and one image with "wrist" or "hand" in their names remain, they are matched; the same applies to cameras and
images without these words. All other assignments must be configured with `keys`. A batch of one observation is read as
that observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vla.config import KeysConfig
from vla.errors import SpecError
from vla.policy.session import Draft, LatentDraw
from vla.spec import Observation, RobotSpec
from vla.transforms.images import ImageFormat
from vla.transforms.prompt import text

_STATES = (
    ("agent_pos",),
    ("observation/state",),
    ("observation/joint_position", "observation/gripper_position"),
    ("state",),
    ("states",),
)
_PROMPTS = ("prompt", "instruction", "task", "language_instruction", "task_description")
_SMALLEST = 8  # minimum side of an image, in pixels
# Limits, far above the needs of real clients: errors list the keys, and a long instruction delays its batch.
_DEEPEST, _KEYS, _LONGEST_KEY, _LONGEST_PROMPT = 4, 256, 200, 1000


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for one action chunk.

    Attributes:
        draft: draft of this chunk, from the previous chunk of the client's episode; None at the start of an episode.
    """

    observation: Observation
    instruction: str
    unnorm_key: str | None = None
    draft: Draft | None = None


def read(values: Any, robot: RobotSpec, horizon: int, keys: KeysConfig, draft: Draft | None = None) -> Request:
    """Read a decoded request. SpecError if keys are missing or ambiguous, or values are invalid.

    Args:
        draft: the draft to use if the request has none.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"a request must be a map of keys and values, got {type(values).__name__}.")
    flat = dict(_flatten(values))
    observation: dict[str, Any] = {"pixels": _images(flat, robot, keys)}
    if robot.state_dim:
        observation["agent_pos"] = _state(flat, robot, keys)
    robot.check_observation(observation)
    unnorm_key = values.get("unnorm_key")
    if isinstance(unnorm_key, bytes):
        unnorm_key = unnorm_key.decode("utf-8", "replace")
    if unnorm_key is not None and not isinstance(unnorm_key, str):
        raise SpecError(f"unnorm_key must be a string, got {type(unnorm_key).__name__}.")
    sent = _draft(values, horizon, robot.action_dim)
    return Request(observation, _prompt(flat, keys), unnorm_key, draft if sent is None else sent)


def _flatten(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if len(tree) > _KEYS or len(path) >= _DEEPEST:
        raise SpecError(f"a request may have up to {_KEYS} keys per map and {_DEEPEST} levels of maps.")
    for key, value in tree.items():
        if len(str(key)) > _LONGEST_KEY:
            raise SpecError(f"keys may have up to {_LONGEST_KEY} characters.")
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, str(key)))
        else:
            yield "/".join((*path, str(key))), value


def _images(flat: dict[str, Any], robot: RobotSpec, keys: KeysConfig) -> dict[str, np.ndarray]:
    found = {key: array for key, value in flat.items() if (array := _array(value)) is not None}
    chosen: dict[str, str] = {}
    for camera in robot.cameras:
        named = _coloured_first(found, [key for key in found if key.rpartition("/")[2] == camera])
        if camera in keys.images:
            chosen[camera] = keys.images[camera]
        elif len(named) == 1:
            chosen[camera] = named[0]
    for hand in (False, True):
        cameras = [camera for camera in robot.cameras if camera not in chosen and of_hand(camera) == hand]
        rest = [key for key in found if key not in chosen.values() and of_hand(key) == hand]
        remaining = _coloured_first(found, rest)
        if len(cameras) == len(remaining) == 1:
            chosen[cameras[0]] = remaining[0]
        elif cameras:
            raise SpecError(
                f"no image can be assigned to camera {cameras[0]!r}; the images of the request are "
                f"{', '.join(map(repr, found)) or '(none; an image must be an array with three axes)'}. "
                + (_encoded(flat) or f"Assign one with `vla serve --images {cameras[0]} KEY`.")
            )
    missing = [key for key in chosen.values() if key not in found]
    if missing:
        has = ", ".join(map(repr, found)) or "none"
        raise SpecError(f"the request has no image {missing[0]!r}; its images are {has}. {_encoded(flat)}".rstrip())
    return {camera: ImageFormat.of(found[key], key).convert(found[key], key) for camera, key in chosen.items()}


def _coloured_first(found: dict[str, np.ndarray], keys: list[str]) -> list[str]:
    """The keys of arrays with three axes. If there are none, all keys: their arrays may be greyscale images."""
    return [key for key in keys if found[key].ndim > 2] or keys


def _array(value: Any) -> np.ndarray | None:
    """`value` as an array if it may be an image or a batch of one image; None otherwise."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        try:
            value = np.asarray(value)
        except ValueError:  # ragged
            return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return None
    if value.ndim == 4 and len(value) == 1:
        value = value[0]
    grey = value.ndim == 2 and min(value.shape) >= _SMALLEST
    return value if value.size and (value.ndim in (3, 4) or grey) else None


def _encoded(flat: dict[str, Any]) -> str:
    """The remedy if an image was sent as a file; "" otherwise."""
    for key, value in flat.items():
        if isinstance(value, bytes | str) and value[:4] in (
            b"\xff\xd8\xff\xe0",
            b"\xff\xd8\xff\xe1",
            b"\x89PNG",
            "/9j/",
            "iVBO",
        ):
            return f"{key!r} is a JPEG or PNG file: send its pixels, as an array [height, width, 3] of uint8."
    return ""


def of_hand(name: str) -> bool:
    return "wrist" in name or "hand" in name


def _state(flat: dict[str, Any], robot: RobotSpec, keys: KeysConfig) -> np.ndarray:
    for names in (keys.state,) if keys.state else _STATES:
        if all(name in flat for name in names):
            try:
                return np.concatenate([np.ravel(np.asarray(flat[name], np.float32)) for name in names])
            except (TypeError, ValueError, OverflowError):
                raise SpecError(f"the state {', '.join(names)} must be numbers.") from None
    raise SpecError(
        f"the request has no state; {robot.state_dim} numbers ({', '.join(robot.state_names)}) are expected under "
        f"{' or '.join(' + '.join(names) for names in ((keys.state,) if keys.state else _STATES))}."
    )


def _prompt(flat: dict[str, Any], keys: KeysConfig) -> str:
    for name in (keys.prompt,) if keys.prompt else _PROMPTS:
        if name in flat:
            value = flat[name]
            prompt = text(value[0] if isinstance(value, list | tuple) and len(value) == 1 else value)
            if prompt is None:
                raise SpecError(f"{name!r} must be a string, got {type(value).__name__}.")
            if len(prompt) > _LONGEST_PROMPT:
                raise SpecError(f"{name!r} has {len(prompt)} characters; the maximum is {_LONGEST_PROMPT}.")
            return prompt
    raise SpecError(f"the request has no instruction; it is expected under {keys.prompt or ' or '.join(_PROMPTS)}.")


def _draft(values: Mapping[Any, Any], horizon: int, action_dim: int) -> Draft | None:
    """The draft in a request: actions in the robot's units ("vla/draft"), the length of the action prefix
    ("vla/committed"), its acceptance threshold ("vla/trust"), and seed, chunk and codes of the latent
    ("vla/latent")."""
    draft, committed, trust = (values.get(f"vla/{name}", 0) for name in ("draft", "committed", "trust"))
    latent = _latent(values["vla/latent"]) if "vla/latent" in values else None
    if "vla/draft" not in values:
        return None if latent is None else Draft(np.empty((0, action_dim), np.float32), latent=latent)
    expected = (horizon, action_dim)
    if not isinstance(draft, np.ndarray) or draft.shape != expected or not np.isfinite(draft).all():
        got = f"shape {list(draft.shape)}" if isinstance(draft, np.ndarray) else type(draft).__name__
        raise SpecError(f"vla/draft must be a finite array of shape {list(expected)}, got {got}.")
    if not isinstance(committed, int | np.integer) or not 0 <= committed < horizon:
        raise SpecError(f"vla/committed must be between 0 and {horizon - 1}, got {committed!r}.")
    if not isinstance(trust, int | float | np.number) or not 0 <= trust <= 1:
        raise SpecError(f"vla/trust must be between 0 and 1, got {trust!r}.")
    steps = draft.astype(np.float32)
    return Draft(steps, latent=latent or LatentDraw()).given(steps[:committed], float(trust))


def _latent(values: Any) -> LatentDraw:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    integers = isinstance(values, list) and all(isinstance(value, int) and 0 <= value < 2**32 for value in values)
    if not integers or not 2 <= len(values) <= 2 + _LONGEST_PROMPT:
        raise SpecError(
            f"vla/latent must be a list of a seed, a chunk index and codes, each from 0 to {2**32 - 1}, got "
            f"{values!r:.100}."
        )
    return LatentDraw(values[0], values[1], tuple(values[2:]))
