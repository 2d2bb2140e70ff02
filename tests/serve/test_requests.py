"""Existing clients' keys become the policy's cameras, state and instruction; what is ambiguous is said, not guessed."""

import dataclasses

import numpy as np
import pytest

from vla.config import KeysConfig
from vla.errors import SpecError
from vla.serve.requests import read

NONE = KeysConfig()


def picture(value: int) -> np.ndarray:
    return np.full((32, 40, 3), value, np.uint8)


STATE = np.arange(7, dtype=np.float64)
FORMS = {
    "own": {"pixels": {"front": picture(1), "wrist": picture(2)}, "agent_pos": STATE, "prompt": "go"},
    "LIBERO": {
        "observation/image": picture(1),
        "observation/wrist_image": picture(2),
        "observation/state": STATE,
        "prompt": "go",
    },
    "DROID": {
        "observation/exterior_image_1_left": picture(1),
        "observation/wrist_image_left": picture(2),
        "observation/joint_position": STATE[:6],
        "observation/gripper_position": STATE[6],
        "prompt": b"go",
    },
    "OpenVLA": {"image": picture(1), "wrist_image": picture(2), "state": STATE, "instruction": "go"},
    "OpenVLA-OFT": {"full_image": picture(1), "left_wrist_image": picture(2), "state": STATE, "instruction": "go"},
    "nested, channels first": {
        "images": {"front": picture(1).transpose(2, 0, 1), "wrist": picture(2).transpose(2, 0, 1)},
        "state": STATE,
        "prompt": np.array("go"),
    },
    "floats": {
        "observation/image": picture(1).astype(np.float32) / 255,
        "observation/wrist_image": picture(2).astype(np.float64) / 255,
        "observation/state": list(STATE),
        "prompt": "go",
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_observation(robot, form):
    request = read(form, robot, 4, NONE)
    assert request.instruction == "go"
    pixels = request.observation["pixels"]
    np.testing.assert_array_equal(pixels["front"], picture(1))
    np.testing.assert_array_equal(pixels["wrist"], picture(2))
    np.testing.assert_array_equal(request.observation["agent_pos"], STATE.astype(np.float32))


def test_aloha_by_names_and_by_configuration(robot):
    aloha = {
        "images": {
            name: picture(i) for i, name in enumerate(["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"])
        },
        "state": STATE,
        "prompt": "go",
    }
    twin = dataclasses.replace(robot, cameras=("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"))
    found = read(aloha, twin, 4, NONE).observation["pixels"]
    assert [int(found[name].max()) for name in twin.cameras] == [0, 1, 2, 3]
    with pytest.raises(SpecError, match=r"no picture can be told to be camera 'wrist'.*--images wrist KEY"):
        read(aloha, robot, 4, KeysConfig(images={"front": "images/cam_low"}))
    keys = KeysConfig(images={"front": "images/cam_low", "wrist": "images/cam_right_wrist"}, state=("state",))
    found = read(aloha, robot, 4, keys).observation["pixels"]
    assert (int(found["front"].max()), int(found["wrist"].max())) == (1, 3)


def test_an_image_only_client_and_an_image_only_policy(robot):
    spec = dataclasses.replace(robot, cameras=("front",), state_names=())
    request = read({"image": picture(3), "instruction": "go", "unnorm_key": "bridge"}, spec, 4, NONE)
    assert set(request.observation) == {"pixels"} and request.unnorm_key == "bridge"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"observation/image": None},
            "no picture can be told to be camera 'front'; the request has 'observation/wrist",
        ),
        ({"observation/image": picture(1)[..., :2]}, "expected 3 colour channels"),
        ({"observation/image": picture(9).astype(np.float32)}, "must be in 0..1"),
        ({"observation/image": np.full((32, 32, 3), np.nan)}, "must be in 0..1"),
        ({"observation/second_image": picture(1)}, "no picture can be told to be camera 'front'"),
        ({"observation/state": None}, "must be numbers|not finite|expected 7"),
        ({"observation/state": STATE[:3]}, "state: expected 7 entries"),
        ({"observation/state": STATE * np.nan}, "not finite"),
        ({"observation/state": "up"}, "must be numbers"),
        ({"prompt": 7}, "'prompt' must be a text, got int"),
        ({"unnorm_key": 7}, "unnorm_key must be a text"),
        ({"vla/draft": np.zeros((3, 7))}, r"vla/draft must be an array of finite actions \[4, 7\], got shape \[3, 7\]"),
        ({"vla/draft": [[1.0], [2.0, 3.0]]}, r"vla/draft must be an array .* got list"),
        ({"prompt": "go " * 1000}, "'prompt' has 3000 characters; at most 1000"),
        ({"observation/state": [10**400] * 7}, "state must be numbers"),
        ({"observation/image": np.zeros((16, 0, 3))}, "no picture can be told to be camera 'front'"),
        ({"k" * 500: 1}, "keys have at most 200 characters"),
        ({"deep": {"er": {"still": {"more": {"end": 1}}}}}, "4 maps in each other"),
        ({"wide": dict.fromkeys(map(str, range(300)), 0)}, "at most 256 keys"),
        ({"vla/draft": np.zeros((4, 7)), "vla/committed": 4}, "committed must be between 0 and 3"),
    ],
)
def test_what_is_wrong_is_said(robot, change, message):
    with pytest.raises(SpecError, match=message):
        read(FORMS["LIBERO"] | change, robot, 4, NONE)


@pytest.mark.parametrize("values", [None, 3, [], "text", {}, {1: 2}, {"pixels": 3, "prompt": "go"}])
def test_what_is_no_request_is_refused(robot, values):
    with pytest.raises(SpecError):
        read(values, robot, 4, NONE)


def test_missing_keys_are_named(robot):
    without = {key: value for key, value in FORMS["LIBERO"].items() if key != "prompt"}
    with pytest.raises(SpecError, match="no instruction; it is expected under prompt or instruction"):
        read(without, robot, 4, NONE)
    without = {key: value for key, value in FORMS["LIBERO"].items() if key != "observation/state"}
    with pytest.raises(SpecError, match="no state; 7 entries"):
        read(without, robot, 4, NONE)
