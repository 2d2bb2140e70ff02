"""`vla rollout`: all episodes are counted, also if environments fail, and the same seeds give the same results."""

import dataclasses
import itertools
import json
import multiprocessing
import time
from pathlib import Path

import av
import numpy as np
import pytest

from tests.rollout_env import ROBOT, place
from vla import config as configuration
from vla.config import AdapterConfig, RolloutConfig, TrainConfig
from vla.errors import CheckpointError, ConfigError, DataError, SimulatorError, SpecError
from vla.jobs.rollout import rollout
from vla.policy import Prediction
from vla.policy.session import Draft
from vla.simulation.hosts import Fault
from vla.simulation.pool import Pool
from vla.spec import RobotSpec


class Slider:
    """Reads the column from the image and moves there; solves every episode within ten steps."""

    robot = RobotSpec.from_dict(ROBOT)
    horizon, n_action_steps = 4, 4

    def __init__(self, direction: float = 1.0, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.batches: list[int] = []
        self.instructions: set[str] = set()
        self._direction, self._stop_at, self._error = direction, stop_at, error

    def predict(self, observations, instructions, drafts=None):
        if len(self.batches) == self._stop_at:
            raise self._error
        self.batches.append(len(observations))
        self.instructions |= set(instructions)
        chunks = np.stack([self._plan(observation) for observation in observations])
        return Prediction(chunks, *np.zeros((3, len(chunks), 1)), 1, tuple(map(Draft, chunks)))

    def _plan(self, observation) -> np.ndarray:
        goal = place(int(observation["pixels"]["front"][0, :, 0].argmax())) * self._direction
        x, chunk = float(observation["agent_pos"][0]), []
        for _ in range(self.horizon):
            chunk.append([np.clip(goal - x, -0.1, 0.1)])
            x += chunk[-1][0]
        return np.array(chunk, np.float32)


def settings(out: Path, kwargs: dict | None = None, **values) -> RolloutConfig:
    adapter = AdapterConfig(module="tests.rollout_env", kwargs=kwargs or {})
    return RolloutConfig(
        **{"env": ("toy/Slide-v0",), "episodes": 6, "n_envs": 3, "videos": 0, "adapter": adapter, "out": out} | values
    )


def test_all_episodes_of_all_environments_are_counted(tmp_path, capsys):
    policy = Slider()
    info = rollout(settings(tmp_path / "r", env=("toy/Slide-v0", "toy/Glide-v0"), episodes=5), policy)
    assert json.loads((tmp_path / "r/eval_info.json").read_text()) == info
    assert [e["episode_ix"] for e in info["per_episode"]] == list(range(10))
    expected = itertools.product(["toy/Slide-v0", "toy/Glide-v0"], range(100_000, 100_005))
    assert [(e["env_id"], e["seed"]) for e in info["per_episode"]] == list(expected)
    assert info["aggregated"]["pc_success"] == 100.0
    assert info["aggregated"] == info["overall"]
    assert info["per_group"]["toy"]["n_episodes"] == 10
    assert [task["metrics"]["successes"] for task in info["per_task"]] == [[True] * 5] * 2
    assert info["per_episode"][0]["sum_reward"] == info["per_episode"][0]["max_reward"] == 1.0
    assert policy.instructions == {"slide to the column"}
    assert configuration.load(RolloutConfig, tmp_path / "r/config.yaml").episodes == 5
    assert (tmp_path / "r/report.html").is_file()
    assert "10/10" in capsys.readouterr().out


def test_one_forward_pass_serves_all_environments(tmp_path):
    policy = Slider()
    info = rollout(settings(tmp_path / "r", episodes=9, n_envs=3), policy)
    chunks = sum(e["n_chunks"] for e in info["per_episode"])
    assert sum(policy.batches) == chunks
    assert max(policy.batches) == 3
    # A free environment starts the next episode at once, so every forward pass has the full batch.
    assert policy.batches[:-3] == [3] * len(policy.batches[:-3])
    assert info["decode_latency"]["n_forwards"] == len(policy.batches) < chunks
    assert all(e["n_chunks"] == -(-e["length"] // 4) for e in info["per_episode"])


def test_results_do_not_depend_on_the_number_of_environments(tmp_path):
    runs = [rollout(settings(tmp_path / f"{i}", n_envs=n, videos=1), Slider()) for i, n in enumerate((1, 3, 3))]
    timing = {"decode_ms_p50", "decode_ms_max"}
    facts = [[{k: v for k, v in e.items() if k not in timing} for e in run["per_episode"]] for run in runs]
    assert facts[0] == facts[1] == facts[2]
    assert len({e["image_hash"] for e in facts[0]}) > 1


def test_an_exception_in_an_environment_is_a_fault_of_its_episode(tmp_path):
    info = rollout(settings(tmp_path / "r", {"raise_on": 100_002}), Slider())
    faults = {e["seed"]: e["fault"] for e in info["per_episode"] if e["fault"]}
    assert faults == {100_002: "at step 1: ZeroDivisionError: the motor failed"}
    assert info["overall"]["outcomes"] == {"success": 5, "fault": 1}
    assert info["overall"]["pc_success"] == pytest.approx(100 * 5 / 6)


def test_an_episode_whose_process_is_killed_is_repeated(tmp_path):
    kwargs = {"kill_on": 100_001, "kill_once": str(tmp_path / "died")}
    runs = [rollout(settings(tmp_path / name, kwargs, videos=1), Slider()) for name in ("killed", "whole")]
    timing = {"decode_ms_p50", "decode_ms_max"}
    facts = [[{k: v for k, v in e.items() if k not in timing} for e in run["per_episode"]] for run in runs]
    assert (tmp_path / "died").exists() and facts[0] == facts[1]


def test_a_process_killed_twice_is_a_fault_of_its_episode(tmp_path):
    info = rollout(settings(tmp_path / "r", {"kill_on": 100_001}), Slider())
    assert [e["outcome"] for e in info["per_episode"]] == ["success", "fault"] + ["success"] * 4
    assert "SIGKILL" in info["per_episode"][1]["fault"]
    assert not multiprocessing.active_children()


def test_an_environment_that_hangs_is_terminated():
    adapter = AdapterConfig(module="tests.rollout_env", kwargs={"hang_on": 7})
    with Pool(1, adapter, patience_s=5) as pool:
        pool.exchange({0: ("reset", "toy/Slide-v0", 7, False)})
        pool._patience_s = 0.5
        start = time.monotonic()
        reply = pool.exchange({0: ("run", np.zeros((4, 1)))})[0]
        assert isinstance(reply, Fault)
        assert "did not respond in time" in reply.message
        assert time.monotonic() - start < 5
        pool._patience_s = 20
        assert pool.exchange({0: ("reset", "toy/Slide-v0", 8, False)})[0].instruction == "slide to the column"


def test_if_all_episodes_fail_the_reason_is_the_error(tmp_path):
    class Broken(Slider):
        def _plan(self, observation):
            return np.full((4, 1), np.nan, np.float32)

    with pytest.raises(SimulatorError, match=r"every episode ended in an environment fault.*dx=nan"):
        rollout(settings(tmp_path / "r", episodes=2), Broken())
    assert json.loads((tmp_path / "r/eval_info.json").read_text())["overall"]["outcomes"] == {"fault": 2}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SpecError("the camera fell off")])
def test_finished_episodes_are_written_on_interruption(tmp_path, error):
    with pytest.raises(type(error)):
        rollout(settings(tmp_path / "r", episodes=20), Slider(stop_at=5, error=error))
    info = json.loads((tmp_path / "r/eval_info.json").read_text())
    assert info["interrupted"]
    assert info["n_episodes_asked"] == 20
    assert 0 < info["overall"]["n_episodes"] < 20
    assert "Stopped early" in (tmp_path / "r/report.html").read_text()
    assert not multiprocessing.active_children()
    assert (
        rollout(settings(tmp_path / "r", episodes=2), Slider())["overall"]["n_episodes"] == 2
    )  # no --overwrite needed


def test_success_at_the_end_and_ever(tmp_path):
    class Overshooter(Slider):
        def _plan(self, observation):
            x, goal = float(observation["agent_pos"][0]), place(int(observation["pixels"]["front"][0, :, 0].argmax()))
            return np.full((4, 1), 0.09 * np.sign(goal) if abs(x) < 1.9 else 0, np.float32)

    info = rollout(settings(tmp_path / "r", {"stop": False}), Overshooter())
    assert info["overall"]["pc_success_ever"] > info["overall"]["pc_success"]
    assert all(e["length"] == 12 for e in info["per_episode"])
    for episode in info["per_episode"]:
        assert episode["outcome"] == (
            "success" if episode["success"] else "lost" if episode["success_ever"] else "timeout"
        )


def test_wrong_target_and_timeout_are_distinguished(tmp_path):
    info = rollout(settings(tmp_path / "r"), Slider(direction=-1.0))
    assert info["overall"]["outcomes"] == {"wrong_target": 6}


def test_videos_of_the_first_episodes_and_failures(tmp_path):
    info = rollout(settings(tmp_path / "r", {"raise_on": 100_001}, videos=2), Slider(direction=-1.0))
    recorded = {e["seed"]: tmp_path / "r" / e["video_path"] for e in info["per_episode"] if e["video_path"]}
    assert sorted(recorded) == [100_000, 100_002, 100_003]  # the first episode (one of two failed), then two failures
    with av.open(recorded[100_000]) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 10)
    assert len(frames) == info["per_episode"][0]["length"] + 1  # the first observation, and one after each action
    column = frames[0][100].sum(-1).argmax() * 16 // frames[0].shape[1]
    assert frames[0][100].max() > 200
    assert frames[0].shape == (288, 288, 3)
    assert 0 <= column < 16


def test_actions_executed_per_chunk_can_be_overridden(tmp_path):
    info = rollout(settings(tmp_path / "r", n_action_steps=1), Slider())
    assert all(e["n_chunks"] == e["length"] for e in info["per_episode"])
    with pytest.raises(ConfigError, match="between 1 and the horizon 4, got 5"):
        rollout(settings(tmp_path / "s", n_action_steps=5), Slider())


def test_a_finished_report_is_not_overwritten_without_the_flag(tmp_path):
    asked = settings(tmp_path / "r", episodes=2, videos=2)
    rollout(asked, Slider())
    with pytest.raises(ConfigError, match="already holds a rollout report"):
        rollout(asked, Slider())
    info = rollout(dataclasses.replace(asked, overwrite=True, videos=1), Slider())
    assert info["overall"]["n_episodes"] == 2
    assert len(list((tmp_path / "r/videos").glob("*.mp4"))) == 1


def test_the_remains_of_a_killed_evaluation_are_replaced(tmp_path):
    for name, job in (("killed", settings(tmp_path / "killed")), ("other", TrainConfig())):
        (tmp_path / name).mkdir()
        configuration.dump(job, tmp_path / name / "config.yaml")
    assert rollout(settings(tmp_path / "killed", episodes=1), Slider())["n_episodes_asked"] == 1
    with pytest.raises(ConfigError, match=r"unrelated files \(config.yaml"):
        rollout(settings(tmp_path / "other"), Slider())


def test_a_second_run_can_be_compared_with_the_first(tmp_path):
    rollout(settings(tmp_path / "a"), Slider())
    info = rollout(settings(tmp_path / "b", compare=tmp_path / "a"), Slider(direction=-1.0))
    assert info["comparison"]["paired"]
    assert info["comparison"]["difference"] == -100.0
    assert info["comparison"]["only_b"] == 6
    with pytest.raises(DataError, match="no environment in common"):
        rollout(settings(tmp_path / "c", compare=tmp_path / "a", env=("toy/Glide-v0",)), Slider())
    assert info["comparison"]["n_different_images"] == 0
    assert f"{tmp_path / 'a'} is better" in (tmp_path / "b/report.html").read_text()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"env": ("toy/Slyde-v0",)}, SimulatorError, "Did you mean 'toy/Slide-v0'"),
        ({"env": ("toy/Slide-v0", "toy/Slide-v0")}, ConfigError, "without duplicates"),
        ({"episodes": 0}, ConfigError, "episodes must be at least 1"),
        ({"videos": -1}, ConfigError, "videos must not be negative"),
        ({"compare": Path("nowhere")}, DataError, "nowhere has no results of `vla rollout`"),
        ({"policy": "no/such/folder"}, CheckpointError, "no/such/folder"),
    ],
)
def test_invalid_arguments_are_rejected_before_writing(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        rollout(settings(tmp_path / "r", **change))
    assert not (tmp_path / "r").exists()


def test_a_policy_for_another_robot_is_rejected(tmp_path):
    blind, giant = Slider(), Slider()
    blind.robot = dataclasses.replace(Slider.robot, cameras=("wrist",))
    giant.robot = dataclasses.replace(Slider.robot, action_names=("dx", "dy"))
    with pytest.raises(SpecError, match=r"needs camera 'wrist'.*has 'front'.*images: \{wrist:"):
        rollout(settings(tmp_path / "r"), blind)
    with pytest.raises(SpecError, match=r"action has 2 entries \(dx, dy\).*1 \(dx\)"):
        rollout(settings(tmp_path / "r"), giant)


def test_opposite_grippers_are_rejected_and_other_rates_warn(tmp_path):
    flipped, slow = Slider(), Slider()
    grip = {"gripper_index": 0, "gripper_open": 1.0, "gripper_closed": -1.0}
    flipped.robot = dataclasses.replace(Slider.robot, **grip | {"gripper_open": 0.0, "gripper_closed": 1.0})
    slow.robot = dataclasses.replace(Slider.robot, control_hz=5.0)
    adapter = AdapterConfig(module="tests.rollout_env", robot=grip)
    with pytest.raises(SpecError, match=r"opens its gripper with 0 and closes it with 1.*with 1 and -1"):
        rollout(settings(tmp_path / "r", adapter=adapter), flipped)
    with pytest.warns(UserWarning, match="runs at 5 actions per second"):
        rollout(settings(tmp_path / "r", episodes=1), slow)


def test_chunks_in_a_process_equal_acting_step_by_step(nano, tmp_path):
    """A rollout executes whole chunks, `Policy.act` returns single actions. The episodes are equal."""
    from vla.policy import Policy
    from vla.simulation import adapter as simulator

    policy = Policy(*nano, device="cpu", unnorm_key="demo", n_action_steps=3)
    adapter = AdapterConfig(max_steps=8)
    asked = RolloutConfig(
        env=("vla/Reach-v0",), episodes=2, n_envs=1, videos=0, out=tmp_path / "r", adapter=adapter, seed=5
    )
    info = rollout(asked, policy)
    env = simulator.make("vla/Reach-v0", adapter)
    for episode in info["per_episode"]:
        observation, told = env.reset(seed=episode["seed"])
        policy.reset(told["instruction"])
        rewards, over = [], False
        while not over:
            observation, reward, terminated, truncated, told = env.step(policy.act(observation))
            rewards.append(reward)
            over = terminated or truncated
        assert (episode["length"], episode["sum_reward"], episode["instruction"]) == (
            len(rewards),
            sum(rewards),
            told["instruction"],
        )
        assert episode["success"] == told["is_success"]
    env.close()
