"""The how-to pages are executed: their files, commands and Python."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from vla import cli

DOCS = Path(__file__).parent.parent / "docs"


def block(page: str, mark: str, language: str) -> str:
    (found,) = re.findall(rf"<!-- {re.escape(mark)} -->\n```{language}\n(.*?)```", page, re.DOTALL)
    return found


def test_an_environment_of_ones_own_from_nothing_to_a_deployment(tmp_path, monkeypatch, capsys):
    page = (DOCS / "environments.md").read_text()
    for name, language in (("my_world.py", "python"), ("my_world.yaml", "yaml")):
        (tmp_path / name).write_text(block(page, f"file: {name}", language))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr("sys.meta_path", list(sys.meta_path))
    # Smaller, so that it takes seconds.
    sizes = {"--episodes": "2", "--steps": "2", "--batch-size": "2"}
    for line in block(page, "commands", "bash").strip().splitlines():
        words = shlex.split(line)[1:]
        words = [sizes.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        assert cli.main(words) == 0, (line, capsys.readouterr())
    assert (tmp_path / "report" / "report.html").is_file() and (tmp_path / "deployment" / "deploy.json").is_file()


def test_recording_of_ones_own(tmp_path, capsys):
    exec(block((DOCS / "datasets.md").read_text(), "test", "python"), {"folder": tmp_path / "mine"})
    assert capsys.readouterr().out == "20\n"


def test_the_api_reference_is_made_from_the_docstrings(tmp_path):
    main = runpy.run_path(str(DOCS.parent / "scripts" / "api"))["main"]
    main(["vla", "vla.policy", "vla.spec", "--out", str(tmp_path)])
    page = (tmp_path / "vla" / "policy.html").read_text()
    assert "Chunks for a batch of observations" in page and (tmp_path / "vla" / "spec.html").is_file()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_parse_and_links_lead_somewhere(page):
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
