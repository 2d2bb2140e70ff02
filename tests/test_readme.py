"""The README is executed: its Python runs, its commands parse, the files it names exist."""

import re
import shlex
from pathlib import Path

import pytest

from vla import cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Every `vla ...` command of the README's shell blocks, continuation lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parsed = [shlex.split(line, comments=True) for line in lines]
    return [words for words in parsed if words[:1] == ["vla"]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words):
    verb = cli.VERBS[words[1]]
    cls = getattr(config, verb.config)
    values = cli._parse(words[1], verb, words[2:])
    assert isinstance(values, cls)


def test_python_runs(capsys):
    code = re.search(r"<!-- test -->\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    exec(compile(code.group(1), "README.md", "exec"), {})
    assert "-> " in capsys.readouterr().out


def test_named_files_exist():
    named = re.findall(r"\b(?:configs|scripts|docs)/[\w./-]*\w", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
