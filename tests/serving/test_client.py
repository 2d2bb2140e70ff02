"""`RemotePolicy` behaves like the served policy, and a broken network does not stop the robot."""

import contextlib
import copy
import socket
import threading
import time

import numpy as np
import pytest
import torch
from websockets.sync.server import serve as serve_websocket

from tests.bench import HZ, Bench, at
from tests.road import Road
from vla.config import ControlConfig, DecodingConfig
from vla.control.controller import Controller
from vla.errors import ConfigError, ServerError
from vla.policy import Policy
from vla.policy.session import Draft, LatentDraw, Session, predict
from vla.serving import client, wire
from vla.serving.client import RemotePolicy
from vla.serving.server import describe

pytestmark = pytest.mark.realtime


def test_it_returns_the_served_policys_predictions(serving, observations):
    with serving() as served:
        remote, local = RemotePolicy(served.ws), served.policy
        assert (remote.robot, remote.horizon, remote.unnorm_key) == (local.robot, local.horizon, local.unnorm_key)
        assert remote.n_action_steps == local.n_action_steps
        np.testing.assert_array_equal(remote.action_limits, local.action_limits)
        seen = observations(4)
        ours, theirs = (policy.predict(seen, ["reach"] * 4) for policy in (remote, local))
        for name in ("chunks", "ids"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("log_probs", "entropy"):  # computed one by one there, and as a batch here
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)
        for policy in (remote, local):
            policy.reset("push")
        for observation in observations(9, seed=5):
            np.testing.assert_array_equal(remote.act(observation), local.act(observation))
        remote.close()


def test_action_prefixes_are_sent(serving, observations):
    with serving() as served:
        (observation,) = observations(1)
        steps = np.linspace(-0.5, 0.5, 28, dtype=np.float32).reshape(4, 7)
        predictions = [
            policy.predict([observation], ["go"], [Draft(steps).given(steps[:2])])
            for policy in (RemotePolicy(served.ws), served.policy)
        ]
        assert all(len(prediction.next_draft[0]) == 4 for prediction in predictions)
        chunks = [prediction.chunks[0] for prediction in predictions]
        np.testing.assert_array_equal(*chunks)
        np.testing.assert_allclose(chunks[0][:2, 0], [-0.5, -0.24], atol=0.1)


def test_the_latent_of_an_episode_is_sent(serving, policy, observations):
    """A remote session decodes the same tokens as a local one, in every chunk."""
    network = copy.deepcopy(policy.network)
    network.add_latent("chunk", bits=6, form="one_hot", kappa=1.0)
    torch.nn.init.normal_(network.latent.injection, std=10)
    free, (observation,) = Policy(network, policy.processor), observations(1)
    with serving(policy=free) as served:
        for latent in (LatentDraw(7), LatentDraw(codes=(5,))):
            near, far = Session("go", latent), Session("go", latent)
            for _ in range(3):
                ours, theirs = (
                    predict(free, [near], [observation]),
                    predict(RemotePolicy(served.ws), [far], [observation]),
                )
                np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
                assert near.draft.latent == far.draft.latent


def test_a_server_with_partial_decoding_receives_complete_drafts(serving, policy, observations):
    part = Policy(policy.network, policy.processor, n_action_steps=2, decoding=DecodingConfig(max_actions=2))
    with serving(policy=part) as served:
        remote, session = RemotePolicy(served.ws), Session("go")
        for observation in observations(3):
            found = predict(remote, [session], [observation]).chunks
            np.testing.assert_array_equal(found, served.policy.predict([observation], ["go"]).chunks)
            assert found.shape == (1, 2, 7)


def test_it_reconnects_to_a_restarted_server(serving, observations):
    (observation,) = observations(1)
    with serving() as served:
        remote, port = RemotePolicy(served.ws, deadline_s=0.5), served.port
        chunk = remote.predict_chunk(observation, "go")
    with pytest.raises(ServerError, match="cannot be reached"):
        remote.predict_chunk(observation, "go")
    with serving(port=port):
        np.testing.assert_array_equal(remote.predict_chunk(observation, "go"), chunk)
        remote.close()


def test_a_late_response_is_not_used_for_the_next_request(serving, observations, monkeypatch):
    seen = observations(2)
    with serving() as served:
        remote, real = RemotePolicy(served.ws, deadline_s=0.5), served.policy.predict
        chunks = [remote.predict_chunk(observation, "go") for observation in seen]
        monkeypatch.setattr(served.policy, "predict", lambda *a: (time.sleep(1.0), real(*a))[1])
        monkeypatch.setattr(served.policy, "for_key", lambda key: served.policy)
        served.app._batcher._by_key.clear()
        with pytest.raises(ServerError, match=r"did not reply within 0.5 s"):
            remote.predict_chunk(seen[0], "go")
        monkeypatch.setattr(served.policy, "predict", real)
        time.sleep(1.0)
        np.testing.assert_array_equal(remote.predict_chunk(seen[1], "go"), chunks[1])
        remote.close()


def test_errors_contain_the_servers_message(serving, observations):
    with serving(key="sesame") as served:
        with pytest.raises(ServerError, match=r"rejected the connection with status 403. Check VLA_API_KEY"):
            RemotePolicy(served.ws)
        remote = RemotePolicy(served.ws, api_key="sesame")
        (observation,) = observations(1)
        with pytest.raises(ServerError, match="replied with an error: state: not finite"):
            remote.predict_chunk(observation | {"agent_pos": np.full(7, np.nan)}, "go")
        remote.predict_chunk(observation, "go")
        with pytest.raises(ConfigError, match="unknown unnorm_key 'brigde'"):
            RemotePolicy(served.ws, api_key="sesame", unnorm_key="brigde")
        with pytest.raises(ConfigError, match="n_action_steps must be between 1 and the horizon 4"):
            RemotePolicy(served.ws, api_key="sesame", n_action_steps=5)
        remote.close()


def test_addresses_without_a_server():
    with pytest.raises(ServerError, match="cannot be reached"):
        RemotePolicy("ws://127.0.0.1:1", patience_s=0.3)
    with pytest.raises(ConfigError, match="invalid address"):
        RemotePolicy("ws://", patience_s=0.3)
    with pytest.raises(ConfigError, match="set on the server"):
        client.load("ws://127.0.0.1:1", decoding=DecodingConfig(temperature=1.0))


def test_the_reason_for_waiting_is_printed_at_once(monkeypatch, capsys):
    """Once, for any number of attempts, and nothing after the deadline."""
    said = []
    monkeypatch.setattr(client.time, "sleep", lambda seconds: said.append(capsys.readouterr().err))
    with pytest.raises(ServerError, match=r"cannot be reached.*Check that `vla serve` is running"):
        client.load("ws://127.0.0.1:1", connect_s=0.3)
    assert said[0].startswith("connecting to ws://127.0.0.1:1\n") and "refused. Retrying for" in said[0]
    assert len(said) > 2 and not any(said[1:])


@pytest.mark.parametrize(
    ("hello", "message"),
    [("hello", "expected a msgpack map"), ({"reset_pose": [0]}, "its metadata has no 'robot'")],
)
def test_other_servers_are_rejected(hello, message):
    def answer(socket):
        socket.send(hello if isinstance(hello, str) else wire.to_msgpack(hello))
        socket.recv()

    with serve_websocket(answer, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ServerError, match=message):
            RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", patience_s=2.0)
        server.shutdown()


@pytest.mark.parametrize("name", ["tokenizer_sha256", "weights", "action_limits"])
def test_another_policy_after_a_reconnection_is_rejected(serving, observations, policy, monkeypatch, name):
    with serving() as served:
        remote, port = RemotePolicy(served.ws), served.port
    other = describe(policy) | {name: {"demo": [np.zeros(7), np.ones(7)]} if name == "action_limits" else "0"}
    monkeypatch.setattr("vla.serving.server.describe", lambda policy: other)
    with serving(port=port):
        for _ in range(2):  # also at the next request
            with pytest.raises(ServerError, match=f"now serves another policy: its {name!r} has changed"):
                remote.predict_chunk(observations(1)[0], "go")


def test_other_weights_have_another_fingerprint(policy):
    before = describe(policy)["weights"]
    network = copy.deepcopy(policy.network)
    assert describe(Policy(network, policy.processor))["weights"] == before
    with torch.no_grad():
        list(network.parameters())[-1].add_(1e-3)
    assert describe(Policy(network, policy.processor))["weights"] != before


def test_the_timeout_applies_if_the_server_stops_reading(serving, observations, robot):
    """A large request fills the network buffers, and sending would block until the server reads."""
    large = observations(1)[0] | {"pixels": {name: np.zeros((3000, 3000, 3), np.uint8) for name in robot.cameras}}
    with serving() as served, socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:

        def pass_on_the_handshake_only():
            ours = stack.enter_context(listener.accept()[0])
            theirs = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            theirs.sendall(ours.recv(4000))
            with contextlib.suppress(OSError):
                while data := theirs.recv(4000):
                    ours.sendall(data)

        threading.Thread(target=pass_on_the_handshake_only, daemon=True).start()
        remote = RemotePolicy(f"ws://127.0.0.1:{listener.getsockname()[1]}", deadline_s=0.5)
        threading.Timer(5.0, stack.close).start()  # finally, the connection is closed
        begun = time.monotonic()
        with pytest.raises(ServerError, match=r"did not reply within 0\.5 s|cannot be reached"):
            remote.predict_chunk(large, "go")
        assert time.monotonic() - begun < 3


# The control loop over a bad network ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delay_s", "loss"),
    [(0.05, 0.0), (0.2, 0.0), (0.05, 0.05)],
    ids=["50 ms", "200 ms", "50 ms and 5 % lost"],
)
def test_delay_and_loss_cost_actions_but_no_commands(serving, observations, delay_s, loss, safe_and_on_time):
    """Delays are one-way. A chunk of four actions at 20 Hz lasts 200 ms."""
    with serving() as served, Road(served.port, delay_s, loss) as road:
        remote = RemotePolicy(f"ws://127.0.0.1:{road.port}", deadline_s=2.0)
        bench = Bench(remote.robot, observations)
        with Controller(bench, remote, ControlConfig(hz=HZ)) as controller:
            record = controller.run("reach", seconds=2.5)
        remote.close()
    safe_and_on_time(bench, served.policy, record, 2.5)
    assert record["errors"] == [] and min(record["decode_ms"]) >= 2e3 * delay_s
    if delay_s == 0.2:  # each chunk is older than its duration, so the robot holds until the next one
        waited = record["interventions"].get("underrun", 0) + record["interventions"]["no chunk yet"]
        assert waited >= 20
    else:
        assert np.abs(np.stack([action[:6] for _, action in bench.commands[:-1]])).max() > 0


def test_a_server_that_dies_during_an_episode(serving, observations, policy, safe_and_on_time):
    """The robot holds until the server is back, then continues."""
    first, second = serving(), contextlib.ExitStack()
    served = first.__enter__()

    def restart() -> None:
        first.__exit__(None, None, None)
        time.sleep(1.0)
        second.enter_context(serving(port=served.port))

    remote = RemotePolicy(served.ws, deadline_s=0.3)
    bench, thread = Bench(remote.robot, observations), threading.Thread(target=restart)
    with Controller(bench, remote, ControlConfig(hz=HZ)) as controller, second:
        at(controller, 10, thread.start)
        record = controller.run("reach", seconds=4.0)
        thread.join()
        remote.close()
    safe_and_on_time(bench, policy, record, 4.0)
    assert any("cannot be reached" in error for error in record["errors"])
    assert record["interventions"]["underrun"] >= 10
    assert np.abs(np.stack([action[:6] for _, action in bench.commands[-12:-1]])).max() > 0


def test_a_lost_connection_is_reestablished(serving, observations, safe_and_on_time):
    with serving() as served, Road(served.port) as road:
        remote = RemotePolicy(f"ws://127.0.0.1:{road.port}", deadline_s=1.0)
        bench = Bench(remote.robot, observations)
        with Controller(bench, remote, ControlConfig(hz=HZ)) as controller:
            for tick in (10, 20, 30):
                at(controller, tick, road.cut)
            record = controller.run("reach", seconds=2.5)
        remote.close()
    safe_and_on_time(bench, served.policy, record, 2.5)
    assert record["errors"] == []  # the client reconnects within the call
    assert np.abs(np.stack([action[:6] for _, action in bench.commands[-12:-1]])).max() > 0
