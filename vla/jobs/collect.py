"""`vla collect`: run an expert in an environment and write its successful episodes as a dataset.

Owns: the environment and seed of every episode, and the handling of failed attempts and interruptions. It does not know
the format on disk (`data.writer`) or how an attempt runs (`simulation.experts`).

Episode `n` depends only on the configuration and `n`, not on the number of workers or on interruptions. If an attempt
fails, the next one has another seed, which depends only on `n` and the number of the attempt. If a worker dies, its
attempt is repeated once with the same seed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from vla import config as configuration
from vla.config import CollectConfig
from vla.data.format import INFO, PLAN, STAGING, Info, read_json
from vla.data.packing import finalise
from vla.data.staging import EPISODE, check_staging, drop_staging, finished, open_staging
from vla.errors import ConfigError, SimulatorError
from vla.simulation import adapter as simulator
from vla.simulation.experts import PATIENCE_S, Attempt, ExpertServer, Outcome, Recording
from vla.simulation.hosts import Fault
from vla.simulation.pool import Pool
from vla.spec import RobotSpec
from vla.support import machine
from vla.support.progress import Progress
from vla.support.run_folder import RunFolder, read_lines, write_text

FAILURES = "failures.jsonl"  # one line per attempt that was not kept
FREE = ("episodes", "workers", "hosts")  # may change when a collection is resumed

RETRY_SEED_OFFSET = 1_000_000  # added to an episode's seed per retry; larger than the number of episodes
MAX_FAILURES_WITHOUT_SUCCESS = 50  # stop after this many failed attempts in an environment without a success
MAX_ERRORS_WITHOUT_SUCCESS = 10  # the same, if all failed attempts ended in an error
MAX_ATTEMPTS = 200  # stop after this many failed attempts at one episode

_console = Console(stderr=True)


def attempt(config: CollectConfig, episode: int, turn: int) -> Attempt:
    """Attempt number `turn` at an episode of the dataset."""
    environment = episode % len(config.env)
    index = episode // len(config.env)  # in its environment, so that all environments have the same share of noise
    noisy = int((index + 1) * config.noise_share) > int(index * config.noise_share)
    return Attempt(
        episode=episode,
        turn=turn,
        env_id=config.env[environment],
        seed=config.seed + episode + turn * RETRY_SEED_OFFSET,
        noise=config.noise if noisy else 0.0,
    )


def collect(config: CollectConfig) -> Path:
    """Collect `config.episodes` demonstrations into the dataset `config.out` and return its folder.

    Raises:
        ConfigError, DataError: the configuration is invalid, or the folder is in use.
        SimulatorError: the environment cannot be created, or the expert never succeeds.
    """
    configuration.check(config)
    if config.resume and (config.out / INFO).is_file():
        shutil.rmtree(config.out / STAGING, ignore_errors=True)  # left by a process killed after the last rename
        RunFolder(config.out, config, PLAN, FREE).check_settings()
        existing = Info.load(config.out).total_episodes
        if existing < config.episodes:
            raise ConfigError(
                f"{config.out} is a complete dataset of {existing} episodes and cannot be extended to "
                f"{config.episodes}. Collect the remaining episodes into a second folder (with --seed "
                f"{config.seed + existing}) and train on both."
            )
        _console.print(f"{config.out} is already complete.", highlight=False)
        return config.out
    check_staging(config.out, config.resume)
    robot = _shared_robot(config)
    if config.resume and not finished(config.out / STAGING):  # no episodes yet: the settings may change
        drop_staging(config.out)
    staging = open_staging(config.out, config.resume)
    plan = RunFolder(config.out, config, f"{STAGING}/{PLAN}", FREE)
    plan.check_settings()
    plan.begin()
    try:
        run = _Run(config, staging, robot)
        run.complete()
    except BaseException as error:
        done = len(finished(staging))
        if isinstance(error, KeyboardInterrupt):
            _console.print(f"{done} of {config.episodes} episodes are finished.", highlight=False)
        if not done:
            drop_staging(config.out)
        raise
    shutil.copy(staging / PLAN, config.out / PLAN)
    run.write_failures(config.out / FAILURES)
    with _console.status("writing the dataset ..."):
        finalise(config.out, range(config.episodes))
    run.summarise()
    return config.out


class _Run:
    """The state of a collection: finished episodes, remaining attempts and failed attempts."""

    def __init__(self, config: CollectConfig, staging: Path, robot: RobotSpec) -> None:
        self.config, self.staging = config, staging
        self.done = {number for number in finished(staging) if number < config.episodes}
        self.failures = [row for row in read_lines(staging / FAILURES) if row["episode"] < config.episodes]
        turns = Counter(failure["episode"] for failure in self.failures)
        self.todo = [attempt(config, n, turns[n]) for n in range(config.episodes) if n not in self.done]
        self.solved = sum(self._about(number)["success"] for number in self.done)
        self.frames = 0  # collected by this process
        self.start = time.monotonic()
        self._deaths: Counter[Attempt] = Counter()
        for number in sorted(self.done)[:1]:
            about = self._about(number)
            _check_same_robot(config.env[0], robot.to_dict(), about["env_id"], about["robot"])

    def complete(self) -> None:
        """Collect all missing episodes."""
        if not self.todo:
            return
        config = self.config
        recording = Recording(
            staging=self.staging.resolve(),
            keep_all=config.keep == "all",
            executed_actions=config.noise > 0 or ":" in config.adapter.expert,
        )
        count = min(config.workers or machine.cores(), len(self.todo))
        try:
            with (
                Pool(count, config.adapter, config.hosts, ExpertServer, PATIENCE_S) as pool,
                Progress(config.episodes, "episodes", done=len(self.done)) as progress,
            ):
                running: dict[int, Attempt] = {}  # by slot
                last: dict[int, str] = {}  # by slot: environment id of the last attempt
                while self.todo or running:
                    for slot in pool.idle[: len(self.todo)]:
                        running[slot] = self._next(last.get(slot))
                        last[slot] = running[slot].env_id
                        pool.submit(slot, ("attempt", running[slot], recording))
                    for slot, reply in pool.completed().items():
                        self._handle_reply(running.pop(slot), reply)
                        if reply.kind == "kept":
                            progress.advance(self.describe())
        finally:
            for leftover in self.staging.glob(".episode-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def write_failures(self, path: Path) -> None:
        """Write the failed attempts of this dataset, sorted by episode and attempt."""
        if not self.failures:
            return
        ordered = sorted(self.failures, key=lambda failure: (failure["episode"], failure["turn"]))
        write_text(path, "".join(json.dumps(failure) + "\n" for failure in ordered))

    def summarise(self) -> None:
        seconds = time.monotonic() - self.start
        rate = (
            f", {self.frames} frames in {seconds:.0f} s ({self.frames / seconds:.0f} per second)" if self.frames else ""
        )
        _console.print(
            f"{self.config.out}: {len(self.done)} episodes{rate}; {self._share()} of all attempts succeeded.",
            highlight=False,
        )
        errors = [failure for failure in self.failures if failure["kind"] != "failed"]
        if errors:
            _console.print(
                f"{len(errors)} attempts ended in an error and were retried. Last error: {errors[-1]['message']} "
                f"(all errors are in {self.config.out / FAILURES})",
                highlight=False,
            )

    def describe(self) -> str:
        """Frame rate and success rate so far, for the progress bar."""
        return f"{self.frames / (time.monotonic() - self.start):.0f} frames/s, {self._share()} succeeded"

    def _share(self) -> str:
        tried = len(self.done) + len(self.failures)
        return f"{self.solved / tried:.0%}" if tried else "-"

    def _about(self, number: int) -> dict[str, Any]:
        return read_json(self.staging / EPISODE.format(number) / "episode.json")

    def _next(self, env_id: str | None) -> Attempt:
        """Take the next attempt, if possible one in `env_id`, the environment that the worker has already created."""
        same = (i for i, tried in enumerate(self.todo) if tried.env_id == env_id)
        return self.todo.pop(next(same, 0))

    def _handle_reply(self, tried: Attempt, outcome: Outcome | Fault) -> None:
        if isinstance(outcome, Fault) and outcome.error is not None:  # every further attempt would fail as well
            raise outcome.error
        if isinstance(outcome, Outcome) and outcome.kind == "kept":
            self.done.add(tried.episode)
            self.solved += outcome.success
            self.frames += outcome.frames
            return
        if outcome.kind == "died" and not self._deaths[tried]:
            self._deaths[tried] += 1  # the worker may have been killed from outside: repeat the attempt once
            self.todo.insert(0, tried)
            return
        failure = dataclasses.asdict(tried) | {"kind": outcome.kind, "message": outcome.message}
        self.failures.append(failure)
        with (self.staging / FAILURES).open("a") as file:
            file.write("\n" + json.dumps(failure))  # "\n" first: a killed process may have left half a line
        self._check_failures(tried, outcome)
        self.todo.insert(0, attempt(self.config, tried.episode, tried.turn + 1))

    def _check_failures(self, tried: Attempt, outcome: Outcome | Fault) -> None:
        """Raise SimulatorError if further attempts in this environment are unlikely to succeed."""
        if any(attempt(self.config, number, 0).env_id == tried.env_id for number in self.done):
            if tried.turn + 1 < MAX_ATTEMPTS:
                return
            raise SimulatorError(
                f"episode {tried.episode} ({tried.env_id!r}) failed with {MAX_ATTEMPTS} seeds. Last attempt: "
                f"{outcome.message}"
            )
        here = [failure for failure in self.failures if failure["env_id"] == tried.env_id]
        if len(here) >= MAX_ERRORS_WITHOUT_SUCCESS and all(failure["kind"] != "failed" for failure in here):
            raise SimulatorError(
                f"all of the first {len(here)} attempts in environment {tried.env_id!r} ended in an error. Last error "
                f"(seed {tried.seed}): {outcome.message}"
            )
        if len(here) >= MAX_FAILURES_WITHOUT_SUCCESS:
            raise SimulatorError(
                f"the expert failed in all of the first {len(here)} attempts in environment {tried.env_id!r}. "
                f"Check that the environment's `info` has the success flag {self.config.adapter.success!r} "
                "(adapter.success) and that adapter.max_steps is large enough. `--keep all` also keeps failed episodes."
            )


def _shared_robot(config: CollectConfig) -> RobotSpec:
    """The RobotSpec of all environments. Creates each environment once, to raise errors before anything is written."""
    robots: dict[str, RobotSpec] = {}
    for env_id in dict.fromkeys(config.env):
        with simulator.make(env_id, config.adapter) as env:
            env.make_expert()
        robots[env_id] = env.robot
        _check_same_robot(env_id, env.robot.to_dict(), config.env[0], robots[config.env[0]].to_dict())
    return robots[config.env[0]]


def _check_same_robot(env_id: str, robot: dict[str, Any], first_id: str, first: dict[str, Any]) -> None:
    if robot != first:
        different = [key for key in robot if robot[key] != first[key]]
        raise SimulatorError(
            f"{env_id!r} and {first_id!r} cannot share a dataset, because their robots differ in "
            f"{', '.join(different)}. Collect them into two datasets and train on both."
        )
