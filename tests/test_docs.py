"""The Python blocks and example files of the how-to pages are executed. Their commands are executed or parsed."""

import dataclasses
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vla import cli
from vla.data.format import Info
from vla.evaluation.suites import SUITES
from vla.serving.protocols import PROTOCOLS

DOCS = Path(__file__).parent.parent / "docs"


def block(page: str, mark: str, language: str) -> str:
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```{language}\n(.*?)```", page, re.DOTALL)
    return found


def test_environment_from_collection_to_deployment(tmp_path, monkeypatch, capsys):
    page = (DOCS / "environments.md").read_text()
    for name, language in (("my_world.py", "python"), ("my_world.yaml", "yaml"), ("my_suite.py", "python")):
        (tmp_path / name).write_text(block(page, f"file: {name}", language))
    with (tmp_path / "my_suite.py").open("a") as suite:
        suite.write(block(page, "append: my_suite.py", "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SUITES, "_members", dict(SUITES._members))
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr("sys.meta_path", list(sys.meta_path))
    # Smaller, so that it runs in seconds.
    sizes = {"--episodes": "2", "--steps": "2", "--batch-size": "2"}
    commands = "".join(block(page, mark, "bash") for mark in ("commands", "suite commands", "plugin commands"))
    for line in commands.strip().splitlines():
        words = shlex.split(line)[1:]
        words = [sizes.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        assert cli.main(words) == 0, (line, capsys.readouterr())
    assert (tmp_path / "report" / "report.html").is_file() and (tmp_path / "deployment" / "deploy.json").is_file()
    for folder in ("my-benchmark", "runs/planes-benchmark"):
        benchmark = json.loads((tmp_path / folder / "benchmark.json").read_text())
        assert benchmark["episode_average"]["n_episodes"] == 10 and benchmark["tier_average"] is not None


def test_custom_wire_protocol(serving, observations, monkeypatch):
    monkeypatch.setattr(PROTOCOLS, "_members", dict(PROTOCOLS._members))
    exec(block((DOCS / "inputs.md").read_text(), "file: my_protocol.py", "python"), {})
    (observation,) = observations(1)
    images = {camera: image.tolist() for camera, image in observation["pixels"].items()}
    request = {"images": images, "state": observation["agent_pos"].tolist(), "prompt": "go"}
    with serving() as served:
        reply = requests.post(served.http + "/plain", json=request, timeout=20).json()
        np.testing.assert_array_equal(np.float32(reply["actions"]), served.policy.predict_chunk(observation, "go"))
        assert "no image" in requests.post(served.http + "/plain", json={}, timeout=20).json()["detail"]


def test_recording(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(block((DOCS / "datasets.md").read_text(), "test", "python"), {})
    assert capsys.readouterr().out == "20\n" and (tmp_path / "datasets" / "mine" / "meta").is_dir()


def test_the_robot_of_an_imported_dataset():
    """As in `meta/info.json` of lerobot/pusht."""
    vector = {"dtype": "float32", "shape": [2], "names": {"motors": ["motor_0", "motor_1"]}}
    image = {"dtype": "video", "shape": [96, 96, 3], "names": ["height", "width", "channel"]}
    info = Info(10, {"observation.image": image, "observation.state": vector, "action": vector})
    assert info.describe_robot().action_space == "unspecified"
    entry = json.loads("{" + block((DOCS / "datasets.md").read_text(), "robot", "json") + "}")
    robot = dataclasses.replace(info, **entry).describe_robot()
    assert (robot.action_space, robot.action_names, robot.cameras) == ("ee_position", ("x", "y"), ("image",))


def test_the_api_reference_is_made_from_the_docstrings(tmp_path):
    main = runpy.run_path(str(DOCS.parent / "scripts" / "api"))["main"]
    main(["vla", "vla.policy", "vla.spec", "--out", str(tmp_path)])
    page = (tmp_path / "vla" / "policy.html").read_text()
    assert "Predict one chunk per observation" in page and (tmp_path / "vla" / "spec.html").is_file()


def test_the_tutorial_prints_what_it_shows(capsys):
    page, variables = (DOCS / "autoregressive.md").read_text(), {}
    steps = re.findall(
        r"<!-- run -->\n```python\n(.*?)```\n\n<!-- prints( something like)? -->\n```text\n(.*?)```", page, re.DOTALL
    )
    assert len(steps) == page.count("```python") == 16
    number = re.compile(r"-?\d+\.?\d*")
    for code, varies, shown in steps:
        exec(code, variables)
        printed = capsys.readouterr().out
        assert number.sub("", printed).split() == number.sub("", shown).split(), printed
        if not varies:
            numbers = [[float(value) for value in number.findall(text)] for text in (printed, shown)]
            np.testing.assert_allclose(*numbers, atol=0.021, err_msg=printed)  # images may differ by rounding
    p, five = variables["p"], variables["five"]
    for name, warp in (
        ("T = 0.5", TemperatureLogitsWarper(0.5)),
        ("T = 2", TemperatureLogitsWarper(2.0)),
        ("top-k 2", TopKLogitsWarper(2)),
        ("top-p 0.8", TopPLogitsWarper(0.8)),
    ):
        np.testing.assert_allclose(five[name], warp(None, p.log()[None]).softmax(-1)[0], atol=1e-6)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_parse_and_links_exist(page):
    text = page.read_text()
    for lines in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in lines.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[1:2] == ["--plugin"]:
                del words[1:3]
            if words[:1] == ["vla"] and "..." not in words and "--config" not in words:
                name = " ".join(words[1:3]) if " ".join(words[1:3]) in cli.VERBS else words[1]
                cli._parse(name, cli.VERBS[name], words[1 + len(name.split()) :])
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), link
