"""Worker processes that collect expert demonstrations.

Owns: running attempts in parallel, and turning an exception, a crash or a hang into an `Outcome` without disturbing the
other workers. Workers write finished episodes themselves, so frames are never sent between processes. It does not know
which attempts make up a dataset, or when to give up.
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

EXPERT_SEED = 1_000_000_000  # offset, so that the expert's noise is independent of the scene layout
PATIENCE_S = 900.0  # time limit per episode; beyond it, the worker counts as hung


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at one episode of the dataset."""

    episode: int
    turn: int
    env_id: str
    seed: int
    noise: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of an attempt.

    Attributes:
        kind: "kept": the episode was written. "failed": the expert did not solve the task. "error": the environment
            raised an exception. "died": the process crashed or hung. "stop": no further attempt can succeed, see
            `error`.
        message: why the episode was not kept.
        frames, success: number of frames and success of a kept episode.
    """

    kind: Literal["kept", "failed", "error", "died", "stop"]
    message: str = ""
    frames: int = 0
    success: bool = False
    error: VLAError | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings that all workers share."""

    staging: Path
    adapter: AdapterConfig
    keep_all: bool
    executed_actions: bool


class _Worker:
    """A process, its current attempt, and the id of the environment that it has created."""

    def __init__(self, job: Job) -> None:
        # Not a fork, which would copy GL contexts and locks of this process.
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
        with contextlib.suppress(OSError):  # the worker is dead, which `outcomes` detects
            self.connection.send(tried)

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Pool:
    """A pool of workers, which replaces those that die. A context manager; it ends all processes on exit."""

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
        """Give every idle worker an attempt from `todo`, if possible one for the environment that it already has."""
        for worker in self._workers:
            if worker.attempt is None and todo:
                same = (i for i, tried in enumerate(todo) if tried.env_id == worker.env_id)
                worker.start(todo.pop(next(same, 0)))

    def outcomes(self) -> Iterator[tuple[Attempt, Outcome]]:
        """Wait until an attempt ends, for at most 1 s, and yield the results."""
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
                outcome = Outcome("died", f"the episode did not end within {PATIENCE_S:.0f} s")
            if outcome is None:
                continue
            worker.attempt = None
            if outcome.kind in ("error", "died"):  # the state is unknown: start a new environment
                worker.stop()
                self._workers[i] = _Worker(self._job)
            yield tried, outcome


def _work(connection: Connection, job: Job) -> None:
    """Main loop of a worker process: run attempts until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
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
    """Run the expert for one episode; write it if it succeeds or if all episodes are kept."""
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
    """The expert's action, and its clean action for the same state. Call once per step: an expert may count calls."""
    executed = executable(expert.act(), space)
    return executed, executable(getattr(expert, "label", executed), space)


def executable(action: Any, space: spaces.Space) -> np.ndarray:
    """The action within the environment's limits, float32 [D], as it is executed and stored."""
    assert isinstance(space, spaces.Box)
    action = np.asarray(action, np.float32)
    if action.shape != space.shape:
        raise SimulatorError(
            f"the expert's action has shape {list(action.shape)}, the environment expects {list(space.shape)}."
        )
    return simulator.within(action, space).astype(np.float32)
