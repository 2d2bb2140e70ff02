"""vla-eval's protocol: messages of its own client, chunks per connection and episode, and errors."""

import contextlib
import dataclasses
import io
from pathlib import Path

import msgpack
import numpy as np
import pytest
import requests
import websockets
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from PIL import Image
from websockets.sync.client import connect

from tests.serving.test_server import VALUES
from vla.config import KeysConfig
from vla.policy import Policy
from vla.serving.protocols.vla_eval import (
    _action_spec,
    _encode,
    _observation_params,
    _observation_spec,
    pack,
)
from vla.serving.server import settings
from vla.spec import RobotSpec

pytestmark = pytest.mark.realtime

GOLDEN = msgpack.unpackb((Path(__file__).parent / "vla_eval_0_8_0.msgpack").read_bytes())
HELLO = {"harness_version": "0.8.0", "protocol_version": 1}
STATE = np.zeros(7)


class Client:
    """vla-eval's client without vla-eval: messages with increasing `seq`."""

    def __init__(self, socket) -> None:
        self.socket, self.seq = socket, 0

    def send(self, kind: str, payload) -> None:
        self.seq += 1
        self.socket.send(pack(kind, payload, self.seq))

    def receive(self) -> dict:
        return msgpack.unpackb(self.socket.recv(timeout=20), strict_map_key=False)

    def act(self, payload) -> np.ndarray:
        self.send("observation", payload)
        reply = self.receive()
        assert (reply["type"], reply["seq"]) == ("action", self.seq), reply
        return array(reply["payload"]["actions"])

    def error(self, payload) -> str:
        self.send("observation", payload)
        reply = self.receive()
        assert (reply["type"], reply["seq"]) == ("error", self.seq), reply
        return reply["payload"]["error"]


@contextlib.contextmanager
def session(served):
    with connect(served.ws + "/vla-eval", compression=None, max_size=None) as socket:
        client = Client(socket)
        client.send("hello", HELLO)
        assert client.receive()["type"] == "hello"
        client.send("episode_start", {"task": {"name": "go"}})
        yield client


def array(entry: dict) -> np.ndarray:
    assert entry["__ndarray__"] is True
    return np.frombuffer(entry["data"], entry["dtype"]).reshape(entry["shape"])


def encoded(image: np.ndarray, **change) -> dict:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return {"__image__": True, "format": "png", "data": file.getvalue(), "shape": list(image.shape)} | change


def payload(observation: dict, task: str = "go", **change) -> dict:
    images = {"agentview": encoded(observation["pixels"]["front"]), "wrist": encoded(observation["pixels"]["wrist"])}
    return {"images": images, "states": _encode(observation["agent_pos"]), "task_description": task} | change


def test_recorded_messages_of_the_stock_client(serving, tiny):
    """PNG, JPEG and raw images. Actions equal those of `Policy.act`, and replies have the bytes of vla-eval's
    server."""
    policy = Policy(*tiny, n_action_steps=1)
    policy.reset("go")
    replies = []
    with serving(policy=policy) as served, connect(served.ws + "/vla-eval") as socket:
        for frame in GOLDEN["client"]:
            socket.send(frame)
            if msgpack.unpackb(frame)["type"] in ("hello", "observation"):
                replies.append(msgpack.unpackb(socket.recv(timeout=20)))
    hello, *actions = replies
    assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 1, 1)
    assert [reply["seq"] for reply in actions] == [3, 4, 5]
    for reply, images in zip(actions, GOLDEN["images"], strict=True):
        front, wrist = (
            np.frombuffer(data, np.uint8).reshape(shape) for shape, data in (images["agentview"], images["wrist"])
        )
        observation = {"pixels": {"front": front, "wrist": wrist}, "agent_pos": np.float32(np.arange(7) / 8)}
        np.testing.assert_array_equal(array(reply["payload"]["actions"]), policy.act(observation))
    stock = GOLDEN["server"][1]
    ours = pack("action", {"actions": _encode(np.float32([0.25, -1, 0, 0.5, 0, 0, 1]))}, 3)
    assert ours[:-8] == stock[:-8]  # the last 8 bytes are the time


def test_chunks_stay_with_their_connection_and_episode(serving, policy, observations, monkeypatch):
    seen = observations(6)
    expected = {}
    for name, steps in (("a", seen[:6]), ("b", seen[::-1])):
        policy.reset(name)
        expected[name] = [policy.act(observation) for observation in steps]
    policy.reset("b")
    fresh = policy.act(seen[3])
    asked, real = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda *arguments: (asked.append(arguments[1]), real(*arguments))[1])
    monkeypatch.setattr(policy, "for_key", lambda key: policy)
    with serving() as served, session(served) as a, session(served) as b:
        for step in range(6):  # alternating: 2 chunks of 4 actions for each connection
            np.testing.assert_array_equal(a.act(payload(seen[step], "a")), expected["a"][step])
            np.testing.assert_array_equal(b.act(payload(seen[5 - step], "b")), expected["b"][step])
        assert len(asked) == 4
        b.send("episode_end", {"metrics": {"success": False}, "steps": 6, "elapsed_sec": 1.0})
        b.send("episode_start", {"task": {"name": "b"}})
        np.testing.assert_array_equal(b.act(payload(seen[3], "b")), fresh)
        a.act(payload(seen[0], "a"))
        a.act(payload(seen[0], "another task"))  # not the next action for the previous task
        assert asked[-2:] == [["b"], ["another task"]]
        text = requests.get(served.http + "/metrics", timeout=20).text
        assert 'vla_request_seconds_count{protocol="vla-eval"} 15.0' in text
        assert "vla_inference_seconds_count 6.0" in text


def test_errors_name_the_value_and_the_connection_stays_open(serving, observations):
    (observation,) = observations(1)
    good = payload(observation)
    front = observation["pixels"]["front"]
    grey = {"__image__": True, "format": "raw", "data": b"", "dtype": "|u1"}

    def images(**change) -> dict:
        return good | {"images": good["images"] | change}

    with serving(max_request_mb=1) as served, session(served) as client:
        for bad, words in (
            (good | {"images": {"wrist": good["images"]["wrist"]}}, "no image can be assigned to camera 'front'"),
            (images(second=encoded(front)), "no image can be assigned to camera 'front'"),
            (good | {"states": _encode(np.zeros(8))}, "state: expected 7 entries"),
            ({key: good[key] for key in ("images", "task_description")}, "the request has no state"),
            (good | {"task_description": 7}, "'task_description' must be a string, got int"),
            (images(agentview=encoded(front, data=b"\x89PNG nonsense")), "'images/agentview' is not a valid png file"),
            (images(agentview=encoded(front, format="jpeg")), "'images/agentview' is not a valid jpeg file"),
            (images(agentview=encoded(front, format="gif")), "must be png, jpeg or raw, got 'gif'"),
            (images(agentview=encoded(front, shape=[96, 95, 3])), "declared as [96, 95, 3], but it is [96, 96, 3]"),
            (images(agentview=encoded(front, shape=[96, 96])), "[height, width, channels], got [96, 96]"),
            (images(agentview=encoded(front, shape=[9000, 9000, 3])), "231.8 MB of pixels; the limit is 1 MB"),
            (images(agentview=grey | {"shape": [9, 9, 3]}), "has 243 bytes, got 0"),
        ):
            assert words in client.error(bad)
        client.send("dance", {})
        assert client.receive()["payload"]["error"] == "unknown message type 'dance'."
        for frame, words in (
            (b"garbage", "not valid msgpack"),
            ("text", "a message is binary (msgpack), got text"),
            (msgpack.packb([1]), "a message must be a map, got list"),
            (msgpack.packb({"type": "observation", "payload": 3, "seq": 1}), "'payload' as mapping, got 3"),
            (pack("observation", {"states": _encode(STATE) | {"dtype": "|O"}}, 1), "must be numeric, got dtype '|O'"),
        ):
            client.socket.send(frame)
            reply = client.receive()
            assert (reply["type"], reply["seq"]) == ("error", 0) and words in reply["payload"]["error"], reply
        assert client.act(good).shape == (7,)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (pack("hello", HELLO | {"protocol_version": 2}, 1), "protocol_version 2 is not supported, only 1"),
        (pack("hello", {}, 1), "protocol_version None is not supported"),
        (pack("observation", {}, 1), "the first message must be a hello, got 'observation'"),
        (b"garbage", "not valid msgpack"),
    ],
    ids=["version 2", "no version", "no hello", "garbage"],
)
def test_clients_of_other_protocols_are_disconnected_with_a_reason(serving, frame, reason):
    with serving() as served, connect(served.ws + "/vla-eval") as socket:
        socket.send(frame)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            socket.recv(timeout=20)
        assert closed.value.rcvd.code == 1002 and reason in closed.value.rcvd.reason


def test_the_error_at_another_address_names_the_right_one(serving, caplog):
    with serving() as served, connect(served.ws) as socket:
        socket.recv(timeout=20)  # openpi's server sends the first message
        socket.send(GOLDEN["client"][0])
        assert "its address ends with /vla-eval" in socket.recv(timeout=20)


def test_http_endpoints(serving):
    with serving(max_batch=8) as served:
        assert requests.get(served.http + "/health", timeout=20).json() == {"status": "ok"}
        assert requests.get(served.http + "/config", timeout=20).json()["config"] == {"max_batch_size": 8}
        changed = requests.get(served.http + "/config?max_batch_size=1", timeout=20)
        assert changed.status_code == 422 and "--max-batch" in changed.json()["errors"][0]


def test_a_client_may_be_silent_for_a_minute(serving):
    """vla-eval's client does not answer pings while it resets LIBERO."""
    with serving() as served:
        assert settings(served.app, served.app.config).ws_ping_timeout >= 300


def test_the_key_may_be_in_the_address(serving):
    with serving(key="sesame") as served:
        address = f"ws://any:{{}}@127.0.0.1:{served.port}/vla-eval"
        with connect(address.format("sesame")) as socket:
            socket.send(GOLDEN["client"][0])
            assert msgpack.unpackb(socket.recv(timeout=20))["type"] == "hello"
        with pytest.raises(websockets.InvalidStatus):
            connect(address.format("simsalabim"))


LIBERO = RobotSpec(
    cameras=("agentview", "wrist"),
    state_names=("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right"),
    action_names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    action_space="ee_delta",
    gripper_index=6,
    gripper_open=-1.0,
    gripper_closed=1.0,
)


@pytest.mark.parametrize(
    ("change", "formats"),
    [
        ({}, {"position": "delta_xyz", "rotation": "axis_angle", "gripper": "binary_close_positive"}),
        ({"gripper_open": 1.0, "gripper_closed": -1.0}, {"gripper": "binary_close_negative"}),
        ({"gripper_open": 0.0, "gripper_closed": 1.0}, {"gripper": "binary_close_01"}),
        ({"gripper_closed": 0.04}, {"gripper": "raw"}),
        ({"action_space": "ee_position"}, {"position": "absolute_xyz"}),
        ({"action_names": ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")}, {"rotation": "euler_xyz"}),
        ({"action_space": "joint_position"}, {"joints": "joint_positions", "gripper": "binary_close_positive"}),
        ({"gripper_index": 0}, {"actions": "raw"}),
        ({"action_space": "unspecified"}, {"actions": "raw"}),
    ],
)
def test_the_action_spec_follows_from_the_robot(change, formats):
    spec = {part["name"]: part for part in _action_spec(dataclasses.replace(LIBERO, **change))}
    assert {name: spec[name]["format"] for name in formats} == formats
    assert sum(part["dims"] for part in spec.values()) == 7


def test_hello_of_a_libero_policy():
    parts = {part["name"]: (part["dims"], part["format"]) for part in _observation_spec(LIBERO, ["agentview", "wrist"])}
    assert parts == {
        "agentview": (0, "rgb_hwc_uint8"),
        "wrist": (0, "rgb_hwc_uint8"),
        "state": (8, "eef_pos3_axisangle3_gripper2"),
        "language": (0, "language"),
    }
    needed = {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
    assert _observation_params(LIBERO) == needed
    blind = dataclasses.replace(LIBERO, cameras=("agentview",), state_names=())
    assert _observation_params(blind) == {}


def test_hello_contains_the_clients_camera_names(serving):
    keys = KeysConfig(images={"front": "images/agentview"})
    with serving(keys=keys) as served, connect(served.ws + "/vla-eval") as socket:
        client = Client(socket)
        client.send("hello", HELLO)
        hello = client.receive()["payload"]
        assert list(hello["observation_spec"]) == ["agentview", "wrist", "state", "language"]
        assert hello["observation_params"] == {"send_wrist_image": True, "send_state": True}


@hypothesis_settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=VALUES)
def test_every_observation_is_answered(client, values):
    client.socket.send(msgpack.packb({"type": "observation", "payload": values, "seq": 7}, default=str))
    assert client.receive()["type"] == "error"


@pytest.fixture
def client(serving):
    with serving() as served, session(served) as client:
        yield client
