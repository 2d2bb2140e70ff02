"""Statistics compared with published values, results with LeRobot's names, and a self-contained page."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest

from vla.errors import DataError
from vla.evaluation import report, results
from vla.evaluation.comparison import compare
from vla.evaluation.results import Episode, evaluate, latency, summarise
from vla.simulation.clips import MOST_FRAMES, Recorder, encode
from vla.support.statistics import difference, fisher, mcnemar, paired_difference, percentiles, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        (16, 20, (0.5840, 0.9193)),
        (81, 263, (0.2553, 0.3662)),  # these three: Newcombe 1998, table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (1, 29, (0.0061, 0.1718)),
        (0, 20, (0.0, 0.1611)),
        (20, 20, (0.8389, 1.0)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilson_interval_has_the_published_values(successes, trials, expected):
    assert wilson(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_differences_have_the_published_values():
    # Newcombe 1998, 56/70 against 48/80, method 10.
    assert difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    # Agresti's approval ratings: 0.04 with the large-sample interval (0.021, 0.059).
    assert paired_difference(794, 150, 86, 570) == pytest.approx((0.021, 0.059), abs=1e-3)


def test_exact_tests_have_the_known_values():
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert fisher(3, 4, 1, 4) == pytest.approx(34 / 70)  # the lady tasting tea, two-sided
    assert fisher(8, 20, 3, 20) == pytest.approx(0.15518744551)  # scipy.stats.fisher_exact


def test_coverage_of_the_paired_interval():
    rng = np.random.default_rng(0)
    shares = [0.5, 0.2, 0.05, 0.25]  # both, only A, only B, neither
    tables = rng.multinomial(40, shares, size=2000)
    inside = [low <= 0.15 <= high for low, high in (paired_difference(*map(int, table)) for table in tables)]
    assert 0.93 < np.mean(inside) < 0.97


def test_percentiles_are_of_the_sample():
    assert percentiles(range(101)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}


def episodes_of(outcomes: str, env_id: str = "vla/PickUp-v0") -> list[Episode]:
    """One episode per letter: s(uccess), l(ost), w(rong target), t(imeout), e(nded), f(ault)."""
    made = []
    for i, letter in enumerate(outcomes):
        episode = Episode(i, env_id, 100 + i, instruction="pick up the cube", length=10 + i, decode_ms=[2.0, 4.0])
        episode.success, episode.success_ever = letter == "s", letter in "sl"
        episode.truncated = letter == "t"
        episode.fault = "the motor failed" if letter == "f" else None
        episode.reached, episode.target = (1, 0) if letter == "w" else (0, 0)
        episode.sum_reward = episode.max_reward = float(episode.success)
        made.append(episode)
    return made


def info_of(episodes: list[Episode], name: str = "runs/a", **extra) -> dict:
    """The results of a rollout with these episodes."""
    return evaluate(episodes, 12.0) | {
        "decode_latency": latency([(4, 0.5), (4, 0.010), (4, 0.012), (2, 0.008)]),
        "interrupted": False,
        "n_episodes_asked": len(episodes),
        "policy": {"path": name, "sha256": "ab" * 32},
        "n_action_steps": 8,
        "machine": {
            "platform": "Linux",
            "cpu": "a processor",
            "cores": 2,
            "device": "cpu",
            "torch_threads": 2,
            "versions": {"python": "3.11", "torch": "2.13", "peft": None},
            "gl": {"backend": "egl", "renderer": "llvmpipe", "version": None},
        },
        "config": {"seed": 100, "episodes": len(episodes), "n_envs": 4, "out": name},
        "command": f"vla rollout --config {name}/config.yaml --overwrite",
        **extra,
    }


def test_results_have_lerobots_names_and_intervals():
    info = evaluate(episodes_of("sslwtef"), 14.0)
    assert [e["outcome"] for e in info["per_episode"]] == [
        "success", "success", "lost", "wrong_target", "timeout", "ended", "fault",
    ]  # fmt: skip
    assert {"episode_ix", "sum_reward", "max_reward", "success", "seed"} <= info["per_episode"][0].keys()
    overall = info["overall"]
    assert {"avg_sum_reward", "avg_max_reward", "pc_success", "eval_s", "eval_ep_s", "n_episodes"} <= overall.keys()
    assert overall["pc_success"] == pytest.approx(200 / 7)
    assert overall["pc_success_ever"] == pytest.approx(300 / 7)
    assert overall["pc_success_ci95"] == pytest.approx([100 * limit for limit in wilson(2, 7)])
    assert overall["eval_ep_s"] == 2.0
    assert info["per_task"][0].keys() >= {"task_group", "task_id", "metrics"}
    assert info["per_task"][0]["metrics"]["successes"] == [True, True] + [False] * 5
    assert info["per_group"].keys() == {"vla"}
    assert info["per_episode"][0]["decode_ms_p50"] == 3.0


def test_results_without_episodes(tmp_path):
    nothing = summarise([])
    assert nothing["pc_success"] is nothing["avg_sum_reward"] is None
    assert nothing["pc_success_ci95"] == [0.0, 100.0]
    page = report.render(info_of([], interrupted=True, decode_latency=latency([])), tmp_path)
    assert "Stopped early" in page


def test_latency_excludes_the_warm_up():
    found = latency([(4, 0.5), (4, 0.010), (4, 0.012), (2, 0.008)])
    assert (found["n_forwards"], found["first_ms"]) == (4, 500.0)
    assert found["ms"]["max"] == pytest.approx(12.0)
    assert found["per_batch_size"]["4"]["n_forwards"] == 2
    assert sum(found["histogram"]["counts"]) == 3


def test_paired_runs_are_compared_by_seed():
    a, b = info_of(episodes_of("ssssssssst"), "runs/a"), info_of(episodes_of("tttttttsst"), "runs/b")
    found = compare(a, b)
    assert (found["paired"], found["only_a"], found["only_b"], found["test"]) == (True, 7, 0, "exact McNemar")
    assert found["difference"] == pytest.approx(70.0)
    assert found["p_value"] == pytest.approx(2 / 2**7)
    assert "runs/a is better" in found["words"]
    assert found["n_left_out"] == 0
    again = compare(b, a)
    assert again["difference"] == pytest.approx(-70.0)
    assert again["difference_ci95"] == pytest.approx([-limit for limit in reversed(found["difference_ci95"])])


def test_insignificant_differences():
    found = compare(info_of(episodes_of("sssst"), "runs/a"), info_of(episodes_of("ssstt"), "runs/b"))
    assert "difference is not significant" in found["words"]
    assert "p = 1)" in found["words"]


def test_names_of_runs():
    a, b = info_of(episodes_of("s"), "runs/a"), info_of(episodes_of("s"), "runs/b")
    b["policy"]["path"] = None  # a policy without a path
    assert (compare(a, b)["name_a"], compare(a, b)["name_b"]) == ("runs/a", "runs/b")
    a["config"], b["config"] = {}, {}
    assert (compare(a, b)["name_a"], compare(a, b)["name_b"]) == ("A", "B")


def test_runs_without_common_seeds_are_unpaired():
    others = episodes_of("ttts")
    for episode in others:
        episode.seed += 1000
    found = compare(info_of(episodes_of("ssst"), "runs/a"), info_of(others, "runs/b"))
    assert (found["paired"], found["test"]) == (False, "Fisher's exact")
    assert found["p_value"] == pytest.approx(34 / 70)


def test_only_common_environments_are_compared(tmp_path):
    longer = info_of(episodes_of("sssss") + episodes_of("tttt", "vla/Push-v0"), "runs/a")
    found = compare(longer, info_of(episodes_of("sst"), "runs/b"))
    assert (found["n_a"], found["n_b"], found["n_left_out"]) == (3, 3, 6)
    assert [task["env_id"] for task in found["per_task"]] == ["vla/PickUp-v0"]
    with pytest.raises(DataError, match="no environment in common"):
        compare(longer, info_of(episodes_of("s", "vla/Stack-v0")))
    (tmp_path / "eval_info.json").write_text('{"per_episode": []}')
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"has no results of `vla rollout`"):
            results.read(place)


class Page(HTMLParser):
    """Checks that tags are nested, and collects addresses and text."""

    VOID = {"meta"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data.strip())


def test_the_page_is_self_contained_with_videos(tmp_path):
    episodes = episodes_of("sslwtef")
    frames = [np.full((96, 96, 3), 20 * i, np.uint8) for i in range(9)]
    for episode in (episodes[0], episodes[3]):
        episode.video_path = f"videos/{episode.seed}.mp4"
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / episode.video_path).write_bytes(encode(frames, 10))
    episodes[2].video_path = "videos/gone.mp4"
    baseline = info_of(episodes_of("ttttttt"), "runs/b")
    info = info_of(episodes)
    info["comparison"] = compare(info, baseline)
    report.write(info, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert len(page.addresses) == 2
    for address in page.addresses:
        kind, _, payload = address.partition(",")
        assert kind == "data:video/mp4;base64"
        with av.open(io.BytesIO(base64.b64decode(payload))) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
    low, high = (100 * limit for limit in wilson(2, 7))
    assert f"95 % interval {low:.3g} to {high:.3g} %" in words
    assert "went to another object" in words
    assert "the motor failed" in words
    assert info["comparison"]["words"] in words
    assert "llvmpipe" in words
    assert "2 cores, policy on cpu with 2 threads" in words
    assert "vla rollout --config runs/a/config.yaml --overwrite" in words


def test_text_from_environments_cannot_change_the_page(tmp_path):
    episode = episodes_of("f")[0]
    episode.instruction = episode.fault = "<script>alert(1)</script>"
    assert "<script>alert" not in report.render(info_of([episode]), tmp_path)


def test_results_are_strict_json(tmp_path):
    info = info_of(episodes_of("st"))
    results.write(info, tmp_path)
    assert json.loads((tmp_path / "eval_info.json").read_text()) == info
    assert results.read(tmp_path) == info
    results.write(info | {"reward": float("nan")}, tmp_path)  # a reward of NaN must not lose the results
    assert results.read(tmp_path) == info | {"reward": None}


def test_summary(tmp_path):
    text = report.summary(info_of(episodes_of("ssst") + episodes_of("tf", "envs:vla/Push-v0")), tmp_path)
    assert re.search(r"vla/PickUp-v0 +3/4 +75\.0 % +\(95 % interval 30 to 95; ever 75 %\)", text)
    assert re.search(r"all +3/6 +50\.0 %", text)
    assert "not successful: 2 ran out of time, 1 environment fault" in text
    assert "p50 10.0 ms" in text


def test_long_episodes_are_recorded_in_bounded_memory():
    recorder = Recorder()
    observation = {"pixels": {"front": np.zeros((8, 8, 3), np.uint8), "wrist": np.zeros((16, 16, 3), np.uint8)}}
    for _ in range(3 * MOST_FRAMES):
        recorder.add(observation)
    assert len(recorder._frames) <= MOST_FRAMES
    assert recorder._frames[0].shape == (16, 32, 3)
    assert recorder._stride == 4


def test_a_large_video_is_linked_and_not_embedded(tmp_path, monkeypatch):
    episodes = episodes_of("ss")
    for episode, size in zip(episodes, (10, 100), strict=True):
        episode.video_path = f"{episode.seed}.mp4"
        (tmp_path / episode.video_path).write_bytes(bytes(size))
    monkeypatch.setattr(report, "MOST_EMBEDDED", 50)
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    small, large = report._videos(info_of(episodes)["per_episode"], tmp_path)
    assert small["source"].startswith("data:video/mp4") and large["source"] == episodes[1].video_path
    assert read == [episodes[0].video_path]
