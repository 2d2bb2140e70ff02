"""The worker pool: failed workers are replaced without affecting others, and replies arrive as they complete."""

import multiprocessing
import time

import numpy as np
import pytest

from tests.pointworld import ENV_ID
from vla import config as configuration
from vla.config import AdapterConfig, CollectConfig, HostsConfig, RolloutConfig
from vla.errors import ConfigError, DataError, SimulatorError
from vla.simulation.experts import Attempt, ExpertServer, Outcome, Recording
from vla.simulation.hosts import Fault
from vla.simulation.pool import Pool, ResetResult

SLIDE = "toy/Slide-v0"


def pool(size: int, server=None, patience_s: float = 60.0, **kwargs) -> Pool:
    return Pool(size, AdapterConfig(module="tests.rollout_env", kwargs=kwargs), server=server, patience_s=patience_s)


def completed(workers: Pool, count: int) -> list[tuple[int, object]]:
    replies = []
    while len(replies) < count:
        replies += workers.completed().items()
    return replies


def test_replies_arrive_as_they_complete():
    with pool(2, delay=0.3) as workers:
        for slot in range(2):
            workers.submit(slot, ("reset", SLIDE, slot, False))
        assert workers.idle == [] and workers.completed(timeout=0.0) == {}
        assert {slot for slot, _ in completed(workers, 2)} == {0, 1} == set(workers.idle)
        workers.submit(0, ("run", np.zeros((4, 1))))
        workers.submit(1, ("run", np.zeros((1, 1))))
        assert [(slot, len(reply.rewards)) for slot, reply in completed(workers, 2)] == [(1, 1), (0, 4)]


def test_a_worker_that_died_is_replaced_and_the_others_keep_their_episodes():
    with pool(2, kill_on=7) as workers:
        workers.exchange({0: ("reset", SLIDE, 7, False), 1: ("reset", SLIDE, 8, False)})
        replies = workers.exchange({slot: ("run", np.full((2, 1), 0.1)) for slot in range(2)})
        assert replies[0] == Fault("the worker process died (signal SIGKILL)", "died")
        assert replies[1].observation["agent_pos"] == pytest.approx(0.2)
        assert isinstance(workers.exchange({0: ("reset", SLIDE, 9, False)})[0], ResetResult)
        again = workers.exchange({1: ("run", np.full((1, 1), 0.1))})[1]
        assert again.observation["agent_pos"] == pytest.approx(0.3)
    assert not multiprocessing.active_children()


def test_an_exception_ends_the_environment_but_not_the_worker():
    with pool(1, raise_on=7) as workers:
        workers.exchange({0: ("reset", SLIDE, 7, False)})
        (child,) = multiprocessing.active_children()
        fault = workers.exchange({0: ("run", np.zeros((2, 1)))})[0]
        assert fault == Fault("ZeroDivisionError: the motor failed", step=1)
        fault = workers.exchange({0: ("run", np.zeros((2, 1)))})[0]
        assert isinstance(fault.error, SimulatorError) and "call reset first" in fault.message
        assert multiprocessing.active_children() == [child]


def test_a_busy_worker_does_not_delay_the_end():
    start = time.monotonic()
    with pool(1, hang_on=7) as workers:
        workers.exchange({0: ("reset", SLIDE, 7, False)})
        workers.submit(0, ("run", np.zeros((1, 1))))
        start = time.monotonic()
    assert time.monotonic() - start < 1 and not multiprocessing.active_children()


def test_experts_are_imported_from_the_callers_folder(tmp_path):
    server = ExpertServer(AdapterConfig(module="tests.pointworld"))
    tried = Attempt(0, 0, ENV_ID, 3, 0.0)
    assert server.answer(("attempt", tried, Recording(tmp_path, False, False))) == Outcome("kept", "", 7, True)
    assert [path.name for path in tmp_path.iterdir()] == ["episode-000000"]
    fault = server.answer(("attempt", tried, Recording(tmp_path / "elsewhere", False, False)))
    assert isinstance(fault.error, DataError) and "cannot access" in fault.message and "all machines" in fault.message
    server.abandon()


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (HostsConfig(address="auto"), "'auto' requires the backend 'ray': add --backend ray"),
        (HostsConfig(backend="rey"), r"unknown backend 'rey'. Did you mean 'ray'"),
    ],
)
def test_invalid_hosts(hosts, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        configuration.check(CollectConfig(out=tmp_path, hosts=hosts))
        configuration.check(RolloutConfig(out=tmp_path, hosts=hosts))
        Pool(1, AdapterConfig(), hosts)


def test_a_chunk_is_rendered_once_and_a_video_at_every_step(monkeypatch):
    from vla.simulation import adapter as simulator
    from vla.simulation.pool import EnvServer

    asked = []
    original = simulator.SimulatedRobot.step

    def step(self, action, images=True):
        asked.append(images)
        return original(self, action, images)

    monkeypatch.setattr(simulator.SimulatedRobot, "step", step)
    server = EnvServer(AdapterConfig(module="tests.rollout_env"))
    for record, expected in ((False, [False, False, True]), (True, [True, True, True])):
        server.reset(SLIDE, 1, record)
        asked.clear()
        result = server.run(np.zeros((3, 1)))
        assert asked == expected and result.observation["pixels"]["front"].any()
    assert server.clip(10.0)
    server.abandon()
