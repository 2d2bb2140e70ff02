"""A custom wire protocol is served beside the built-in ones, with the same API keys and request limits."""

import importlib
import json
import sys

import numpy as np
import pytest
import requests
import websockets
from websockets.sync.client import connect

from vla.serving.protocols import PROTOCOLS

pytestmark = pytest.mark.realtime


@pytest.fixture
def toy_protocol(monkeypatch):
    """Register the protocols for one test only."""
    monkeypatch.setattr(PROTOCOLS, "_members", dict(PROTOCOLS._members))
    monkeypatch.delitem(sys.modules, "tests.toy_protocol", raising=False)
    importlib.import_module("tests.toy_protocol")


@pytest.fixture
def request_(observations) -> dict:
    (observation,) = observations(1)
    images = {name: image.tolist() for name, image in observation["pixels"].items()}
    return {"images": images, "state": observation["agent_pos"].tolist(), "instruction": "go"}


def test_a_custom_protocol(toy_protocol, serving, observations, request_, caplog):
    (observation,) = observations(1)
    with serving() as served:
        chunk = served.policy.predict_chunk(observation, "go")
        reply = requests.post(served.http + "/plain", json=request_, timeout=20)
        np.testing.assert_array_equal(np.float32(reply.json()["actions"]), chunk)
        with connect(served.ws + "/talk", max_size=None) as client:  # openpi's protocol must not handle this address
            client.send(json.dumps(request_))
            np.testing.assert_array_equal(np.float32(json.loads(client.recv(timeout=20))["actions"]), chunk)
        with connect(served.ws + "/elsewhere") as client:
            assert b"unnorm_keys" in client.recv(timeout=20)
        wrong = requests.post(served.http + "/plain", json={"instruction": "go"}, timeout=20)
        assert wrong.status_code == 400 and "camera 'front'" in wrong.json()["detail"]
        assert any("POST /plain" in line and "camera 'front'" in line for line in caplog.messages)
        metrics = requests.get(served.http + "/metrics", timeout=20).text
        assert 'vla_request_seconds_count{protocol="plain"} 1.0' in metrics
        assert 'vla_errors_total{kind="SpecError",protocol="plain"} 1.0' in metrics
        lost = requests.get(served.http + "/plian", timeout=20).json()["error"]
        assert lost == (
            "Not Found; this server has POST /act, GET /health, GET /config, POST /plain, GET /healthz, GET /metrics "
            "and websockets."
        )


def test_keys_and_limits_apply(toy_protocol, serving, request_):
    with serving(key="sesame", max_request_mb=0.5, patience_s=0.5) as served:
        key = {"Authorization": "Bearer sesame"}
        assert requests.post(served.http + "/plain", json=request_, timeout=20).status_code == 401
        assert requests.post(served.http + "/plain", json=request_, headers=key, timeout=20).status_code == 200
        with pytest.raises(websockets.InvalidStatus):
            connect(served.ws + "/talk")
        large = requests.post(served.http + "/plain", data=bytes(2**20), headers=key, timeout=20)
        assert large.status_code == 413 and large.json() == {"error": "the request is larger than 0.5 MB."}
        served.app.draining = True
        late = requests.post(served.http + "/plain", json=request_, headers=key, timeout=20)
        assert late.status_code == 503 and late.json() == {"detail": "the server is shutting down."}
        served.app.draining = False


def test_an_unknown_address_lists_the_valid_ones(serving):
    with serving() as served:
        lost = requests.get(served.http + "/predict", timeout=20)
        assert lost.status_code == 404
        assert lost.json()["error"] == (
            "Not Found; this server has POST /act, GET /health, GET /config, GET /healthz, GET /metrics and websockets."
        )
