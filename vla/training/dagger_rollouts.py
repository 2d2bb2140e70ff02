"""DAgger rollouts: episodes under shared control of policy and expert, with the expert's label for every state.

Owns: the data collection of DAgger (Ross, Gordon and Bagnell, 2011, algorithm 3.1): the choice between policy and
expert, and a dataset in which `action` is the expert's label and `executed_action` the executed action. Unsolved
episodes are kept, because they contain states that demonstrations lack. With interventions, only the intervention is
recorded; episodes that end before it are discarded. It does not know the results of rounds, training or evaluation.

Episodes run in batches of `n_envs`, and an interrupted batch is repeated completely: the policy's outputs depend
slightly on the batch size, so otherwise the dataset would depend on interruptions.

A chunk's labels are the expert's actions in the visited states. If the expert controls the robot, they are its plan
from the chunk's first state. If the policy controls the robot, only the first label is.
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
from vla.policy.session import LatentDraw, Session, predict
from vla.simulation.adapter import Expert
from vla.simulation.experts import EXPERT_SEED, consult, executable
from vla.simulation.hosts import Fault
from vla.simulation.pool import EnvServer, Pool, ResetResult, StepResult, check_shared
from vla.support.progress import Progress

if TYPE_CHECKING:
    from vla.policy import ChunkPolicy

RETRY_SEED_OFFSET = 1_000_000  # added to an episode's seed per retry after an environment fault
MAX_ATTEMPTS = 5  # per episode

Scene = tuple[str, int]  # environment id, seed


def scenes_of(config: DaggerConfig, number: int, shares: Sequence[float] | None = None) -> list[Scene]:
    """The scenes of round `number`, distributed evenly over the environments, or in proportion to `shares`.

    They are sorted by environment, because creating an environment is slow.
    """
    ends = np.cumsum(np.ones(len(config.env)) if shares is None else shares)
    places = np.searchsorted(ends / ends[-1], (np.arange(config.episodes) + 0.5) / config.episodes)
    return [(config.env[place], first_seed(config, number) + k) for k, place in enumerate(places)]


def first_seed(config: DaggerConfig, number: int) -> int:
    return config.seed + ROUNDS_APART * number


def collect_rollouts(
    config: DaggerConfig, number: int, policy: ChunkPolicy, out: Path, scenes: Sequence[Scene]
) -> Path | None:
    """Run `scenes` in round `number` and return the dataset `out`; None if all episodes ended before an intervention.

    An interrupted collection in `out` is continued.

    Raises:
        DataError: `out` contains unrelated files, or the disk is full.
        SimulatorError: `MAX_ATTEMPTS` attempts at an episode failed.
    """
    staging = open_staging(out, resume=out.exists())
    done, size = {*finished(staging), *_unlabelled(staging)}, min(config.n_envs, len(scenes))
    batches = [range(first, min(first + size, len(scenes))) for first in range(0, len(scenes), size)]
    todo = [batch for batch in batches if not done.issuperset(batch)]
    with (
        Pool(size, config.adapter, config.hosts, LabellingServer) as pool,
        Progress(len(scenes), "rollouts", done=len(scenes) - sum(map(len, todo))) as progress,
    ):
        for batch in todo:
            rollouts = [_Rollout(config, number, episode, scenes[episode]) for episode in batch]
            _Batch(rollouts, number, policy, pool, staging.resolve(), progress).run()
    if not finished(staging):
        return None
    finalise(out)
    return out


def _unlabelled(staging: Path) -> list[int]:
    """Numbers of the episodes that ended before an intervention."""
    return [int(path.name.removeprefix("unasked-")) for path in staging.glob("unasked-*")]


class LabellingServer(EnvServer):
    """A worker that queries its environment's expert before every step and records the labels on request."""

    _expert: Expert
    _observation: Any
    _episode: EpisodeRecorder | None = None
    _about: dict[str, Any]
    _length: int | None
    _unlabelled: Path  # marker file of an episode that ended before its intervention

    def begin(self, env_id: str, seed: int, staging: Path, number: int, length: int | None) -> ResetResult:
        """Start episode `number` of the dataset; it ends after `length` recorded frames."""
        check_shared(staging)
        start = self.reset(env_id, seed, False)
        assert self.env is not None
        self._expert = self.env.make_expert(seed=EXPERT_SEED + seed)
        self._observation = start.observation
        self._episode = EpisodeRecorder(staging, number, self.env.robot, executed_actions=True)
        self._about = {"instruction": start.instruction, "env_id": env_id, "seed": seed}
        self._length, self._unlabelled = length, staging / f"unasked-{number:06d}"
        return start

    def drive(self, actions: np.ndarray, by_expert: np.ndarray, label: bool) -> StepResult:
        """Execute `actions` [n, D], or the expert's action where `by_expert` [n] is True, up to the episode's end.

        Args:
            label: record the executed actions and the expert's labels.
        """
        if self.env is None or self._episode is None:
            raise SimulatorError("no episode is running: call begin first.")
        for action, expert_drives in zip(actions, by_expert, strict=True):
            own, labelled = consult(self._expert, self.env.action_space)
            executed = own if expert_drives else executable(action, self.env.action_space)
            if label:
                self._episode.record(self._observation, labelled, executed_action=executed)
            result = self.run(executed[None])
            self._observation = result.observation
            if label:
                self._episode.outcome(result.success)
            over, enough = result.terminated or result.truncated, len(self._episode) == self._length
            if over or enough:
                if label:
                    self._episode.finish(success=result.success if over else None, **self._about)
                else:
                    self._episode.discard()
                    self._unlabelled.touch()
                return dataclasses.replace(result, truncated=result.truncated or enough)
        return result

    def abandon(self) -> None:
        if self._episode is not None:
            self._episode.discard()
        super().abandon()


class _Rollout:
    """One attempt at an episode of a round: its seed, its session, and the choice between policy and expert."""

    def __init__(self, config: DaggerConfig, number: int, episode: int, scene: Scene, turn: int = 0) -> None:
        self._arguments = (config, number, episode, scene, turn)
        self.episode = episode
        self.env_id = scene[0]
        self.seed = scene[1] + RETRY_SEED_OFFSET * turn
        self.session = Session(latent=LatentDraw(self.seed))
        # The second number makes the choices independent of the scene layout, which depends on the seed.
        self._coins = np.random.default_rng([self.seed, 1])
        self._beta = config.beta**number
        self._mixture = config.mixture
        self._whole = self._flip(1)[0]
        self._intervenes, self._after = config.intervention is not None, config.intervention_after
        self.length = config.intervention  # number of recorded frames
        self.labelled = not self._intervenes

    def decide(self, steps: int) -> np.ndarray:
        """Whether the expert controls the robot in each of the next `steps` steps, bool [steps]. Sets `labelled`.

        The paper chooses between policy and expert at every step. With action chunks, the default is one choice per
        chunk: if the expert took over within a chunk, the remaining actions would be executed in states that they were
        not predicted for.
        """
        if self._intervenes:
            self.labelled = self.labelled or bool(self._coins.random() < 1 / (1 + self._after))
            if self.labelled:
                return np.ones(steps, bool)
        if self._mixture == "step":
            return self._flip(steps)
        drives = self._whole if self._mixture == "episode" else self._flip(1)[0]
        return np.full(steps, drives)

    def after(self, fault: Fault) -> _Rollout:
        """The next attempt after a failure, with another seed."""
        config, number, episode, scene, turn = self._arguments
        if turn + 1 == MAX_ATTEMPTS:
            raise SimulatorError(
                f"environment {self.env_id!r}: episode {episode} of round {number} failed with {MAX_ATTEMPTS} seeds. "
                f"Last error (seed {self.seed}): {fault.message}"
            )
        return _Rollout(config, number, episode, scene, turn + 1)

    def _flip(self, count: int) -> np.ndarray:
        return self._coins.random(count) < self._beta  # 0: never, 1: always


class _Batch:
    """Episodes that run in parallel. The policy predicts chunks for the episodes it controls as one batch."""

    def __init__(
        self,
        rollouts: Sequence[_Rollout],
        number: int,
        policy: ChunkPolicy,
        pool: Pool,
        staging: Path,
        progress: Progress,
    ) -> None:
        self._number, self._policy = number, policy
        self._pool, self._staging, self._progress = pool, staging, progress
        self._rollouts = dict(enumerate(rollouts))  # running episodes by slot
        self._latest: dict[int, ResetResult | StepResult] = {}  # by slot: the last result of a started episode

    def run(self) -> None:
        """Run all episodes to their end."""
        while self._rollouts:
            new = {slot: rollout for slot, rollout in self._rollouts.items() if slot not in self._latest}
            begin = {s: (t.env_id, t.seed, self._staging, t.episode, t.length) for s, t in new.items()}
            self._exchange({slot: ("begin", *arguments) for slot, arguments in begin.items()})
            self._exchange(self._drive())

    def _drive(self) -> dict[int, tuple[Any, ...]]:
        """The next request for every started episode."""
        steps = self._policy.n_action_steps
        by_expert = {slot: self._rollouts[slot].decide(steps) for slot in self._latest}
        chunks = dict.fromkeys(self._latest, np.zeros((steps, self._policy.robot.action_dim), np.float32))
        controlled = [slot for slot in self._latest if not by_expert[slot].all()]
        if controlled:
            for slot in controlled:
                self._rollouts[slot].session.instruction = self._latest[slot].instruction
            sessions = [self._rollouts[slot].session for slot in controlled]
            prediction = predict(self._policy, sessions, [self._latest[slot].observation for slot in controlled])
            chunks |= dict(zip(controlled, prediction.chunks[:, :steps], strict=True))
        for slot in self._latest:
            self._rollouts[slot].session.advance(steps)
        return {slot: ("drive", chunks[slot], by_expert[slot], self._rollouts[slot].labelled) for slot in self._latest}

    def _exchange(self, requests: dict[int, tuple[Any, ...]]) -> None:
        for slot, reply in self._pool.exchange(requests).items():
            self._latest[slot] = reply
            if isinstance(reply, Fault):
                del self._latest[slot]
                self._rollouts[slot] = self._rollouts[slot].after(reply)
            elif isinstance(reply, StepResult) and (reply.terminated or reply.truncated):
                del self._latest[slot], self._rollouts[slot]
                self._progress.advance(f"round {self._number}")
