"""The README's Python runs, its commands parse, and the files it names exist."""

import re
import shlex
from pathlib import Path

import pytest

from vla import cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """All `vla ...` commands in the README's shell blocks, with joined lines and without comments."""
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
    blocks = re.findall(r"<!-- test -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})  # each block continues the previous one
    printed = capsys.readouterr().out
    assert "-> " in printed and "(1, 8, 7)" in printed


def test_the_client_gets_actions_and_reasons(serving):
    (client,) = re.findall(r"<!-- client -->\n```python\n(.*?)```", README, re.DOTALL)
    with serving() as served:
        client = client.replace("http://127.0.0.1:8000", served.http)
        variables: dict = {}
        exec(client, variables)
        assert variables["chunk"].shape == (served.policy.n_action_steps, 7)
        with pytest.raises(SystemExit, match="state: expected 7 entries"):
            exec(client.replace("np.zeros(7", "np.zeros(3"), {})


def test_named_files_exist():
    named = re.findall(r"\b(?:configs|scripts|docs)/[\w./-]*\w", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_fault_tables_tests_exist():
    for name in re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "faults.md").read_text()):
        assert (ROOT / name).exists(), name
