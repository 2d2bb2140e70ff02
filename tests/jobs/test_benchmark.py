"""`vla benchmark metaworld`: a stopped benchmark goes on where it was, and its averages are the ones papers report."""

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.metaworld_sets import SETS
from tests.jobs.test_rollout import Slider
from vla import cli
from vla import config as configuration
from vla.config import AdapterConfig, BenchmarkConfig
from vla.errors import ConfigError, SimulatorError
from vla.evaluation import results
from vla.evaluation.comparison import compare
from vla.jobs import benchmark as job
from vla.jobs.benchmark import PUBLISHED, benchmark, chosen, score
from vla.support.statistics import difference, mean_interval, wilson

TOYS = {"mt50": ("toy/Slide-v0", "toy/Glide-v0"), "mt50/easy": ("toy/Slide-v0",), "mt50/hard": ("toy/Glide-v0",)}
TIERS = ("easy", "medium", "hard", "very_hard")


def test_tiers_are_disjoint_complete_and_of_the_usual_sizes():
    tiers = [SETS[f"mt50/{tier}"] for tier in TIERS]
    assert [len(tier) for tier in tiers] == [28, 11, 6, 5]
    assert sorted(env_id for tier in tiers for env_id in tier) == sorted(SETS["mt50"])
    assert len(set(SETS["mt50"])) == 50
    assert {name for name in SETS if name.startswith("mt50/")} == {f"mt50/{tier}" for tier in TIERS}


def test_the_other_sets_are_those_of_the_package():
    suites = pytest.importorskip("metaworld.env_dict")

    def names(name):
        return [env_id.removeprefix("vla-metaworld/") for env_id in SETS[name]]

    assert names("mt10") == list(suites.MT10_V3)
    assert sorted(names("mt50")) == sorted(suites.MT50_V3)
    assert sorted(names("ml45-train")) == sorted(suites.ML45_V3["train"])
    assert sorted(names("ml45-test")) == sorted(suites.ML45_V3["test"])


def test_tasks_are_named_by_set_or_by_id():
    assert chosen(["mt50"], SETS) == list(SETS["mt50"])
    both = chosen(["vla-metaworld/reach-v3", "mt10"], SETS)
    assert len(both) == 10 and both[0] == "vla-metaworld/reach-v3"
    with pytest.raises(ConfigError, match=r"unknown set of tasks 'mt50/heasy'. Did you mean 'mt50/easy'"):
        chosen(["mt50/heasy"], SETS)
    with pytest.raises(ConfigError, match=r"unknown task .*Did you mean 'vla-metaworld/reach-v3'"):
        chosen(["vla-metaworld/reech-v3"], SETS)
    with pytest.raises(ConfigError, match="tasks needs one or more of: mt50, "):
        chosen([], SETS)


def test_averages_are_as_worked_out_by_hand():
    share = {"easy": 10, "medium": 5, "hard": 3, "very_hard": 0}  # successes of 10, the same for each task of a tier
    counts = {env_id: (wins, 10) for tier, wins in share.items() for env_id in SETS[f"mt50/{tier}"]}
    found = score(counts, SETS)
    assert [tier["pc_success"] for tier in found["tiers"].values()] == [100, 50, 30, 0]
    assert [tier["n_episodes"] for tier in found["tiers"].values()] == [280, 110, 60, 50]
    assert found["tier_average"]["pc_success"] == pytest.approx(45)  # (100 + 50 + 30 + 0) / 4
    assert found["episode_average"]["pc_success"] == pytest.approx(70.6)  # (280 + 55 + 18) / 500
    assert found["episode_average"]["pc_success_ci95"] == pytest.approx([100 * x for x in wilson(353, 500)])
    assert found["tiers"]["medium"]["pc_success_ci95"] == pytest.approx([100 * x for x in wilson(55, 110)])
    # Distances from each rate to its Wilson limits, as the root of their squares, over four:
    # below: 1.353, 9.185, 10.088, 0; above: 0, 9.185, 12.512, 7.135.
    low = 45 - math.sqrt(1.353**2 + 9.185**2 + 10.088**2) / 4
    high = 45 + math.sqrt(9.185**2 + 12.512**2 + 7.135**2) / 4
    assert found["tier_average"]["pc_success_ci95"] == pytest.approx([low, high], abs=0.01)


def test_a_missing_task_leaves_the_tiers_but_not_their_mean():
    counts = {env_id: (1, 2) for env_id in SETS["mt50"] if env_id != "vla-metaworld/reach-v3"}
    found = score(counts, SETS)
    assert (found["tiers"]["easy"]["n_tasks"], found["tiers"]["easy"]["n_tasks_of"]) == (27, 28)
    assert found["tier_average"] is None
    found = score({"vla-metaworld/push-v3": (1, 4)}, SETS)
    assert found["tiers"]["easy"]["pc_success"] is None and found["tiers"]["hard"]["pc_success"] == 25


def test_the_interval_of_a_mean_is_newcombes_for_two_rates_and_wilsons_for_one():
    assert mean_interval([(7, 20)]) == pytest.approx(wilson(7, 20))
    low, high = difference(16, 20, 20 - 4, 20)  # a + b is a - (1 - b) + 1
    assert mean_interval([(16, 20), (4, 20)]) == pytest.approx(((low + 1) / 2, (high + 1) / 2))


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    rates, episodes = [0.85, 0.55, 0.6, 0.4], [280, 110, 60, 50]
    drawn = rng.binomial(episodes, rates, size=(4000, 4))
    limits = [mean_interval([(int(k), n) for k, n in zip(row, episodes, strict=True)]) for row in drawn]
    assert 0.935 < np.mean([low <= np.mean(rates) <= high for low, high in limits]) < 0.965


def test_published_averages_are_means_of_their_tiers():
    for entry in PUBLISHED:
        assert entry.tiers is None or np.mean(entry.tiers) == pytest.approx(entry.average, abs=0.06)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(job, "_task_sets", lambda: TOYS)


def settings(out: Path, kwargs: dict | None = None, **values) -> BenchmarkConfig:
    adapter = AdapterConfig(module="tests.rollout_env", kwargs=kwargs or {})
    return BenchmarkConfig(**{"episodes": 2, "n_envs": 2, "adapter": adapter, "out": out} | values)


def test_a_benchmark_is_the_rollouts_of_its_tasks(toys, tmp_path, capsys):
    found = benchmark(settings(tmp_path / "b"), Slider())
    assert json.loads((tmp_path / "b/benchmark.json").read_text()) == found
    assert found["tier_average"]["pc_success"] == found["episode_average"]["pc_success"] == 100
    assert {env_id: task["tier"] for env_id, task in found["tasks"].items()} == {
        "toy/Slide-v0": "easy",
        "toy/Glide-v0": "hard",
    }
    whole = results.read(tmp_path / "b")
    assert [(e["episode_ix"], e["env_id"], e["seed"]) for e in whole["per_episode"]] == [
        (0, "toy/Slide-v0", 100_000),
        (1, "toy/Slide-v0", 100_001),
        (2, "toy/Glide-v0", 100_000),
        (3, "toy/Glide-v0", 100_001),
    ]
    videos = [tmp_path / "b" / e["video_path"] for e in whole["per_episode"] if e["video_path"]]
    assert len(videos) == 2 and all(video.is_file() for video in videos)
    page = (tmp_path / "b/report.html").read_text()
    assert "By tier of difficulty" in page and "SmolVLA 2.25B" in page and "data:video/mp4" in page
    printed = capsys.readouterr().out
    assert "mean of the tiers" in printed and "FabriVLA" in printed
    other = benchmark(settings(tmp_path / "c"), Slider(direction=-1.0))
    assert other["tier_average"]["pc_success"] == 0
    assert compare(tmp_path / "b", tmp_path / "c")["only_a"] == 4


def test_what_is_finished_is_not_played_again_and_what_a_kill_left_is(toys, tmp_path):
    first = settings(tmp_path / "b", tasks=("mt50",))
    with pytest.raises(KeyboardInterrupt):
        benchmark(first, Slider(stop_at=3, error=KeyboardInterrupt()))
    stopped = json.loads((tmp_path / "b/benchmark.json").read_text())
    assert stopped["interrupted"] and list(stopped["tasks"]) == ["toy/Slide-v0"] and not stopped["tier_average"]
    before = (tmp_path / "b/tasks/Slide-v0/eval_info.json").stat().st_mtime_ns
    (tmp_path / "b/tasks/Glide-v0/eval_info.json").unlink(missing_ok=True)  # as a kill leaves it: begun, no results
    assert (tmp_path / "b/tasks/Glide-v0/config.yaml").is_file()
    again = benchmark(dataclasses.replace(first, n_envs=1, videos=0), Slider())
    assert (tmp_path / "b/tasks/Slide-v0/eval_info.json").stat().st_mtime_ns == before
    assert not again["interrupted"] and again["tier_average"]["pc_success"] == 100
    assert benchmark(first, Slider(stop_at=0, error=ZeroDivisionError()))["tasks"] == again["tasks"]  # nothing to play


def test_a_task_in_which_an_environment_failed_is_played_again(toys, tmp_path):
    found = benchmark(settings(tmp_path / "b", tasks=("mt50/easy",)), Slider())
    task = tmp_path / "b/tasks/Slide-v0"
    info = results.read(task)
    info["per_episode"][0]["fault"], info["overall"]["outcomes"] = "the process died", {"fault": 1, "success": 1}
    results.write(info, task)
    assert benchmark(settings(tmp_path / "b", tasks=("mt50/easy",)), Slider())["tasks"].keys() == found["tasks"].keys()
    assert results.read(task)["per_episode"][0]["fault"] is None


def test_parts_that_do_not_belong_together_are_refused(toys, tmp_path, monkeypatch):
    asked = settings(tmp_path / "b", tasks=("mt50/easy",))
    with pytest.raises(SimulatorError, match="no_such_module"):
        benchmark(dataclasses.replace(asked, adapter=AdapterConfig(module="no_such_module")), Slider())
    benchmark(asked, Slider())  # nothing was played, so that nothing has to fit
    with pytest.raises(ConfigError, match=r"seed = 100000, not 7; adapter\.kwargs\.a = None, not 1"):
        benchmark(
            dataclasses.replace(asked, seed=7, adapter=AdapterConfig(module="tests.rollout_env", kwargs={"a": 1}))
        )
    with pytest.raises(ConfigError, match=r"policy \(the files of nano are not the ones that were measured\)"):
        benchmark(asked)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").touch()
    with pytest.raises(ConfigError, match=r"something else \(todo\.txt\)"):
        benchmark(dataclasses.replace(asked, out=tmp_path / "notes"), Slider())
    assert (tmp_path / "notes/todo.txt").is_file()


def test_a_suite_that_cannot_be_imported_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "SETS_MODULE", "no_such_suite")
    with pytest.raises(SimulatorError, match="no_such_suite"):
        benchmark(settings(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """An untrained policy for Meta-World's robot, of the embedded architecture."""
    pytest.importorskip("metaworld")
    from vla.config import ModelConfig
    from vla.model.build import DataFacts, build_policy
    from vla.simulation import adapter as simulator
    from vla.transforms.normalize import compute_statistics

    env = simulator.make("vla-metaworld/reach-v3", AdapterConfig(kwargs={"action_repeat": 4}))
    robot = env.robot
    env.close()
    assert robot.state_names == ("x", "y", "z", "gripper") and robot.cameras == ("corner2",) and robot.control_hz == 20
    random = np.random.default_rng(0).uniform(-1, 1, (500, 4)).astype(np.float32)
    statistics = {"metaworld": {"action": compute_statistics(random), "state": compute_statistics(random)}}
    torch.manual_seed(0)
    model = ModelConfig(backbone="nano-init", horizon=4, n_action_steps=4, bins=31)
    for part in build_policy(model, DataFacts(robot, statistics, {"metaworld": random})):
        part.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_command_line_is_stopped_and_goes_on(checkpoint, tmp_path, capsys, start_vla):
    out, values = tmp_path / "b", tmp_path / "values.yaml"
    tasks = [f"vla-metaworld/{task}-v3" for task in ("shelf-place", "stick-pull")]
    values.write_text("adapter: {kwargs: {action_repeat: 4, phrasing: canonical}, max_steps: 12}\n")
    command = ["benchmark", "metaworld", f"--config={values}", "--policy", checkpoint]
    command += ["--tasks", *tasks, "--episodes", "2", "--n-envs", "2", "--out", out]

    running = start_vla(*command)
    first, deadline = out / "tasks/shelf-place-v3/eval_info.json", time.monotonic() + 120
    while not first.is_file() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "1 of 2 tasks are finished; the same command plays the others" in said
    stopped = json.loads((out / "benchmark.json").read_text())
    assert stopped["interrupted"] and list(stopped["tasks"]) == tasks[:1]
    before = first.stat().st_mtime_ns

    running = start_vla(*command)
    said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    found = json.loads((out / "benchmark.json").read_text())
    assert not found["interrupted"] and list(found["tasks"]) == tasks and first.stat().st_mtime_ns == before
    assert found["tiers"]["very_hard"]["n_episodes"] == found["episode_average"]["n_episodes"] == 4
    assert found["tier_average"] is None and len(found["policy"]["sha256"]) == 64
    whole = results.read(out)
    assert [e["seed"] for e in whole["per_episode"]] == [100_000, 100_001] * 2
    assert all(e["length"] <= 12 for e in whole["per_episode"])
    assert [e["instruction"] for e in whole["per_episode"][::2]] == [
        "put the block on the shelf",
        "pull the bottle with the stick",
    ]
    assert configuration.load(BenchmarkConfig, out / "config.yaml").tasks == tuple(tasks)

    assert cli.main([*map(str, command), "--seed", "3"]) == 2
    assert "started with other settings: seed = " in capsys.readouterr().err
