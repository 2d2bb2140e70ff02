"""The server with existing clients: responses, errors, limits, and independence of clients from each other."""

import base64
import concurrent.futures
import contextlib
import json
import signal
import socket
import subprocess
import threading
import time

import json_numpy
import msgpack
import numpy as np
import pytest
import requests
import websockets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from vla.policy import checkpoint
from vla.serving import wire

pytestmark = pytest.mark.realtime


def libero(observation: dict, prompt: str = "go") -> dict:
    return {
        "observation/image": observation["pixels"]["front"],
        "observation/wrist_image": observation["pixels"]["wrist"],
        "observation/state": observation["agent_pos"],
        "prompt": prompt,
    }


def openvla(observation: dict, image: str = "image") -> dict:
    pixels = observation["pixels"]
    return {image: pixels["front"], "wrist": pixels["wrist"], "state": observation["agent_pos"], "instruction": "go"}


def act(url: str, values, **options) -> requests.Response:
    body = values if isinstance(values, bytes) else json_numpy.dumps(values).encode()
    return requests.post(url + "/act", data=body, headers={"Content-Type": "application/json"}, timeout=20, **options)


def ask(socket, values) -> dict:
    socket.send(wire.to_msgpack(values))
    return wire.from_msgpack(socket.recv(timeout=20))


def until(happens) -> None:
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_openvlas_clients(serving, observations):
    """One action for "image", a list of actions for "full_image", with both encodings."""
    (observation,) = observations(1)
    with serving() as served:
        chunk = served.policy.predict_chunk(observation, "go")
        action = json_numpy.loads(act(served.http, openvla(observation)).text)
        assert action.dtype == np.float64
        np.testing.assert_array_equal(action, chunk[0])
        actions = json_numpy.loads(act(served.http, openvla(observation, "full_image")).text)
        assert isinstance(actions, list)
        np.testing.assert_array_equal(np.stack(actions), chunk)
        encoded = act(served.http, json.dumps({"encoded": json_numpy.dumps(openvla(observation))}).encode()).json()
        np.testing.assert_array_equal(json_numpy.loads(encoded), chunk[0])
        keyed = act(served.http, openvla(observation) | {"unnorm_key": "demo"})
        np.testing.assert_array_equal(json_numpy.loads(keyed.text), chunk[0])


def test_openpis_clients(serving, observations):
    with serving() as served, connect(served.ws, compression=None, max_size=None) as client:
        hello = msgpack.unpackb(client.recv())  # the server sends the first message
        assert hello["robot"]["cameras"] == ["front", "wrist"] and hello["unnorm_keys"] == ["demo"]
        for number, observation in enumerate(observations(3)):
            reply = ask(client, libero(observation))
            np.testing.assert_array_equal(reply["actions"], served.policy.predict_chunk(observation, "go"))
            assert reply["actions"].dtype == np.float32 and reply["policy_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in reply["server_timing"]) == (number > 0)
            # openpi's broker slices each array of a reply along its first axis, so there must be no other arrays.
            assert [name for name, value in reply.items() if isinstance(value, np.ndarray)] == ["actions"]


def test_openvlas_clients_receive_their_error_and_others_a_reason(serving, observations):
    (observation,) = observations(1)
    blind = {"instruction": "go"}
    with serving() as served:
        stock = act(served.http, blind)
        assert (stock.status_code, stock.json()) == (200, "error")
        for values, words in (
            (blind, "no image can be assigned to camera 'front'"),
            (openvla(observation) | {"state": np.zeros(3)}, "state: expected 7 entries"),
            (openvla(observation) | {"unnorm_key": "brigde"}, "unknown unnorm_key 'brigde'"),
            (b"{", "not valid JSON"),
            (b"\xff\xfe", "not valid JSON"),
            (b'{"encoded": 3}', "not valid JSON"),
        ):
            plain = act(served.http, values, params={"errors": "plain"})
            assert plain.status_code == 400 and words in plain.json()["error"], plain.text
            assert "Traceback" not in plain.text and ".py" not in plain.text


def test_openpis_clients_receive_their_error_and_others_a_reason(serving, observations):
    (observation,) = observations(1)
    with serving() as served:
        with connect(served.ws) as client:
            client.recv()
            client.send(wire.to_msgpack({"prompt": "go"}))
            message = client.recv()
            assert isinstance(message, str) and "camera 'front'" in message and "Traceback" not in message
            with pytest.raises(websockets.ConnectionClosed) as closed:
                client.recv()
            assert closed.value.rcvd.code == 1011
        with connect(served.ws + "/any/path?errors=plain") as client:
            client.recv()
            for bad in ({"prompt": "go"}, [1], 7, libero(observation) | {"observation/state": np.full(7, np.nan)}):
                assert set(ask(client, bad)) == {"error"}
            client.send("text")
            assert "binary" in wire.from_msgpack(client.recv())["error"]
            assert "actions" in ask(client, libero(observation))


def test_every_kind_of_rejection_is_logged(serving, observations, caplog, monkeypatch):
    """With client, address and reason, also for OpenVLA's clients, which receive only "error"."""
    (observation,) = observations(1)
    with serving(key="sesame", max_request_mb=0.5) as served:
        key = {"Authorization": "Api-Key sesame"}

        def post(values, path="/act", headers=key):
            body = values if isinstance(values, bytes) else json_numpy.dumps(values).encode()
            return requests.post(served.http + path, data=body, headers=headers, timeout=20)

        def refused(*words: str) -> None:
            until(lambda: caplog.messages)
            (line,) = caplog.messages
            assert line.startswith("rejected: ") and " from 127.0.0.1: " in line
            assert all(word in line for word in words), line
            caplog.clear()

        assert post({"instruction": "go"}).text == '"error"'
        refused("POST /act", "camera 'front'")
        post(openvla(observation) | {"unnorm_key": "brigde"})
        refused("POST /act", "unknown unnorm_key 'brigde'")
        post(b"{")
        refused("POST /act", "not valid JSON")
        post(bytes(2**20))
        refused("POST /act", "larger than 0.5 MB")
        assert post({}, headers={}).status_code == 401
        refused("POST /act", "the API key is missing or wrong")
        assert post({}, "/predict").status_code == 404
        refused("POST /predict", "Not Found", "POST /act")
        assert requests.get(served.http + "/act", timeout=20).status_code == 405
        refused("GET /act", "Method Not Allowed")
        with pytest.raises(websockets.InvalidStatus):
            connect(served.ws)
        refused("websocket /", "the API key is missing or wrong")
        with connect(served.ws, additional_headers=key) as client:
            client.recv()
            client.send(wire.to_msgpack({"prompt": "go"}))
            client.recv()
        refused("websocket /", "camera 'front'")
        with connect(served.ws, additional_headers=key) as client:
            client.recv()
            with contextlib.suppress(websockets.ConnectionClosed):
                client.send(bytes(2**20))
                client.recv()
        refused("websocket /", "larger than 0.5 MB")
        monkeypatch.setattr(served.policy, "predict", lambda *_: 1 / 0)
        served.app._batcher._by_key = {"demo": served.policy}
        assert post(openvla(observation)).text == '"error"'
        until(lambda: len(caplog.records) == 2)
        assert "ZeroDivisionError" in caplog.messages[0] and caplog.records[1].exc_info
        caplog.clear()
        for _ in range(5):
            post(openvla(observation))
        assert caplog.messages == []  # already logged


def test_an_error_of_the_policy_fails_only_its_request(serving, observations, monkeypatch):
    (observation,) = observations(1)
    with serving() as served:
        real = served.policy.predict

        def moody(observations, instructions, memories):
            if "explode" in instructions:
                raise RuntimeError("secret/path.py is broken")
            return real(observations, instructions, memories)

        monkeypatch.setattr(served.policy, "predict", moody)
        served.app._batcher._by_key.clear()
        monkeypatch.setattr(served.policy, "for_key", lambda key: served.policy)
        failed = act(served.http, openvla(observation) | {"instruction": "explode"}, params={"errors": "plain"})
        assert failed.status_code == 500 and "secret" not in failed.text
        assert act(served.http, openvla(observation)).status_code == 200


def test_tracebacks_if_configured(serving):
    with serving(tracebacks=True) as served, connect(served.ws) as client:
        client.recv()
        client.send(wire.to_msgpack({}))
        assert "Traceback" in client.recv()


def test_large_and_slow_requests_are_rejected(serving, observations):
    (observation,) = observations(1)
    with serving(max_request_mb=0.5, patience_s=0.5) as served:
        assert act(served.http, b" " * 2**20).status_code == 413
        chunked = requests.post(served.http + "/act", data=(bytes(2**16) for _ in range(64)), timeout=20)
        assert chunked.status_code == 413
        with socket.create_connection(("127.0.0.1", served.port)) as liar:
            liar.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n")
            assert liar.recv(100).startswith(b"HTTP/1.1 413")
        with connect(served.ws) as client:
            client.recv()
            with contextlib.suppress(websockets.ConnectionClosed):
                client.send(bytes(2**20))
            with pytest.raises(websockets.ConnectionClosed) as closed:
                client.recv()
            assert closed.value.rcvd.code == 1009
        # Slow headers and slow bodies. Other clients are served in the meantime.
        slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
        for number, one in enumerate(slow):
            head = b"POST /act HTTP/1.1\r\nHost: x\r\n" + (b"Content-Length: 1000\r\n\r\n{" if number % 2 else b"")
            one.sendall(head)
        assert act(served.http, openvla(observation)).status_code == 200
        deadline = time.monotonic() + 20
        for number, one in enumerate(slow):
            one.settimeout(max(0.1, deadline - time.monotonic()))
            answer = one.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408") if number % 2 else answer == b""
            one.close()
        assert act(served.http, openvla(observation)).status_code == 200


def test_an_incomplete_second_request_ends_the_connection(serving):
    """The time limit applies to every request of a connection."""
    with (
        serving(patience_s=0.5) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=20) as slow,
    ):
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")
        slow.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\n")
        assert slow.recv(1000) in (b"", b"OK\n") and slow.recv(1000) == b""


def test_requests_of_disconnected_clients_are_not_decoded(serving, observations, monkeypatch):
    """Both protocols; six clients send a request and disconnect while another request is decoded."""
    (observation,) = observations(1)
    with serving(max_batch=1) as served:
        real, asked, gone = served.policy.predict, [], threading.Event()

        def predict(*arguments):
            asked.append(arguments[1][0])
            gone.wait(20)
            return real(*arguments)

        monkeypatch.setattr(served.policy, "predict", predict)
        with connect(served.ws) as first:
            first.recv()
            first.send(wire.to_msgpack(libero(observation, "first")))
            until(lambda: asked)
            for _ in range(3):
                with connect(served.ws) as client:
                    client.recv()
                    client.send(wire.to_msgpack(libero(observation, "left")))
                with contextlib.suppress(requests.Timeout):
                    body = json_numpy.dumps(openvla(observation) | {"instruction": "left"})
                    requests.post(served.http + "/act", data=body, timeout=0.1)
            time.sleep(0.3)  # until the requests have arrived
            until(lambda: served.app._active == 1)
            gone.set()
            assert "actions" in wire.from_msgpack(first.recv(timeout=20))
            assert "actions" in ask(first, libero(observation, "last"))
        assert asked == ["first", "last"]


def test_pipelined_requests_are_answered_in_order(serving, observations):
    seen = observations(3)
    with serving() as served, connect(served.ws) as client:
        client.recv()
        for observation in seen:
            client.send(wire.to_msgpack(libero(observation)))
        answers = [wire.from_msgpack(client.recv(timeout=20))["actions"] for _ in seen]
        for observation, actions in zip(seen, answers, strict=True):
            np.testing.assert_array_equal(actions, served.policy.predict_chunk(observation, "go"))


def test_requests_of_web_sites_are_rejected(serving, observations):
    """Otherwise, any web page in a browser on this machine could use a server without a key."""
    (observation,) = observations(1)
    with serving() as served:
        with pytest.raises(websockets.InvalidStatus):
            connect(served.ws, origin="http://elsewhere.example")
        body, evil = json_numpy.dumps(openvla(observation)), {"Origin": "http://elsewhere.example"}
        assert requests.post(served.http + "/act", data=body, headers=evil, timeout=20).status_code == 403
        with connect(served.ws, origin=served.http) as client:
            assert "actions" in (client.recv(), ask(client, libero(observation)))[1]


def test_an_invalid_option_does_not_end_the_connection(serving, observations):
    (observation,) = observations(1)
    with serving() as served, connect(served.ws) as client:
        client.recv()
        assert "vla" not in ask(client, libero(observation) | {"vla/details": np.ones(2)})
        assert "vla" in ask(client, libero(observation) | {"vla/details": True})


def test_keys(serving, observations):
    (observation,) = observations(1)
    with serving(key="sesame") as served:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Api-Key simsalabim"}, 401),
            ({"Authorization": "Api-Key sesame"}, 200),
            ({"Authorization": "Bearer sesame"}, 200),
            ({"Authorization": "Basic " + base64.b64encode(b"any:sesame").decode()}, 200),
            ({"Authorization": "Basic " + base64.b64encode(b"sesame").decode()}, 401),
            ({"Authorization": "Basic sesame:sesame"}, 401),
        ):
            body = json_numpy.dumps(openvla(observation))
            assert requests.post(served.http + "/act", data=body, headers=headers, timeout=20).status_code == status
            assert requests.get(served.http + "/metrics", headers=headers, timeout=20).status_code == status
            if status == 200:
                with connect(served.ws, additional_headers=headers) as client:
                    client.recv()
            else:
                with pytest.raises(websockets.InvalidStatus):
                    connect(served.ws, additional_headers=headers)
        assert requests.get(served.http + "/healthz", timeout=20).text == "OK\n"


def test_many_clients_at_once_are_decoded_together(serving, observations):
    """64 clients with both protocols; each receives the response to its own request."""
    seen = observations(8)
    with serving() as served:
        wanted = [served.policy.predict_chunk(observation, "go") for observation in seen]

        def one(number: int) -> bool:
            observation, chunk = seen[number % 8], wanted[number % 8]
            if number % 2:
                action = json_numpy.loads(act(served.http, openvla(observation)).text)
                return np.allclose(action, chunk[0], atol=1e-6)
            with connect(served.ws, open_timeout=60) as client:
                client.recv()
                return np.allclose(ask(client, libero(observation))["actions"], chunk, atol=1e-6)

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert all(pool.map(one, range(64)))
        text = requests.get(served.http + "/metrics", timeout=20).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    answered = sum(float(values[f'vla_request_seconds_count{{protocol="{name}"}}']) for name in ("openvla", "openpi"))
    assert answered == 64 and float(values["vla_batch_size_count"]) < 64
    assert float(values["vla_connections"]) == 0 and float(values["vla_queue"]) == 0


def test_a_full_queue_is_reported_at_once(serving, observations, monkeypatch):
    (observation,) = observations(1)
    with serving(max_queue=2, max_batch=1) as served:
        real = served.policy.predict
        monkeypatch.setattr(served.policy, "predict", lambda *a: (time.sleep(0.3), real(*a))[1])
        monkeypatch.setattr(served.policy, "for_key", lambda key: served.policy)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: act(served.http, openvla(observation)), range(12)))
        refused = [reply for reply in replies if reply.status_code == 503]
        assert refused and all("try again later" in reply.json()["error"] for reply in refused)
        assert all(reply.headers["Retry-After"] == "1" for reply in refused)
        assert {reply.status_code for reply in replies} == {200, 503}


KEYS = st.sampled_from(["image", "state", "prompt", "observation/image", "pixels", "encoded", "x"])
LEAVES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text() | st.binary(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)


@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=VALUES, raw=st.binary(max_size=64))
def test_random_requests(served_once, values, raw):
    """Every request receives a response in bounded time, and the next valid request is answered."""
    served, good = served_once
    with connect(served.ws + "/?errors=plain") as client:
        client.recv()
        for bad in (msgpack.packb(values, default=str), raw):
            client.send(bad)
            assert "error" in wire.from_msgpack(client.recv(timeout=5))
        assert "actions" in ask(client, libero(good))
    for bad in (json.dumps(values, default=str).encode(), raw):
        assert act(served.http, bad, params={"errors": "plain"}).status_code == 400


@pytest.fixture
def served_once(serving, observations):
    with serving() as served:
        yield served, observations(1)[0]


def test_the_verb_answers_pending_requests_before_it_exits(tiny, tmp_path, observations, start_vla):
    """SIGTERM during requests: pending requests are answered, and the port is free afterwards."""
    checkpoint.save(*tiny, tmp_path / "policy")
    process = start_vla("serve", "--policy", tmp_path / "policy", "--port", 0)
    while "\n" not in process.said()[0] and process.poll() is None:
        time.sleep(0.05)
    line = process.said()[0].splitlines()[0]
    url = line.split()[3].removesuffix("/act")
    assert url.startswith("http://127.0.0.1:"), line
    (observation,) = observations(1)
    with connect("ws" + url.removeprefix("http")) as client:
        client.recv()
        for _ in range(5):
            assert "actions" in ask(client, libero(observation))
        client.send(wire.to_msgpack(libero(observation)))
        time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        answers = []
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                answers.append(wire.from_msgpack(client.recv(timeout=20)))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert len(answers) == 1 and "actions" in answers[0]


def test_tls(serving, observations, tmp_path):
    pem = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem[0], "-out", pem[1]],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not installed")
    with serving(certificate=pem[1], private_key=pem[0]) as served:
        url = f"https://127.0.0.1:{served.port}"
        reply = requests.post(url + "/act", json_numpy.dumps(openvla(observations(1)[0])), verify=pem[1], timeout=20)
        assert json_numpy.loads(reply.text).shape == (7,)


def test_invalid_base64_is_rejected(serving):
    array = {"__numpy__": base64.b64encode(b"123").decode(), "dtype": "<f4", "shape": [2]}
    with serving() as served:
        reply = act(served.http, json.dumps({"image": array}).encode(), params={"errors": "plain"})
        assert reply.status_code == 400 and "has 8 bytes, got 3" in reply.json()["error"]
