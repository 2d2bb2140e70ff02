"""Processes in which experts demonstrate.

Owns: carrying out attempts side by side, and the promise that an exception, a crash or a hang in one of them comes back
as an `Outcome` while the others go on. Workers write finished episodes themselves, so frames never pass between
processes. It does not know which attempts make a dataset, nor when to give up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from vla.config import AdapterConfig
from vla.data.writer import EpisodeRecorder
from vla.errors import SimulatorError, VLAError
from vla.simulation import adapter as simulator

EXPERT_SEED = 1_000_000_000  # the expert's noise must not repeat the numbers that laid out the scene
PATIENCE_S = 900.0  # an episode that takes longer is a hang


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One try at one episode of the dataset."""

    episode: int
    turn: int
    env_id: str
    seed: int
    noise: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an attempt.

    Attributes:
        kind: "kept"; "failed": by the expert; "error": by the environment; "died": with its process; "stop": `error`
            says why no further attempt can succeed.
        message: why it was not kept.
        frames, success: of an episode that was kept.
    """

    kind: Literal["kept", "failed", "error", "died", "stop"]
    message: str = ""
    frames: int = 0
    success: bool = False
    error: VLAError | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    staging: Path
    adapter: AdapterConfig
    keep_all: bool
    executed_actions: bool


class _Worker:
    """A process, the attempt it is busy with, and the environment it has made."""

    def __init__(self, job: Job) -> None:
        # Never a fork: it would copy GL contexts and locks of this process.
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_work, args=(far, job), daemon=True)
        self.process.start()
        far.close()
        self.attempt: Attempt | None = None
        self.env_id: str | None = None
        self.since = 0.0

    def start(self, tried: Attempt) -> None:
        self.attempt, self.env_id, self.since = tried, tried.env_id, time.monotonic()
        with contextlib.suppress(OSError):  # it is dead; `outcomes` will notice
            self.connection.send(tried)

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Pool:
    """Workers, replaced when they die. A context manager that leaves no process behind."""

    def __init__(self, count: int, job: Job) -> None:
        self._job = job
        self._workers = [_Worker(job) for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.stop()
        for leftover in self._job.staging.glob(".episode-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def busy(self) -> bool:
        return any(worker.attempt for worker in self._workers)

    def assign(self, todo: list[Attempt]) -> None:
        """Give every idle worker something from `todo`, preferably in the environment it has already made."""
        for worker in self._workers:
            if worker.attempt is None and todo:
                same = (i for i, tried in enumerate(todo) if tried.env_id == worker.env_id)
                worker.start(todo.pop(next(same, 0)))

    def outcomes(self) -> Iterator[tuple[Attempt, Outcome]]:
        """Wait for at least one attempt to end, or a second."""
        busy = {worker.connection: i for i, worker in enumerate(self._workers) if worker.attempt}
        ready = wait(list(busy), timeout=1.0)
        for connection, i in busy.items():
            worker = self._workers[i]
            tried, outcome = worker.attempt, None
            assert tried is not None
            if connection in ready:
                try:
                    outcome = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join(5)
                    outcome = Outcome("died", f"the worker process died (exit code {worker.process.exitcode})")
            elif time.monotonic() - worker.since > PATIENCE_S:
                outcome = Outcome("died", f"no end after {PATIENCE_S:.0f} s")
            if outcome is None:
                continue
            worker.attempt = None
            if outcome.kind in ("error", "died"):  # an environment that threw may be in any state: make it anew
                worker.stop()
                self._workers[i] = _Worker(self._job)
            yield tried, outcome


def _work(connection: Connection, job: Job) -> None:
    """The worker process: make episodes until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    env: simulator.SimulatedRobot | None = None
    while True:
        try:
            tried: Attempt = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if env is None or env.env_id != tried.env_id:
                if env is not None:
                    env.close()
                env = simulator.make(tried.env_id, job.adapter)
            outcome = _make_episode(env, tried, job)
        except VLAError as error:
            outcome = Outcome("stop", error=error)
        except Exception as error:
            outcome = Outcome("error", f"{type(error).__name__}: {error}")
        try:
            connection.send(outcome)
        except OSError:
            return


def _make_episode(env: simulator.SimulatedRobot, tried: Attempt, job: Job) -> Outcome:
    """Run the expert through one episode; write it unless it is a failure that is not kept."""
    observation, info = env.reset(seed=tried.seed)
    expert = env.make_expert(noise=tried.noise, seed=EXPERT_SEED + tried.seed)
    instruction, success, over = info["instruction"], False, False
    with EpisodeRecorder(job.staging, tried.episode, env.robot, executed_actions=job.executed_actions) as episode:
        while not over:
            executed, label = consult(expert, env.action_space)
            episode.record(observation, label, executed_action=executed if job.executed_actions else None)
            observation, _, terminated, truncated, info = env.step(executed)
            success = info["is_success"]
            episode.outcome(success)
            over = terminated or truncated
            if not over:
                env.check_length(len(episode))
        if not (success or job.keep_all):
            return Outcome("failed", f"not solved after {len(episode)} steps")
        frames = episode.finish(
            instruction=instruction, env_id=tried.env_id, seed=tried.seed, success=success, noise=tried.noise
        )
    return Outcome("kept", frames=frames, success=success)


def consult(expert: simulator.Expert, space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """What the expert does now, and its clean action for the same state. Once per step: an expert may count them."""
    executed = executable(expert.act(), space)
    return executed, executable(getattr(expert, "label", executed), space)


def executable(action: Any, space: spaces.Space) -> np.ndarray:
    """The action as it can be executed and stored: within the environment's limits, float32 [D]."""
    assert isinstance(space, spaces.Box)
    action = np.asarray(action, np.float32)
    if action.shape != space.shape:
        raise SimulatorError(
            f"the expert's action has shape {list(action.shape)}, the environment takes {list(space.shape)}."
        )
    return simulator.within(action, space).astype(np.float32)
