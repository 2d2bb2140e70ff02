"""`vla dagger`: the policy (here, the student) acts, the expert labels, and interruptions change nothing."""

import json
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tests.forked import Process
from tests.jobs.test_collect import same_files
from tests.pointworld import ENV_ID, PointWorld
from vla import config as configuration
from vla.config import AdapterConfig, CollectConfig, DaggerConfig, TrainConfig
from vla.config.training import ROUNDS_APART
from vla.data.reader import Demonstrations
from vla.data.staging import finished
from vla.errors import ConfigError, DataError, SimulatorError
from vla.jobs.collect import collect
from vla.jobs.dagger import dagger
from vla.policy import Prediction
from vla.policy.session import Draft
from vla.simulation import adapter as simulator
from vla.training import dagger_rollouts
from vla.training.dagger_rollouts import scenes_of


def prediction(chunks: np.ndarray) -> Prediction:
    return Prediction(chunks, *np.zeros((3, len(chunks), 1)), 1, tuple(map(Draft, chunks)))


class Wanderer:
    """A student that moves down a slope, sometimes beyond the robot's range. As in networks, the last digits of its
    predictions depend on the batch size."""

    horizon, n_action_steps = 4, 3

    def __init__(self, stop_at: int | None = None) -> None:
        self.robot = simulator.make(ENV_ID, adapter()).robot
        self.batches: list[int] = []
        self._stop_at = stop_at

    def predict(self, observations, instructions, drafts=None):
        if len(self.batches) == self._stop_at:
            raise KeyboardInterrupt
        self.batches.append(len(observations))
        assert len(drafts) == len(instructions) == len(observations)
        return prediction(np.stack([self.plan(o["agent_pos"]) for o in observations]) + 1e-4 * len(observations))

    def plan(self, state: np.ndarray) -> np.ndarray:
        ahead = np.arange(1, self.horizon + 1, dtype=np.float32)[:, None]
        return 0.1 * ahead * np.array([1 - state[0], 5 * (state[1] - 0.5), 9.0], np.float32)


def adapter(**kwargs) -> AdapterConfig:
    return AdapterConfig(module="tests.pointworld", kwargs=kwargs)


def settings(beta: float = 0.5, episodes: int = 5, kwargs: dict | None = None, **values) -> DaggerConfig:
    return DaggerConfig(
        env=(ENV_ID,), beta=beta, episodes=episodes, n_envs=2, adapter=adapter(**kwargs or {}), **values
    )


def rollouts(config: DaggerConfig, number: int, student: "Wanderer", out: Path) -> Path | None:
    return dagger_rollouts.collect_rollouts(config, number, student, out, scenes_of(config, number))


def blocks(demos: Demonstrations):
    """(executed, labels, states, length) of each decision of each episode."""
    for episode in demos.episodes:
        for first in range(episode.start, episode.start + episode.length, Wanderer.n_action_steps):
            rows = slice(first, min(first + Wanderer.n_action_steps, episode.start + episode.length))
            yield demos.executed_actions[rows], demos.actions[rows], demos.states[rows]


def by_student(executed: np.ndarray, states: np.ndarray, student: Wanderer) -> bool:
    return np.allclose(executed, np.clip(student.plan(states[0])[: len(executed)], -1, 1), atol=1e-3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A reference without interruption. Two of its episodes cannot be solved, and one is replaced."""
    out = tmp_path_factory.mktemp("dagger") / "mixed"
    return rollouts(settings(0.2, kwargs=SOME_FAIL), 1, Wanderer(), out)


SOME_FAIL = {"unsolvable": [ROUNDS_APART + 1, ROUNDS_APART + 2], "raise_on": [ROUNDS_APART + 3]}


def test_labels_are_the_experts_actions_for_the_visited_states(mixed):
    demos = Demonstrations(mixed)
    env = simulator.make(ENV_ID, adapter(**SOME_FAIL))
    for episode in demos.episodes:
        observation, _ = env.reset(seed=episode.seed)
        expert = env.make_expert()
        assert (episode.env_id, episode.noise) == (ENV_ID, 0)
        for row in range(episode.start, episode.start + episode.length):
            assert np.array_equal(demos.states[row], observation["agent_pos"])
            expert.act()
            assert np.array_equal(demos.actions[row], np.float32(expert.label))
            observation, _, over, late, info = env.step(demos.executed_actions[row])
        assert (over or late) and info["is_success"] == episode.success
    assert not np.allclose(demos.actions, demos.executed_actions)


def test_failures_are_kept_and_faults_are_replaced(mixed):
    found = {episode.seed - ROUNDS_APART: episode for episode in Demonstrations(mixed).episodes}
    assert list(found) == [0, 1, 2, 1_000_003, 4]
    assert [episode.success for episode in found.values()] == [True, False, False, True, False]
    assert found[1].length == found[2].length == 60


ALL_FAIL = {"unsolvable": list(range(ROUNDS_APART, ROUNDS_APART + 5))}  # long episodes, to identify who acts


def test_the_expert_acts_for_whole_decisions(tmp_path):
    drivers, student = [], Wanderer()
    demos = Demonstrations(rollouts(settings(kwargs=ALL_FAIL), 1, student, tmp_path / "set"))
    for executed, labels, states in blocks(demos):
        drivers.append(by_student(executed, states, student))
        assert drivers[-1] or np.array_equal(executed, labels)
    assert len(drivers) == 100 and 0.35 < np.mean(drivers) < 0.65


def test_the_expert_is_chosen_per_step_or_per_episode(tmp_path):
    student = Wanderer()
    steps = Demonstrations(rollouts(settings(mixture="step", kwargs=ALL_FAIL), 1, student, tmp_path / "s"))
    own = np.all(steps.executed_actions == steps.actions, axis=1)
    assert 0.3 < own.mean() < 0.7
    shared = [not by_student(e, s, student) and not np.array_equal(e, a) for e, a, s in blocks(steps)]
    assert np.mean(shared) > 0.5, "both act within one decision"
    episodes = Demonstrations(rollouts(settings(mixture="episode", kwargs=ALL_FAIL), 1, student, tmp_path / "e"))
    own = np.all(episodes.executed_actions == episodes.actions, axis=1)
    assert {own[episode.rows].mean() for episode in episodes.episodes} == {0.0, 1.0}


def test_beta_1_gives_the_experts_own_trajectories(tmp_path):
    student = Wanderer()
    theirs = Demonstrations(rollouts(settings(beta=1.0), 1, student, tmp_path / "rolled"))
    plain = CollectConfig(
        env=(ENV_ID,), out=tmp_path / "plain", episodes=5, seed=ROUNDS_APART, keep="all", workers=1, adapter=adapter()
    )
    ours = Demonstrations(collect(plain))
    assert student.batches == [], "a student that never acts is not evaluated"
    assert [e.seed for e in theirs.episodes] == [e.seed for e in ours.episodes]
    assert np.array_equal(theirs.states, ours.states) and np.array_equal(theirs.actions, ours.actions)
    assert np.array_equal(theirs.executed_actions, theirs.actions)


def test_beta_0_executes_the_students_actions(tmp_path):
    student = Wanderer()
    student.predict = lambda seen, *_: prediction(np.stack([student.plan(o["agent_pos"]) for o in seen]))
    demos = Demonstrations(rollouts(settings(beta=0.0), 1, student, tmp_path / "rolled"))
    for executed, _, states in blocks(demos):
        assert np.array_equal(executed, np.clip(student.plan(states[0])[: len(executed)], -1, 1))


@pytest.mark.parametrize("stop_at", [0, 8, 20])
def test_an_interruption_does_not_change_the_dataset(mixed, tmp_path, stop_at):
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        rollouts(settings(0.2, kwargs=SOME_FAIL), 1, Wanderer(stop_at), out)
    with pytest.raises(DataError, match="unfinished recording"):
        Demonstrations(out)
    assert not list((out / ".partial").glob(".episode-*"))
    assert bool(finished(out / ".partial")) == bool(stop_at)
    rollouts(settings(0.2, kwargs=SOME_FAIL), 1, Wanderer(), out)
    assert same_files(mixed, out)


def test_one_forward_pass_serves_all_environments_of_the_student(tmp_path):
    student = Wanderer()
    rollouts(settings(beta=0.0, episodes=4), 1, student, tmp_path / "set")
    assert max(student.batches) == 2


def test_an_environment_that_always_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(dagger_rollouts, "MAX_ATTEMPTS", 2)
    lost = {"raise_on": [ROUNDS_APART], "die_on": [ROUNDS_APART + 1_000_000]}
    with pytest.raises(SimulatorError, match=r"episode 0 of round 1 failed with 2 seeds.*1010000.*died \(exit code 9"):
        rollouts(settings(episodes=1, kwargs=lost), 1, Wanderer(), tmp_path / "set")


def tiny(out: Path, **values) -> DaggerConfig:
    """A complete run that takes seconds: an untrained network, two training steps per round, episodes of ten steps."""
    model = {"backbone": "tiny-init", "image_size": 24, "horizon": 4, "n_action_steps": 2, "bins": 31}
    train = {"method": "full", "steps": 2, "batch_size": 2, "save_every": 1, "precision": "float32", "model": model}
    world = {"module": "tests.pointworld", "max_steps": 10}
    sizes = {"demonstrations": 3, "episodes": 4, "n_envs": 2, "eval_episodes": 2, "rounds": 2}
    plain = {"env": [ENV_ID], "out": str(out), "train": train, "adapter": world} | sizes
    return configuration.from_dict(DaggerConfig, plain | values)


def test_the_job_is_stopped_resumed_and_extended(tmp_path, start_vla):
    out = tmp_path / "broken"

    def start(config: DaggerConfig, folder: Path, *flags: str) -> Process:
        configuration.dump(config, folder / "dagger.yaml")
        return start_vla("dagger", "--config", folder / "dagger.yaml", *flags)

    process = start(tiny(out), tmp_path)
    deadline = time.monotonic() + 120
    while not finished(out / "round-1" / "data" / ".partial"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume` continues it" in error and "Traceback" not in error
    with pytest.raises(ConfigError, match="Continue it with --resume"):
        dagger(tiny(out))

    process = start(tiny(out), tmp_path, "--resume", "--compare-bc")
    text, error = process.communicate(timeout=200)
    assert process.returncode == 0, error[-2000:]
    assert "stopping criterion: rounds" in text and "BC alone" in text and (out / "dagger.png").is_file()
    info = json.loads((out / "dagger.json").read_text())
    assert [row["beta"] for row in info["rounds"]] == [1.0, 0.5, 0.25]
    assert [row["optimizer_steps"] for row in info["rounds"]] == [2, 4, 6]
    for row in info["rounds"]:
        assert row["labels"] == sum(Demonstrations(root).num_frames for root in row["data"])
        assert len(row["data"]) == row["round"] + 1 and row["n_episodes"] == 2
    last, bc = info["rounds"][-1], info["bc"]
    assert last["labels"] <= bc["labels"] < last["labels"] + 20 and bc["optimizer_steps"] == 6
    assert all(episode.success for root in bc["data"] for episode in Demonstrations(root).episodes)
    assert info["comparison"]["paired"] and info["comparison"]["n_a"] == 2

    trained = configuration.load(TrainConfig, out / "round-2" / "train" / "config.yaml")
    assert trained.model.backbone == str(out / "round-1" / "train") and len(trained.data) == 3

    # Without interruption, until there are as many labels as after the interrupted round.
    whole = dagger(tiny(tmp_path / "whole", labels=info["rounds"][1]["labels"]))
    assert len(whole["rounds"]) == 2 and whole["stopped"] == "labels"
    for number in range(2):
        assert same_files(*(tmp_path / name / f"round-{number}" / "data" for name in ("broken", "whole")))


def test_rollouts_are_distributed_by_failures(tmp_path):
    """Nothing moves, so only episodes that start near the goal succeed: scene 10017, not 10016."""
    seen = collect(CollectConfig(env=(ENV_ID,), out=tmp_path / "seen", episodes=3, adapter=adapter()))
    still = {"module": "tests.pointworld", "max_steps": 4, "kwargs": {"gain": 0.0}}
    values = {"data": [str(seen)], "rounds": 1, "trials": 2, "warm_start": False, "adapter": still}
    info = dagger(tiny(tmp_path / "out", seed=16, **values))
    tried = json.loads((tmp_path / "out" / "round-1" / "trials" / "eval_info.json").read_text())["per_episode"]
    assert [(episode["seed"], episode["success"]) for episode in tried] == [(10016, False), (10017, True)]
    asked = Demonstrations(tmp_path / "out" / "round-1" / "data")
    assert [episode.seed for episode in asked.episodes] == [10016, 10017, 10018, 10019]
    assert [row["optimizer_steps"] for row in info["rounds"]] == [2, 2] and info["stopped"] == "rounds"
    trained = configuration.load(TrainConfig, tmp_path / "out" / "round-1" / "train" / "config.yaml")
    assert trained.model.backbone == "tiny-init" and len(trained.data) == 2

    info = dagger(tiny(tmp_path / "easy", seed=17, **values | {"trials": 1}))
    assert len(info["rounds"]) == 1 and info["stopped"] == "nothing to label"


def test_an_endless_rollout_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "LONGEST", 5)
    gym.register("test/Endless-v0", PointWorld)
    host = dagger_rollouts.LabellingServer(adapter(unsolvable=[3]))
    host.begin("test/Endless-v0", 3, tmp_path, 0, None)
    with pytest.raises(SimulatorError, match=r"has not ended after 5 steps. Set adapter\.max_steps"):
        host.drive(np.zeros((6, 3), np.float32), np.zeros(6, bool), True)
    host.abandon()
    assert list(tmp_path.iterdir()) == []


def test_distribution_of_rollouts():
    config = DaggerConfig(env=("a", "b", "c"), episodes=8)
    assert scenes_of(config, 2) == [(name, 2 * ROUNDS_APART + k) for k, name in enumerate("aaabbccc")]
    assert [name for name, _ in scenes_of(config, 1, [0, 1, 3])] == list("bbcccccc")


INTERVENTIONS = {"beta": 0.0, "intervention": 4, "intervention_after": 2}


def test_only_interventions_are_labelled_and_the_expert_executes_them(tmp_path):
    student, begun = Wanderer(), []
    config = settings(episodes=60, kwargs={"unsolvable": list(range(ROUNDS_APART, ROUNDS_APART + 60))}, **INTERVENTIONS)
    demos = Demonstrations(rollouts(config, 1, student, tmp_path / "set"))
    assert [episode.seed - ROUNDS_APART for episode in demos.episodes] == list(range(60))
    assert {(episode.length, episode.success) for episode in demos.episodes} == {(4, None)}
    assert np.array_equal(demos.actions, demos.executed_actions)
    env = simulator.make(ENV_ID, config.adapter)
    for episode in demos.episodes:
        observation, _ = env.reset(seed=episode.seed)
        decisions = 0
        while not np.allclose(observation["agent_pos"], demos.states[episode.start], atol=5e-3):
            for action in np.clip(student.plan(observation["agent_pos"])[: student.n_action_steps], -1, 1):
                observation, *_ = env.step(np.float32(action))
            decisions += 1
            assert decisions < 20, "the student acts until the intervention"
        begun.append(decisions)
    assert 0 in begun and 1.4 < np.mean(begun) < 2.6


@pytest.mark.parametrize("stop_at", [4, 12])
def test_an_interruption_of_rollouts_with_interventions(tmp_path, stop_at):
    """Some rollouts end before their intervention; they are not repeated."""
    config = settings(0.3, episodes=12, intervention=2, intervention_after=6)
    whole, out, student = Wanderer(), tmp_path / "set", Wanderer(stop_at)
    reference = rollouts(config, 1, whole, tmp_path / "reference")
    assert 0 < len(Demonstrations(reference).episodes) < 12
    with pytest.raises(KeyboardInterrupt):
        rollouts(config, 1, student, out)
    played = len(list((out / ".partial").glob("*-0*")))
    rest = Wanderer()
    rollouts(config, 1, rest, out)
    assert same_files(reference, out)
    assert played >= 2 and len(rest.batches) <= len(whole.batches) - played // 2


def test_all_rollouts_end_before_their_intervention(tmp_path):
    config = settings(1.0, intervention=2, intervention_after=10**9)
    assert rollouts(config, 1, Wanderer(), tmp_path / "set") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 1.5}, "beta must be between 0 and 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"intervention": 0}, "intervention must be at least 1"),
        ({"target": 90.0}, "target must be above 0 and at most 1"),
        ({"eval_seed": 10_001}, "eval_seed must not overlap the training seeds, 0 to 29999"),
        ({"train": {"data": ["datasets/mine"]}}, r"`vla dagger` sets train\.data"),
    ],
)
def test_invalid_values(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        dagger(tiny(tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_invalid_folders_and_environments(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        dagger(tiny(tmp_path / "out", data=[str(tmp_path / "nowhere")]))
    with pytest.raises(SimulatorError, match="no expert"):
        dagger(tiny(tmp_path / "out", env=["toy/Slide-v0"], adapter={"module": "tests.rollout_env"}))
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="unrelated files"):
        dagger(tiny(tmp_path))
    configuration.dump(tiny(tmp_path), tmp_path / "dagger.yaml")
    with pytest.raises(ConfigError, match=r"other settings: beta = 0\.5, not 0\.1; seed = 0, not 1"):
        dagger(tiny(tmp_path, seed=1, beta=0.1, resume=True))
