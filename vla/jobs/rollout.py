"""`vla rollout`: evaluate a policy in closed loop, with every seed in every environment.

Owns: the queue of episodes, the loop that decodes chunks for all environments as one batch, and the handling of faults
and interruptions. Worker processes are managed by `vla.simulation.pool`, metrics are computed by
`vla.evaluation.results`, and the report is written by `vla.evaluation.report`.

The loop runs in rounds: fill free slots from the queue, decode one batch, execute `n_action_steps` of each chunk.
Batches therefore do not depend on timing, and the same seeds give the same results.

If the environment raises an exception, the episode ends as a fault. If the worker dies (crashes, hangs or is killed),
the episode is repeated from its seed; if the worker dies again, the episode ends as a fault.
"""

from __future__ import annotations

import collections
import hashlib
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla import config as configuration
from vla.config import RolloutConfig
from vla.errors import ConfigError, SimulatorError
from vla.evaluation import report, results
from vla.evaluation.comparison import common_environments, compare
from vla.evaluation.rerun_sink import FOLDER, SUFFIX, EpisodeRecording, load_rerun
from vla.evaluation.results import Episode
from vla.policy.session import LatentDraw, Session, predict
from vla.simulation.hosts import Fault
from vla.simulation.pool import Description, Pool, ResetResult, StepResult
from vla.spec import RobotSpec
from vla.support import machine
from vla.support.progress import Progress
from vla.support.run_folder import RunFolder

if TYPE_CHECKING:
    from vla.policy import ChunkPolicy, Prediction

VIDEOS = "videos"


def rollout(config: RolloutConfig, policy: ChunkPolicy | None = None) -> dict[str, Any]:
    """Evaluate a policy and write the report folder.

    Args:
        policy: None: load `config.policy`.
    Returns:
        The contents of `eval_info.json`.
    Raises:
        VLAError: configuration, policy and environments are incompatible (raised before the first episode), or every
            episode ended in an environment fault (raised after the results are written).
        KeyboardInterrupt: the run was stopped. Like errors of the policy, it is raised after the finished episodes are
            written with `"interrupted": true`.
    """
    _check(config)
    baseline = results.read(config.compare) if config.compare else None
    if baseline is not None:
        common_environments(config.env, [episode["env_id"] for episode in baseline["per_episode"]])
    episodes = [
        Episode(i * config.episodes + k, env_id, config.seed + k)
        for i, env_id in enumerate(config.env)
        for k in range(config.episodes)
    ]
    with Pool(min(config.n_envs, len(episodes)), config.adapter, config.hosts) as pool:
        descriptions = _describe(pool, config.env)
        identity: dict[str, str | None] = {"path": None, "sha256": None}
        if policy is None:
            from vla.serving import client

            identity = {"path": config.policy, "sha256": hash_of(config.policy)}
            policy = client.load(
                config.policy, config.device, config.unnorm_key, config.n_action_steps, config.decoding, config.dtype
            )
        for env_id, description in descriptions.items():
            robot = RobotSpec.from_dict(description.robot)
            policy.robot.check_fits(robot, f"environment {env_id!r}", tolerated=("names", "rate"))
        steps = policy.n_action_steps if config.n_action_steps is None else config.n_action_steps
        if not 1 <= steps <= policy.horizon:
            raise ConfigError(f"n_action_steps must be between 1 and the horizon {policy.horizon}, got {steps}.")
        _prepare(config)
        run = _Run(pool, policy, episodes, steps, config)
        stopped: BaseException | None = None
        try:
            run.run()
        except (KeyboardInterrupt, Exception) as error:  # re-raised after the finished episodes are written
            stopped = error
    info = results.evaluate(run.finished, run.seconds) | {
        "decode_latency": results.latency(run.forwards),
        "interrupted": stopped is not None,
        "n_episodes_asked": len(episodes),
        "policy": identity,
        "n_action_steps": steps,
        "machine": {
            **machine.describe(),
            "gl": descriptions[config.env[0]].gl,
            "device": str(getattr(policy, "device", "cpu")),
        },
        "config": configuration.to_dict(config),
        "command": f"vla rollout --config {config.out / 'config.yaml'} --overwrite",
    }
    if baseline is not None and stopped is None:
        info["comparison"] = compare(info, baseline)
    results.write(info, config.out)
    report.write(info, config.out)
    print(report.summary(info, config.out))
    if stopped is not None:
        raise stopped
    if all(episode.fault for episode in run.finished):
        raise SimulatorError(f"every episode ended in an environment fault. First fault: {run.finished[0].fault}")
    return info


class _Run:
    """The rounds of one evaluation.

    Attributes:
        finished: the finished episodes, in the order of the queue.
        forwards: (batch size, seconds) of every decoded batch.
        seconds: duration of the evaluation.
    """

    def __init__(
        self, pool: Pool, policy: ChunkPolicy, episodes: Sequence[Episode], n_action_steps: int, config: RolloutConfig
    ) -> None:
        self._pool, self._policy, self._n_action_steps, self._config = pool, policy, n_action_steps, config
        self._queue = deque(episodes)
        self._running: dict[int, Episode] = {}  # by slot
        self._latest: dict[int, ResetResult | StepResult] = {}  # by slot: the last result from its environment
        self._sessions: dict[int, Session] = {}  # by slot
        self._recordings: dict[int, EpisodeRecording] = {}  # by slot
        self._retried: set[int] = set()  # `episode_ix` of the episodes whose worker died
        # Number of kept failures, by "videos" or "rerun" and environment id.
        self._failures: collections.Counter[tuple[str, str]] = collections.Counter()
        self._done: list[Episode] = []
        self._progress = Progress(len(episodes), "episodes")
        self.forwards: list[tuple[int, float]] = []
        self.seconds = 0.0

    @property
    def finished(self) -> list[Episode]:
        return sorted(self._done, key=lambda episode: episode.episode_ix)

    def run(self) -> None:
        """Run all episodes. If an exception interrupts the run, unfinished episodes are dropped."""
        start = time.monotonic()
        try:
            with self._progress:
                while self._queue or self._running:
                    self._fill()
                    self._act(self._decode())
        finally:
            self.seconds = time.monotonic() - start

    def _fill(self) -> None:
        """Start episodes from the queue in the free slots."""
        requests = {}
        for slot in range(len(self._pool)):
            if slot not in self._running and self._queue:
                self._running[slot] = episode = self._queue.popleft()
                self._sessions[slot] = Session(latent=LatentDraw(episode.seed))
                record = self._may_want("videos", episode)
                requests[slot] = ("reset", episode.env_id, episode.seed, record)
        failed: dict[int, str | None] = {}
        for slot, reply in self._pool.exchange(requests).items():
            if isinstance(reply, Fault):
                if not self._retry(slot, reply):
                    failed[slot] = f"at reset: {reply.message}"
                continue
            episode, self._latest[slot] = self._running[slot], reply
            episode.instruction, episode.image_hash = reply.instruction, reply.image_hash
            if self._may_want("rerun", episode):
                tokens = _token_names(self._policy)
                self._recordings[slot] = EpisodeRecording(self._policy.robot, reply.instruction, tokens)
        self._finish(failed)

    def _decode(self) -> dict[int, Prediction]:
        """A prediction for every running episode, decoded as one batch."""
        slots = sorted(self._running)
        if not slots:
            return {}
        for slot in slots:
            self._sessions[slot].instruction = self._latest[slot].instruction
        sessions, observations = zip(
            *((self._sessions[slot], self._latest[slot].observation) for slot in slots), strict=True
        )
        start = time.perf_counter()
        prediction = predict(self._policy, sessions, observations)
        seconds = time.perf_counter() - start
        self.forwards.append((len(slots), seconds))
        for slot in slots:
            self._sessions[slot].advance(self._n_action_steps)
            self._running[slot].n_chunks += 1
            self._running[slot].decode_ms.append(1e3 * seconds)
        return {slot: prediction.row(i) for i, slot in enumerate(slots)}

    def _act(self, predictions: dict[int, Prediction]) -> None:
        """Execute the first `n_action_steps` actions of each chunk, and finish the episodes that end."""
        n = self._n_action_steps
        requests = {slot: ("run", prediction.chunks[0][:n]) for slot, prediction in predictions.items()}
        ended: dict[int, str | None] = {}
        for slot, reply in self._pool.exchange(requests).items():
            episode = self._running[slot]
            if isinstance(reply, Fault):
                when = f"after step {episode.length}" if reply.step is None else f"at step {reply.step}"
                if not self._retry(slot, reply):
                    ended[slot] = f"{when}: {reply.message}"
                continue
            if recording := self._recordings.get(slot):
                recording.observe(episode.length, self._latest[slot].observation)
                recording.execute(episode.length, predictions[slot], len(reply.rewards))
            self._latest[slot] = reply
            _update_episode(episode, reply)
            if reply.terminated or reply.truncated:
                ended[slot] = None
        self._finish(ended)

    def _retry(self, slot: int, fault: Fault) -> bool:
        """If the worker of this slot died for the first time in its episode, put the episode back at the front of the
        queue and return True."""
        episode = self._running[slot]
        if fault.kind != "died" or episode.episode_ix in self._retried:
            return False
        self._retried.add(episode.episode_ix)
        self._queue.appendleft(Episode(episode.episode_ix, episode.env_id, episode.seed))
        del self._running[slot]
        self._recordings.pop(slot, None)
        return True

    def _finish(self, ended: dict[int, str | None]) -> None:
        """Finish the episodes in `ended` (slot -> fault, or None), and save the videos and recordings to keep."""
        clips = {}
        for slot, fault in ended.items():
            episode = self._running[slot]
            if fault is not None:
                episode.fault, episode.success = fault, False
            elif self._wants("videos", episode):
                clips[slot] = ("clip", self._policy.robot.control_hz)
            recording = self._recordings.pop(slot, None)
            if recording is not None and self._wants("rerun", episode):
                recording.observe(episode.length, self._latest[slot].observation)
                episode.rerun_path = _file_name(FOLDER, episode, SUFFIX)
                recording.save(self._config.out / episode.rerun_path, Path(episode.rerun_path).stem)
        videos = self._pool.exchange(clips)
        for slot in ended:
            episode, video = self._running.pop(slot), videos.get(slot)
            if isinstance(video, Fault):
                warnings.warn(f"no video of {episode.env_id}, seed {episode.seed}: {video.message}", stacklevel=2)
            elif video:
                episode.video_path = _file_name(VIDEOS, episode, ".mp4")
                (self._config.out / VIDEOS).mkdir(exist_ok=True)
                (self._config.out / episode.video_path).write_bytes(video)
            self._done.append(episode)
            self._progress.advance(f"{sum(e.success for e in self._done) / len(self._done):.0%} success")

    def _may_want(self, kind: str, episode: Episode) -> bool:
        """Whether the video or recording of a running episode may be kept: it is one of the first, or could be one of
        the first failures. `kind` is "videos" or "rerun"."""
        return self._is_first(kind, episode) or self._failures[kind, episode.env_id] < getattr(self._config, kind)

    def _wants(self, kind: str, episode: Episode) -> bool:
        """Whether to keep the video or recording of a finished episode. Counts kept failures."""
        if self._is_first(kind, episode):
            return True
        if episode.success or not self._may_want(kind, episode):
            return False
        self._failures[kind, episode.env_id] += 1
        return True

    def _is_first(self, kind: str, episode: Episode) -> bool:
        return episode.seed - self._config.seed < getattr(self._config, kind)


def _token_names(policy: ChunkPolicy) -> tuple[str, ...]:
    """The name of the action entry that each token of an action encodes. Empty if tokens do not encode single entries,
    or if the tokenizer is unknown because the policy is on a server."""
    processor = getattr(policy, "processor", None)
    tokenizer = processor and processor.action_tokenizer
    if tokenizer is None or tokenizer.tokens_per_action != len(tokenizer.active):
        return ()
    return tuple(policy.robot.action_names[entry] for entry in tokenizer.active)


def _update_episode(episode: Episode, result: StepResult) -> None:
    """Add the result of executing a chunk to the record of its episode."""
    episode.max_reward = max(result.rewards + [episode.max_reward] * (episode.length > 0))
    episode.sum_reward += sum(result.rewards)
    episode.length += len(result.rewards)
    episode.success, episode.truncated = result.success, result.truncated
    episode.success_ever |= result.ever
    episode.reached = episode.reached if result.reached is None else result.reached
    episode.target = result.target


def _check(config: RolloutConfig) -> None:
    """Reject an invalid configuration or output folder before anything is loaded."""
    configuration.check(config)
    if config.rerun:
        load_rerun()
    folder = RunFolder(config.out, config)
    if folder.is_finished(results.FILE) and not config.overwrite:
        raise ConfigError(f"{config.out} already holds a rollout report. Choose another --out, or pass --overwrite.")
    foreign = folder.entries() - {folder.settings, results.FILE, report.FILE, VIDEOS, FOLDER}
    if foreign:
        raise folder.unrelated_files(min(foreign))
    if not (config.out / results.FILE).is_file():
        folder.read_settings()  # of an interrupted rollout; raises an error if another job wrote it


def _prepare(config: RolloutConfig) -> None:
    """Create the report folder and remove the files of an earlier report."""
    episodes = [*(config.out / VIDEOS).glob("*.mp4"), *(config.out / FOLDER).glob(f"*{SUFFIX}")]
    for stale in [config.out / results.FILE, config.out / report.FILE, *episodes]:
        stale.unlink(missing_ok=True)
    RunFolder(config.out, config).begin()


def _describe(pool: Pool, env_ids: Sequence[str]) -> dict[str, Description]:
    """Create every environment once, in parallel, to raise errors before the first episode."""
    descriptions: dict[str, Description] = {}
    for first in range(0, len(env_ids), len(pool)):
        batch = env_ids[first : first + len(pool)]
        replies = pool.exchange({slot: ("make", env_id) for slot, env_id in enumerate(batch)})
        for slot, env_id in enumerate(batch):
            if isinstance(replies[slot], Fault):
                raise replies[slot].error or SimulatorError(f"environment {env_id!r}: {replies[slot].message}")
            descriptions[env_id] = replies[slot]
    return descriptions


def _file_name(folder: str, episode: Episode, suffix: str) -> str:
    name = results.short(episode.env_id).replace("/", "-")
    return f"{folder}/{name}-seed{episode.seed}-{episode.outcome}{suffix}"


def hash_of(policy: str) -> str | None:
    """sha256 over the names and contents of all files of a checkpoint; None if it is not a local folder."""
    from vla.model.sources.checkpoint import find_checkpoint

    folder = find_checkpoint(policy)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
