"""Roll-ins: episodes that a student and an expert drive together, with the expert's opinion of every state.

Owns: the data collection of DAgger (Ross, Gordon and Bagnell 2011, algorithm 3.1): who moves the robot when, and a
dataset in which `action` is what the expert would have done and `executed_action` what was done. Every episode stays,
solved or not: states from which the student does not find back are what the expert's own demonstrations lack. It does
not know rounds' results, training or evaluation.

With interventions, most of a roll-in only leads to where the expert is asked: it is not recorded, and neither are
roll-ins that are over before.

Episodes are played in waves of as many as run side by side, and a wave that was interrupted is played again as a whole:
the student then decodes the same batches, whose size touches the last digits of a network's output. So the dataset
depends on the configuration and the student alone.

The label of a chunk is what the expert says along the states that were visited. Where the student drives, only its
first action is what the expert would do from there; where the expert drives, all that are executed are, and in an
intervention all that there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.config import DaggerConfig
from vla.config.training import ROUNDS_APART
from vla.data.packing import finalise
from vla.data.staging import finished, open_staging
from vla.data.writer import EpisodeRecorder
from vla.errors import SimulatorError
from vla.policy.session import Session, predict
from vla.simulation.adapter import Expert
from vla.simulation.experts import EXPERT_SEED, consult, executable
from vla.simulation.hosts import Fault
from vla.simulation.pool import EnvServer, Pool, ResetResult, StepResult, check_shared
from vla.support.progress import Progress

if TYPE_CHECKING:
    from vla.policy import ChunkPolicy

TURNS_APART = 1_000_000  # between the seed of an episode and that of its next try, when the environment failed
TRIES = 5  # of one episode

Scene = tuple[str, int]  # environment id, seed


def scenes_of(config: DaggerConfig, number: int, shares: Sequence[float] | None = None) -> list[Scene]:
    """Where round `number` is played: over the environments evenly, or in proportion to `shares`, one per environment.

    Environment after environment, because a worker that changes it spends longer on that than on an episode.
    """
    ends = np.cumsum(np.ones(len(config.env)) if shares is None else shares)
    places = np.searchsorted(ends / ends[-1], (np.arange(config.episodes) + 0.5) / config.episodes)
    return [(config.env[place], first_seed(config, number) + k) for k, place in enumerate(places)]


def first_seed(config: DaggerConfig, number: int) -> int:
    return config.seed + ROUNDS_APART * number


def roll_in(config: DaggerConfig, number: int, student: ChunkPolicy, out: Path, scenes: Sequence[Scene]) -> Path | None:
    """Play `scenes` in round `number` with a student that knows their environments, and return the dataset `out`; None:
    every roll-in was over before the expert was asked.

    What an earlier call has left in `out` is continued.

    Raises:
        DataError: `out` holds something else, or the disk is full.
        SimulatorError: an episode fails with seed after seed.
    """
    staging = open_staging(out, resume=out.exists())
    done, size = {*finished(staging), *_unasked(staging)}, min(config.n_envs, len(scenes))
    waves = [range(first, min(first + size, len(scenes))) for first in range(0, len(scenes), size)]
    todo = [wave for wave in waves if not done.issuperset(wave)]
    with (
        Pool(size, config.adapter, config.hosts, Labeller) as pool,
        Progress(len(scenes), "roll-ins", done=len(scenes) - sum(map(len, todo))) as progress,
    ):
        for wave in todo:
            trials = [_Trial(config, number, episode, scenes[episode]) for episode in wave]
            _Wave(trials, number, student, pool, staging.resolve(), progress).play()
    if not finished(staging):
        return None
    finalise(out)
    return out


def _unasked(staging: Path) -> list[int]:
    """Numbers of the episodes that were over before the expert was asked."""
    return [int(path.name.removeprefix("unasked-")) for path in staging.glob("unasked-*")]


class Labeller(EnvServer):
    """A worker that asks its environment's expert before every step, and records what it says if it is asked to."""

    _expert: Expert
    _observation: Any
    _episode: EpisodeRecorder | None = None
    _about: dict[str, Any]
    _length: int | None
    _unasked: Path

    def begin(self, env_id: str, seed: int, staging: Path, number: int, length: int | None) -> ResetResult:
        """Start the episode that is to become number `number` of the recording; it ends after `length` frames."""
        check_shared(staging)
        start = self.reset(env_id, seed, False)
        assert self.env is not None
        self._expert = self.env.make_expert(seed=EXPERT_SEED + seed)
        self._observation = start.observation
        self._episode = EpisodeRecorder(staging, number, self.env.robot, executed_actions=True)
        self._about = {"instruction": start.instruction, "env_id": env_id, "seed": seed}
        self._length, self._unasked = length, staging / f"unasked-{number:06d}"
        return start

    def drive(self, actions: np.ndarray, overruled: np.ndarray, asked: bool) -> StepResult:
        """Execute `actions` [n, D], or the expert's own where `overruled` [n] says so; record them and what the expert
        says if it is `asked`; finish what ends meanwhile, or, before it was ever asked, mark it as such."""
        if self.env is None or self._episode is None:
            raise SimulatorError("there is no episode to go on with: begin comes first.")
        for action, expert_drives in zip(actions, overruled, strict=True):
            own, label = consult(self._expert, self.env.action_space)
            executed = own if expert_drives else executable(action, self.env.action_space)
            if asked:
                self._episode.record(self._observation, label, executed_action=executed)
            stretch = self.run(executed[None])
            self._observation = stretch.observation
            if asked:
                self._episode.outcome(stretch.success)
            over, enough = stretch.terminated or stretch.truncated, len(self._episode) == self._length
            if over or enough:
                if asked:
                    self._episode.finish(success=stretch.success if over else None, **self._about)
                else:
                    self._episode.discard()
                    self._unasked.touch()
                return dataclasses.replace(stretch, truncated=stretch.truncated or enough)
        return stretch

    def abandon(self) -> None:
        if self._episode is not None:
            self._episode.discard()
        super().abandon()


class _Trial:
    """One try at an episode of a round, and what it carries from chunk to chunk."""

    def __init__(self, config: DaggerConfig, number: int, episode: int, scene: Scene, turn: int = 0) -> None:
        self._made_of = (config, number, episode, scene, turn)
        self.episode = episode
        self.env_id = scene[0]
        self.seed = scene[1] + TURNS_APART * turn
        self.session = Session()
        # Not the numbers that lay out the scene, which the seed alone would give.
        self._coins = np.random.default_rng([self.seed, 1])
        self._beta = config.beta**number
        self._mixture = config.mixture
        self._whole = self._flip(1)[0]
        self._intervenes, self._after = config.intervention is not None, config.intervention_after
        self.length = config.intervention  # of what is recorded
        self.asked = not self._intervenes

    def decide(self, steps: int) -> np.ndarray:
        """At which of the next `steps` steps the expert drives, bool [steps], and (`asked`) whether they are labelled.

        The paper flips a coin at every step of a policy that decides at every step. A policy of chunks decides once in
        `steps`, and so does the coin by default: the rest of a chunk is a plan from where its first action led, and an
        expert that takes over in its midst would leave behind actions that nobody chose for the state they act on. The
        expert's turns are as long, and are the places where what it says about a chunk is a plan that was carried out.
        """
        if self._intervenes:
            self.asked = self.asked or bool(self._coins.random() < 1 / (1 + self._after))
            if self.asked:
                return np.ones(steps, bool)
        if self._mixture == "step":
            return self._flip(steps)
        drives = self._whole if self._mixture == "episode" else self._flip(1)[0]
        return np.full(steps, drives)

    def after(self, fault: Fault) -> _Trial:
        """The next try, with another seed."""
        config, number, episode, scene, turn = self._made_of
        if turn + 1 == TRIES:
            raise SimulatorError(
                f"environment {self.env_id!r}: episode {episode} of round {number} failed with {TRIES} seeds; the last "
                f"one ({self.seed}): {fault.message}"
            )
        return _Trial(config, number, episode, scene, turn + 1)

    def _flip(self, count: int) -> np.ndarray:
        return self._coins.random(count) < self._beta  # never for 0, always for 1


class _Wave:
    """Episodes that run side by side: one forward decodes for all that the student drives."""

    def __init__(
        self,
        trials: Sequence[_Trial],
        number: int,
        student: ChunkPolicy,
        pool: Pool,
        staging: Path,
        progress: Progress,
    ) -> None:
        self._number, self._student = number, student
        self._pool, self._staging, self._progress = pool, staging, progress
        self._trials = dict(enumerate(trials))  # by slot: of all episodes that have not ended
        self._views: dict[int, ResetResult | StepResult] = {}  # by slot: the last that was seen of those under way

    def play(self) -> None:
        """Play the episodes to their ends."""
        while self._trials:
            fresh = {slot: trial for slot, trial in self._trials.items() if slot not in self._views}
            begin = {s: (t.env_id, t.seed, self._staging, t.episode, t.length) for s, t in fresh.items()}
            self._exchange({slot: ("begin", *arguments) for slot, arguments in begin.items()})
            self._exchange(self._drive())

    def _drive(self) -> dict[int, tuple[Any, ...]]:
        """What to ask of every episode that is under way."""
        steps = self._student.n_action_steps
        overruled = {slot: self._trials[slot].decide(steps) for slot in self._views}
        chunks = dict.fromkeys(self._views, np.zeros((steps, self._student.robot.action_dim), np.float32))
        asked = [slot for slot in self._views if not overruled[slot].all()]
        if asked:
            for slot in asked:
                self._trials[slot].session.instruction = self._views[slot].instruction
            sessions = [self._trials[slot].session for slot in asked]
            prediction = predict(self._student, sessions, [self._views[slot].observation for slot in asked])
            chunks |= dict(zip(asked, prediction.chunks[:, :steps], strict=True))
        for slot in self._views:
            self._trials[slot].session.advance(steps)
        return {slot: ("drive", chunks[slot], overruled[slot], self._trials[slot].asked) for slot in self._views}

    def _exchange(self, requests: dict[int, tuple[Any, ...]]) -> None:
        for slot, reply in self._pool.exchange(requests).items():
            self._views[slot] = reply
            if isinstance(reply, Fault):
                del self._views[slot]
                self._trials[slot] = self._trials[slot].after(reply)
            elif isinstance(reply, StepResult) and (reply.terminated or reply.truncated):
                del self._views[slot], self._trials[slot]
                self._progress.advance(f"round {self._number}")
