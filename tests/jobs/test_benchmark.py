"""`vla benchmark`: resumption, averages as in papers, and custom suites."""

import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from envs.metaworld_sets import SETS
from tests import toy_suite
from tests.jobs.test_rollout import Slider
from tests.rollout_env import ROBOT
from vla import cli
from vla import config as configuration
from vla.config import AdapterConfig, BenchmarkConfig, DecodingConfig, HostsConfig, ModelConfig, RolloutConfig
from vla.errors import ConfigError, SimulatorError
from vla.evaluation import report, results
from vla.evaluation.comparison import compare
from vla.evaluation.scores import score
from vla.evaluation.suites import SUITES, Published, Suite, find
from vla.jobs.benchmark import _of_task, benchmark
from vla.model.build import DataFacts, build_policy
from vla.spec import RobotSpec
from vla.support.statistics import difference, mean_interval, wilson
from vla.transforms.normalize import compute_statistics

METAWORLD = find("metaworld")
TIERS = ("easy", "medium", "hard", "very_hard")


def test_tiers_are_disjoint_and_complete():
    tiers = [SETS[f"mt50/{tier}"] for tier in TIERS]
    assert [len(tier) for tier in tiers] == [28, 11, 6, 5]
    assert sorted(env_id for tier in tiers for env_id in tier) == sorted(SETS["mt50"])
    assert len(set(SETS["mt50"])) == 50
    assert {name for name in SETS if name.startswith("mt50/")} == {f"mt50/{tier}" for tier in TIERS}


def test_the_other_sets_equal_those_of_metaworld():
    suites = pytest.importorskip("metaworld.env_dict")

    def names(name):
        return [env_id.removeprefix("vla-metaworld/") for env_id in SETS[name]]

    assert names("mt10") == list(suites.MT10_V3)
    assert sorted(names("mt50")) == sorted(suites.MT50_V3)
    assert sorted(names("ml45-train")) == sorted(suites.ML45_V3["train"])
    assert sorted(names("ml45-test")) == sorted(suites.ML45_V3["test"])


def test_every_option_reaches_the_rollouts_of_the_tasks():
    other = {"decoding": DecodingConfig(temperature=0.5), "adapter": AdapterConfig(max_steps=7)}
    other |= {"hosts": HostsConfig(backend="ray"), "policy": "mine", "unnorm_key": "a"}
    other |= {"device": "cpu", "dtype": "bfloat16"}
    other |= dict.fromkeys(("episodes", "seed", "n_envs", "n_action_steps", "videos"), 3)
    shared = {field.name for field in dataclasses.fields(RolloutConfig)} & {
        field.name for field in dataclasses.fields(BenchmarkConfig)
    } - {"out"}
    assert shared == set(other)
    task = _of_task(BenchmarkConfig(**other), METAWORLD, "vla-metaworld/reach-v3", Path("there"))
    assert task == RolloutConfig(**other, env=("vla-metaworld/reach-v3",), out=Path("there"))


def test_tasks_by_set_or_id():
    assert METAWORLD.choose(["mt50"]) == list(SETS["mt50"])
    both = METAWORLD.choose(["vla-metaworld/reach-v3", "mt10"])
    assert len(both) == 10 and both[0] == "vla-metaworld/reach-v3"
    with pytest.raises(ConfigError, match=r"unknown task set 'mt50/heasy'. Did you mean 'mt50/easy'"):
        METAWORLD.choose(["mt50/heasy"])
    with pytest.raises(ConfigError, match=r"unknown task .*Did you mean 'vla-metaworld/reach-v3'"):
        METAWORLD.choose(["vla-metaworld/reech-v3"])


def test_averages():
    share = {"easy": 10, "medium": 5, "hard": 3, "very_hard": 0}  # successes of 10, the same for each task of a tier
    counts = {env_id: (wins, 10) for tier, wins in share.items() for env_id in SETS[f"mt50/{tier}"]}
    found = score(counts, METAWORLD)
    assert [tier["pc_success"] for tier in found["tiers"].values()] == [100, 50, 30, 0]
    assert [tier["n_episodes"] for tier in found["tiers"].values()] == [280, 110, 60, 50]
    assert found["tier_average"]["pc_success"] == pytest.approx(45)  # (100 + 50 + 30 + 0) / 4
    assert found["episode_average"]["pc_success"] == pytest.approx(70.6)  # (280 + 55 + 18) / 500
    assert found["episode_average"]["pc_success_ci95"] == pytest.approx([100 * x for x in wilson(353, 500)])
    assert found["tiers"]["medium"]["pc_success_ci95"] == pytest.approx([100 * x for x in wilson(55, 110)])
    # The distances from each rate to its Wilson limits are combined as the root of the sum of squares, divided by four:
    # below: 1.353, 9.185, 10.088, 0; above: 0, 9.185, 12.512, 7.135.
    low = 45 - math.sqrt(1.353**2 + 9.185**2 + 10.088**2) / 4
    high = 45 + math.sqrt(9.185**2 + 12.512**2 + 7.135**2) / 4
    assert found["tier_average"]["pc_success_ci95"] == pytest.approx([low, high], abs=0.01)


def test_a_missing_task_leaves_the_tiers_but_not_their_mean():
    counts = {env_id: (1, 2) for env_id in SETS["mt50"] if env_id != "vla-metaworld/reach-v3"}
    found = score(counts, METAWORLD)
    assert (found["tiers"]["easy"]["n_tasks"], found["tiers"]["easy"]["n_tasks_of"]) == (27, 28)
    assert found["tier_average"] is None
    found = score({"vla-metaworld/push-v3": (1, 4)}, METAWORLD)
    assert found["tiers"]["easy"]["pc_success"] is None and found["tiers"]["hard"]["pc_success"] == 25


def test_the_interval_of_a_mean_equals_newcombe_for_two_rates_and_wilson_for_one():
    assert mean_interval([(7, 20)]) == pytest.approx(wilson(7, 20))
    low, high = difference(16, 20, 20 - 4, 20)  # a + b is a - (1 - b) + 1
    assert mean_interval([(16, 20), (4, 20)]) == pytest.approx(((low + 1) / 2, (high + 1) / 2))


def test_coverage_of_the_interval_of_a_mean():
    rng = np.random.default_rng(0)
    rates, episodes = [0.85, 0.55, 0.6, 0.4], [280, 110, 60, 50]
    drawn = rng.binomial(episodes, rates, size=(4000, 4))
    limits = [mean_interval([(int(k), n) for k, n in zip(row, episodes, strict=True)]) for row in drawn]
    assert 0.935 < np.mean([low <= np.mean(rates) <= high for low, high in limits]) < 0.965


def test_published_averages_are_means_of_their_tiers():
    for entry in METAWORLD.published:
        assert entry.tiers is None or np.mean(entry.tiers) == pytest.approx(entry.average, abs=0.06)
        assert entry.source.startswith("arXiv:")


def test_a_suite_without_tiers_has_one():
    suite = Suite(name="flat", title="Flat", sets={"all": ("a/X-v0", "a/Y-v0")}, whole="all")
    found = score({"a/X-v0": (1, 10), "a/Y-v0": (5, 10)}, suite)
    assert found["tiers"].keys() == {"all"} and found["tier_average"]["pc_success"] == 30
    assert found["tier_average"]["pc_success_ci95"] == pytest.approx([100 * x for x in wilson(6, 20)])


def test_a_suite_of_several_sets_with_different_limits():
    """As in LIBERO: published averages are over four of five sets, and each set has its own maximum of steps."""
    limits = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
    sizes = {name: 90 if name == "libero_90" else 10 for name in limits}
    sets = {name: tuple(f"vla-libero/{name}-{i}-v0" for i in range(size)) for name, size in sizes.items()}
    tiers = tuple(limits)[:4]
    whole = tuple(env_id for name in tiers for env_id in sets[name])
    libero = Suite(
        name="libero",
        title="LIBERO",
        sets=sets | {"libero": whole},
        whole="libero",
        tiers=tiers,
        episodes=50,
        seed=0,
        max_steps=limits,
    )
    configuration.check(libero)
    assert (len(libero.tasks), len(libero.choose(["libero"])), len(libero.choose(["libero_90", "libero"]))) == (
        130,
        40,
        130,
    )
    assert {name: libero.max_steps_of(members[0]) for name, members in sets.items()} == limits
    assert (libero.tier_of(sets["libero_goal"][3]), libero.tier_of(sets["libero_90"][3])) == ("libero_goal", None)
    found = score(dict.fromkeys(sets["libero_90"], (1, 2)), libero)
    assert found["tier_average"] is None and found["episode_average"]["n_episodes"] == 180


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"whole": "al"}, "suite 'toys': unknown task set 'al'. Did you mean 'all'"),
        ({"tiers": ("all/easy",)}, "tiers must contain each task of 'all' once"),
        ({"tiers": ("all", "all/easy")}, "tiers must contain each task of 'all' once"),
        ({"max_steps": {"all/hrd": 3}}, "unknown task set 'all/hrd'. Did you mean 'all/hard'"),
        ({"sets": {"all": ()}, "tiers": (), "variants": {}}, "the task set 'all' is empty"),
        (
            {"sets": {"all": ("a/X-v0", "b/X-v0")}, "tiers": (), "variants": {}, "published": ()},
            "must differ in their last part",
        ),
        (
            {"published": (Published(policy="Snail", average=20.0, tiers=(20.0,)),)},
            "the result of 'Snail' has 1 tiers; the suite has 2",
        ),
        ({"published": (Published(policy="Snail", average=200.0),)}, "average must be between 0 and 100, got 200"),
        ({"teirs": ()}, "unknown key 'teirs'. Did you mean 'tiers'"),
        ({"variants": {"dark": ("all",)}, "published": ()}, "the variant 'dark' has 1 sets; the suite has 2 tiers"),
        (
            {"variants": {"dark": ("all", "drk/hard")}, "published": ()},
            "unknown task set 'drk/hard'. Did you mean 'dark",
        ),
        ({"variants": {}}, "unknown variant 'dark'"),
    ],
)
def test_an_invalid_suite_is_explained(change, message, monkeypatch):
    values = {field.name: getattr(toy_suite.SUITE, field.name) for field in dataclasses.fields(Suite)} | {
        "max_steps": {}
    }
    monkeypatch.setattr(toy_suite, "BROKEN", values | change, raising=False)
    with pytest.raises(ConfigError, match=message):
        find("tests.toy_suite:BROKEN")


def test_variants_are_scored_and_shown_per_tier():
    counts = {"toy/Slide-v0": (9, 10), "toy/Dark-v0": (2, 8)}
    found = score(counts, toy_suite.SUITE)
    assert found["variants"]["dark"]["easy"] | {"pc_success_ci95": 0} == {
        "n_episodes": 8,
        "n_successes": 2,
        "pc_success": 25,
        "pc_success_ci95": 0,
    }
    assert found["tiers"]["easy"]["n_episodes"] == 10 and found["tier_average"] is None
    summary = found | {"published": [dataclasses.asdict(entry) for entry in toy_suite.SUITE.published]}
    assert report.own_rates(summary) == [90, None, None]
    assert report.variants(summary, "mine") == [
        ("easy", ["unchanged", "dark"], [["Hare", None, 50.5], ["mine", 90, 25]])
    ]
    assert score({"toy/Slide-v0": (1, 2)}, toy_suite.SUITE)["variants"] == {}


def test_libero_is_a_suite_of_forty_tasks_with_perturbed_variants():
    libero = find("libero")
    assert (libero.episodes, libero.seed, list(libero.tier_sets)) == (50, 0, ["spatial", "object", "goal", "10"])
    assert len(libero.choose(["four"])) == 40 and len(libero.choose(["90"])) == 90
    assert libero.choose(["pro-goal_swap"])[3] == "vla-libero/goal_swap-3"
    for entry in libero.published:
        assert entry.tiers is None or np.mean(entry.tiers) == pytest.approx(entry.average, abs=0.06)
    with pytest.raises(ConfigError, match="unknown task set 'pro-goal_env'"):
        libero.choose(["pro-goal_env"])


def settings(out: Path | None, kwargs: dict | None = None, **values) -> BenchmarkConfig:
    adapter = AdapterConfig(module="tests.rollout_env", kwargs=kwargs or {})
    return BenchmarkConfig(**{"suite": "toys", "seed": 100_000, "n_envs": 2, "adapter": adapter, "out": out} | values)


def test_a_benchmark_equals_the_rollouts_of_its_tasks(tmp_path, capsys):
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
    assert "Toys, 2 tasks" in page and "Success by tier" in page and "data:video/mp4" in page
    assert "Snail" in page and "arXiv:1234.56789" in page
    printed = capsys.readouterr().out
    assert "mean of the tiers" in printed and "Hare" in printed
    other = benchmark(settings(tmp_path / "c"), Slider(direction=-1.0))
    assert other["tier_average"]["pc_success"] == 0
    assert compare(tmp_path / "b", tmp_path / "c")["only_a"] == 4


def test_finished_tasks_are_not_repeated_and_interrupted_ones_are(tmp_path):
    first = settings(tmp_path / "b", tasks=("all",))
    with pytest.raises(KeyboardInterrupt):
        benchmark(first, Slider(stop_at=3, error=KeyboardInterrupt()))
    stopped = json.loads((tmp_path / "b/benchmark.json").read_text())
    assert stopped["interrupted"] and list(stopped["tasks"]) == ["toy/Slide-v0"] and not stopped["tier_average"]
    before = (tmp_path / "b/tasks/Slide-v0/eval_info.json").stat().st_mtime_ns
    (tmp_path / "b/tasks/Glide-v0/eval_info.json").unlink(missing_ok=True)  # as after a kill: started, without results
    assert (tmp_path / "b/tasks/Glide-v0/config.yaml").is_file()
    again = benchmark(dataclasses.replace(first, n_envs=1, videos=0), Slider())
    assert (tmp_path / "b/tasks/Slide-v0/eval_info.json").stat().st_mtime_ns == before
    assert not again["interrupted"] and again["tier_average"]["pc_success"] == 100
    assert benchmark(first, Slider(stop_at=0, error=ZeroDivisionError()))["tasks"] == again["tasks"]  # nothing to run


def test_a_task_with_a_failed_environment_is_repeated(tmp_path):
    found = benchmark(settings(tmp_path / "b", tasks=("all/easy",)), Slider())
    task = tmp_path / "b/tasks/Slide-v0"
    info = results.read(task)
    info["per_episode"][0]["fault"], info["overall"]["outcomes"] = "the process died", {"fault": 1, "success": 1}
    results.write(info, task)
    assert benchmark(settings(tmp_path / "b", tasks=("all/easy",)), Slider())["tasks"].keys() == found["tasks"].keys()
    assert results.read(task)["per_episode"][0]["fault"] is None


def test_other_settings_are_rejected(tmp_path, monkeypatch):
    asked = settings(tmp_path / "b", tasks=("all/easy",))
    with pytest.raises(SimulatorError, match="no_such_module"):
        benchmark(dataclasses.replace(asked, adapter=AdapterConfig(module="no_such_module")), Slider())
    benchmark(asked, Slider())  # without results, settings may change
    with pytest.raises(ConfigError, match=r"seed = 100000, not 7; adapter\.kwargs\.a = None, not 1"):
        benchmark(
            dataclasses.replace(asked, seed=7, adapter=AdapterConfig(module="tests.rollout_env", kwargs={"a": 1}))
        )
    with pytest.raises(ConfigError, match=r"policy, or the files of nano have changed"):
        benchmark(asked)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").touch()
    with pytest.raises(ConfigError, match=r"unrelated files \(todo\.txt\)"):
        benchmark(dataclasses.replace(asked, out=tmp_path / "notes"), Slider())
    assert (tmp_path / "notes/todo.txt").is_file()


def test_a_suite_that_cannot_be_found_is_explained(tmp_path):
    with pytest.raises(SimulatorError, match=r"no_such_suite.*metaworld"):
        benchmark(settings(tmp_path / "b", suite="no_such_suite:SUITE"))
    with pytest.raises(ConfigError, match=r"unknown suite 'toy'. Did you mean 'toys'\? Valid: .*, 'toys'"):
        benchmark(settings(tmp_path / "b", suite="toy"))
    assert not (tmp_path / "b").exists()


def test_the_suite_defines_the_protocol_and_flags_override_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = benchmark(settings(None, suite="tests.toy_suite:SUITE", seed=None), Slider(direction=-1.0))
    whole = results.read(tmp_path / "runs/toys-benchmark")
    assert found["config"]["tasks"] == ["all"] and found["published"][0]["source"] == "arXiv:1234.56789"
    assert [e["seed"] for e in whole["per_episode"]] == [500, 501] * 2
    # Two episodes with the limit of the environment, and two with that of the suite.
    assert [e["length"] for e in whole["per_episode"]] == [12, 12, 10, 10]
    other = settings(tmp_path / "c", tasks=("all/hard",), episodes=1, seed=7)
    benchmark(dataclasses.replace(other, adapter=dataclasses.replace(other.adapter, max_steps=1)), Slider())
    assert [(e["seed"], e["length"]) for e in results.read(tmp_path / "c")["per_episode"]] == [(7, 1)]


def test_a_folder_of_an_older_version_is_resumed(tmp_path):
    """Its settings name no suite; the suite was Meta-World."""
    out, reach = tmp_path / "b", "vla-metaworld/reach-v3"
    benchmark(settings(out, tasks=("toy/Slide-v0",)), Slider())
    (out / "tasks/Slide-v0").rename(out / "tasks/reach-v3")
    values = yaml.safe_load((out / "config.yaml").read_text()) | {"tasks": [reach]}
    del values["suite"]
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    asked = settings(out, suite="metaworld", tasks=(reach,), episodes=2)
    found = benchmark(asked, Slider(stop_at=0, error=ZeroDivisionError()))
    assert found["tasks"][reach]["tier"] == "easy" and not found["interrupted"]
    with pytest.raises(ConfigError, match="suite = metaworld, not toys"):
        benchmark(dataclasses.replace(asked, suite="toys", tasks=("all/easy",)), Slider())


@pytest.fixture(scope="module")
def toy_policy(tmp_path_factory) -> Path:
    """An untrained policy for the robot of the toy environments."""
    rng = np.random.default_rng(0)
    actions, states = (rng.uniform(-1, 1, (500, 1)).astype(np.float32) for _ in range(2))
    statistics = {"toys": {"action": compute_statistics(actions), "state": compute_statistics(states)}}
    torch.manual_seed(0)
    model = ModelConfig(backbone="tiny-init", horizon=2, n_action_steps=2, bins=31)
    folder = tmp_path_factory.mktemp("toys") / "policy"
    for part in build_policy(model, DataFacts(RobotSpec.from_dict(ROBOT), statistics, {"toys": actions})):
        part.save_pretrained(folder)
    return folder


def test_a_suite_of_a_plugin_on_the_command_line(toy_policy, tmp_path, capsys, monkeypatch):
    """The suite is not part of the package."""
    monkeypatch.delitem(SUITES._members, "toys")
    monkeypatch.delitem(sys.modules, "tests.toy_suite")
    (tmp_path / "toys.yaml").write_text("adapter: {module: tests.rollout_env}\n")
    command = ["benchmark", "toys", "--config", tmp_path / "toys.yaml", "--policy", toy_policy]
    command = [*map(str, command), "--n-envs", "2", "--out", str(tmp_path / "b")]
    assert cli.main(command) == 2
    assert "unknown suite 'toys'. Valid: 'metaworld', 'libero'. If it is registered" in capsys.readouterr().err
    assert cli.main(["--plugin", "tests.toy_suite", *command, "--tasks", "all/easy"]) == 0
    found = json.loads((tmp_path / "b/benchmark.json").read_text())
    assert found["episode_average"]["n_episodes"] == 2 and found["config"]["suite"] == "toys"
    capsys.readouterr()
    assert cli.main([*command, "--tasks", "all/easy"]) == 0  # finished
    assert "task 1 of" not in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """An untrained policy for Meta-World's robot, with the built-in architecture."""
    pytest.importorskip("metaworld")
    from vla.simulation import adapter as simulator

    env = simulator.make("vla-metaworld/reach-v3", AdapterConfig(kwargs={"action_repeat": 4}))
    robot = env.robot
    env.close()
    assert robot.state_names == ("x", "y", "z", "gripper") and robot.cameras == ("corner2",) and robot.control_hz == 20
    random = np.random.default_rng(0).uniform(-1, 1, (500, 4)).astype(np.float32)
    statistics = {"metaworld": {"action": compute_statistics(random), "state": compute_statistics(random)}}
    torch.manual_seed(0)
    model = ModelConfig(backbone="tiny-init", horizon=4, n_action_steps=4, bins=31)
    for part in build_policy(model, DataFacts(robot, statistics, {"metaworld": random})):
        part.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_command_line_is_stopped_and_resumed(checkpoint, tmp_path, capsys, start_vla):
    out, values = tmp_path / "b", tmp_path / "values.yaml"
    tasks = [f"vla-metaworld/{task}-v3" for task in ("shelf-place", "stick-pull")]
    values.write_text("adapter: {kwargs: {action_repeat: 4, phrasing: canonical}, max_steps: 8}\n")
    command = ["benchmark", "metaworld", f"--config={values}", "--policy", checkpoint]
    command += ["--tasks", *tasks, "--episodes", "2", "--n-envs", "1", "--videos", "0", "--out", out]

    running = start_vla(*command)
    first, deadline = out / "tasks/shelf-place-v3/eval_info.json", time.monotonic() + 120
    while not first.is_file() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "1 of 2 tasks are finished. Run the same command again" in said
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
    assert all(e["length"] <= 8 for e in whole["per_episode"])
    assert [e["instruction"] for e in whole["per_episode"][::2]] == [
        "put the block on the shelf",
        "pull the bottle with the stick",
    ]
    assert configuration.load(BenchmarkConfig, out / "config.yaml").tasks == tuple(tasks)

    assert cli.main([*map(str, command), "--seed", "3"]) == 2
    assert "started with other settings: seed = " in capsys.readouterr().err
