"""Requests of existing clients are mapped to cameras, state and instruction; ambiguous requests are rejected."""

import dataclasses

import numpy as np
import pytest

from vla.config import KeysConfig
from vla.errors import SpecError
from vla.policy.session import LatentDraw
from vla.serving.requests import read

NONE = KeysConfig()


def rgb(value: int) -> np.ndarray:
    return np.full((32, 40, 3), value, np.uint8)


STATE = np.arange(7, dtype=np.float64)
FORMS = {
    "own": {"pixels": {"front": rgb(1), "wrist": rgb(2)}, "agent_pos": STATE, "prompt": "go"},
    "LIBERO": {
        "observation/image": rgb(1),
        "observation/wrist_image": rgb(2),
        "observation/state": STATE,
        "prompt": "go",
    },
    "DROID": {
        "observation/exterior_image_1_left": rgb(1),
        "observation/wrist_image_left": rgb(2),
        "observation/joint_position": STATE[:6],
        "observation/gripper_position": STATE[6],
        "prompt": b"go",
    },
    "OpenVLA": {"image": rgb(1), "wrist_image": rgb(2), "state": STATE, "instruction": "go"},
    "OpenVLA-OFT": {"full_image": rgb(1), "left_wrist_image": rgb(2), "state": STATE, "instruction": "go"},
    "nested, channels first": {
        "images": {"front": rgb(1).transpose(2, 0, 1), "wrist": rgb(2).transpose(2, 0, 1)},
        "state": STATE,
        "prompt": np.array("go"),
    },
    "floats": {
        "observation/image": rgb(1).astype(np.float32) / 255,
        "observation/wrist_image": rgb(2).astype(np.float64) / 255,
        "observation/state": list(STATE),
        "prompt": "go",
    },
}


def grey(value: int) -> np.ndarray:
    return rgb(value)[..., 0]


#: Other forms in which clients send the uint8 image rgb(1).
IMAGES = {
    "channels first": rgb(1).transpose(2, 0, 1),
    "a batch of one": rgb(1)[None],
    "a batch of one, channels first": rgb(1).transpose(2, 0, 1)[None],
    "float32": rgb(1).astype(np.float32) / 255,
    "float64, a batch of one": rgb(1)[None] / 255,
    "half": (rgb(1) / 255).astype(np.float16),
    "big-endian floats": (rgb(1) / 255).astype(">f4"),
    "alpha": np.concatenate([rgb(1), rgb(9)[..., :1]], axis=-1),
    "grey": grey(1),
    "grey, one channel": grey(1)[..., None],
    "grey, channels first": grey(1)[None],
    "grey floats": grey(1) / 255,
    "int64": rgb(1).astype(np.int64),
    "nested lists": rgb(1).tolist(),
    "nested lists of floats": (rgb(1) / 255).tolist(),
    "read-only, not contiguous": np.broadcast_to(rgb(1)[:, ::-1], (32, 40, 3))[:, ::-1],
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("key", ["image", "front", "observation/image"])
def test_all_forms_of_an_image_are_equal(robot, image, key):
    pixels = read(FORMS["own"] | {"pixels": {"wrist": rgb(2)}, key: image}, robot, 4, NONE).observation["pixels"]
    np.testing.assert_array_equal(pixels["front"], rgb(1))
    assert pixels["front"].dtype == np.uint8 and pixels["front"].flags.c_contiguous


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"agent_pos": np.arange(7)}, None),
        ({"agent_pos": STATE[None]}, None),
        ({"agent_pos": [int(value) for value in STATE]}, None),
        ({"agent_pos": STATE.astype(np.float16)}, None),
        ({"prompt": b"go"}, None),
        ({"prompt": ["go"]}, None),
        ({"prompt": np.array("go")}, None),
        ({"unnorm_key": b"demo"}, "demo"),
        (
            {"unnorm_key": "demo", "depth": np.zeros((32, 40)), "extra": {"nested": [1, 2]}, "jacobian": np.eye(9)},
            "demo",
        ),
    ],
)
def test_all_forms_of_state_and_prompt_are_equal(robot, change, field):
    request = read(FORMS["own"] | change, robot, 4, NONE)
    np.testing.assert_array_equal(request.observation["agent_pos"], STATE.astype(np.float32))
    assert request.observation["agent_pos"].dtype == np.float32
    assert (request.instruction, request.unnorm_key) == ("go", field)
    np.testing.assert_array_equal(request.observation["pixels"]["front"], rgb(1))


def test_a_draft_with_numpy_scalars(robot):
    draft = {"vla/draft": np.zeros((4, 7)), "vla/committed": np.int64(2), "vla/trust": np.float32(0.5)}
    read_draft = read(FORMS["own"] | draft, robot, 4, NONE).draft
    assert (len(read_draft.prefix), read_draft.threshold) == (2, 0.5) and type(read_draft.threshold) is float


def test_a_latent_without_a_draft(robot):
    assert read(FORMS["own"] | {"vla/latent": [3, 1, 5]}, robot, 4, NONE).draft.latent == LatentDraw(3, 1, (5,))
    for wrong in ([3], [3, -1], "3", [3, 0.5]):
        with pytest.raises(SpecError, match="vla/latent must be a list of a seed, a chunk index"):
            read(FORMS["own"] | {"vla/latent": wrong}, robot, 4, NONE)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_forms_of_a_request_are_equal(robot, form):
    request = read(form, robot, 4, NONE)
    assert request.instruction == "go"
    pixels = request.observation["pixels"]
    np.testing.assert_array_equal(pixels["front"], rgb(1))
    np.testing.assert_array_equal(pixels["wrist"], rgb(2))
    np.testing.assert_array_equal(request.observation["agent_pos"], STATE.astype(np.float32))


def test_aloha_by_names_and_by_configuration(robot):
    aloha = {
        "images": {name: rgb(i) for i, name in enumerate(["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"])},
        "state": STATE,
        "prompt": "go",
    }
    twin = dataclasses.replace(robot, cameras=("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"))
    found = read(aloha, twin, 4, NONE).observation["pixels"]
    assert [int(found[name].max()) for name in twin.cameras] == [0, 1, 2, 3]
    with pytest.raises(SpecError, match=r"no image can be assigned to camera 'wrist'.*--images wrist KEY"):
        read(aloha, robot, 4, KeysConfig(images={"front": "images/cam_low"}))
    keys = KeysConfig(images={"front": "images/cam_low", "wrist": "images/cam_right_wrist"}, state=("state",))
    found = read(aloha, robot, 4, keys).observation["pixels"]
    assert (int(found["front"].max()), int(found["wrist"].max())) == (1, 3)


def test_an_image_only_client_and_an_image_only_policy(robot):
    spec = dataclasses.replace(robot, cameras=("front",), state_names=())
    request = read({"image": rgb(3), "instruction": "go", "unnorm_key": "bridge"}, spec, 4, NONE)
    assert set(request.observation) == {"pixels"} and request.unnorm_key == "bridge"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"observation/image": None},
            "no image can be assigned to camera 'front'; the images of the request are 'observation/wrist",
        ),
        ({"observation/image": rgb(1)[..., :2]}, "expected 3 colour channels"),
        ({"observation/image": rgb(9).astype(np.float32)}, "must be in 0..1"),
        ({"observation/image": np.full((32, 32, 3), np.nan)}, "must be in 0..1"),
        ({"observation/image": np.stack([rgb(1)] * 2)}, "expected an image"),
        ({"observation/image": rgb(1).astype(np.uint16)}, "expected uint8"),
        ({"observation/image": rgb(1).astype(np.int64) - 2}, "expected uint8|must be in 0..255"),
        ({"observation/image": rgb(1)[:4]}, "too small|expected 3 colour channels"),
        ({"observation/image": [[[1, 2], [3]]]}, "no image can be assigned to camera 'front'"),
        ({"observation/image": b"\xff\xd8\xff\xe0..."}, "'observation/image' is a JPEG or PNG file: send its pixels"),
        ({"observation/image": "iVBORw0KGgo"}, "'observation/image' is a JPEG or PNG file: send its pixels"),
        ({"observation/state": np.stack([STATE] * 2)}, r"expected 7 entries .*got shape \(14,\)"),
        ({"prompt": ["go", "stop"]}, "'prompt' must be a string, got list"),
        ({"vla/draft": np.zeros((4, 7)), "vla/trust": np.float32(np.nan)}, "trust must be between 0 and 1"),
        ({"observation/second_image": rgb(1)}, "no image can be assigned to camera 'front'"),
        ({"observation/state": None}, "must be numbers|not finite|expected 7"),
        ({"observation/state": STATE[:3]}, "state: expected 7 entries"),
        ({"observation/state": STATE * np.nan}, "not finite"),
        ({"observation/state": "up"}, "must be numbers"),
        ({"prompt": 7}, "'prompt' must be a string, got int"),
        ({"unnorm_key": 7}, "unnorm_key must be a string"),
        ({"vla/draft": np.zeros((3, 7))}, r"vla/draft must be a finite array of shape \[4, 7\], got shape \[3, 7\]"),
        ({"vla/draft": [[1.0], [2.0, 3.0]]}, r"vla/draft must be a finite array .* got list"),
        ({"prompt": "go " * 1000}, "'prompt' has 3000 characters; the maximum is 1000"),
        ({"observation/state": [10**400] * 7}, "state must be numbers"),
        ({"observation/image": np.zeros((16, 0, 3))}, "no image can be assigned to camera 'front'"),
        ({"k" * 500: 1}, "keys may have up to 200 characters"),
        ({"deep": {"er": {"still": {"more": {"end": 1}}}}}, "4 levels of maps"),
        ({"wide": dict.fromkeys(map(str, range(300)), 0)}, "up to 256 keys"),
        ({"vla/draft": np.zeros((4, 7)), "vla/committed": 4}, "committed must be between 0 and 3"),
    ],
)
def test_invalid_values_are_named(robot, change, message):
    with pytest.raises(SpecError, match=message):
        read(FORMS["LIBERO"] | change, robot, 4, NONE)


@pytest.mark.parametrize("values", [None, 3, [], "text", {}, {1: 2}, {"pixels": 3, "prompt": "go"}])
def test_invalid_requests_are_rejected(robot, values):
    with pytest.raises(SpecError):
        read(values, robot, 4, NONE)


def test_missing_keys_are_named(robot):
    without = {key: value for key, value in FORMS["LIBERO"].items() if key != "prompt"}
    with pytest.raises(SpecError, match="no instruction; it is expected under prompt or instruction"):
        read(without, robot, 4, NONE)
    without = {key: value for key, value in FORMS["LIBERO"].items() if key != "observation/state"}
    with pytest.raises(SpecError, match="no state; 7 numbers"):
        read(without, robot, 4, NONE)
