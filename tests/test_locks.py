"""The locks satisfy pyproject.toml, and `scripts/setup` reports problems."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vla.jobs import doctor

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_every_requirement_is_locked_at_a_version_that_it_allows(extra):
    locks = {lock.name.lower().replace("_", "-"): lock for lock in doctor.locked()}
    for line in PROJECT["dependencies"] if extra is None else EXTRAS[extra]:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            (pin,) = locks[wanted.name.lower().replace("_", "-")].specifier
            assert pin.operator == "==" and wanted.specifier.contains(pin.version), f"run scripts/lock: {line}, {pin}"


def test_every_locked_file_has_a_hash_and_no_address():
    for path in (ROOT / "vla" / "locks").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text, path
        if path.name != "torch.txt":
            pinned = re.findall(r"^\w.*==.*\\\n    --hash=sha256:", text, re.MULTILINE)
            assert len(pinned) == len(re.findall(r"^\w", text, re.MULTILINE)) > 0, path


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose core lock requires a package that does not exist, and `setup(*extras, **environment)` in it."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "vla" / "locks").mkdir(parents=True)
    for name in ("core", "dev", "torch"):
        (tmp_path / "vla" / "locks" / f"{name}.txt").write_text("")
    (tmp_path / "vla" / "locks" / "core.txt").write_text(f"no-such-package==1.0 --hash=sha256:{'0' * 64}\n")

    def setup(*extras, **environment):
        known = {key: value for key, value in os.environ.items() if key != "VLA_VENV"}
        known |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
        command = [tmp_path / "scripts" / "setup", *extras]
        return subprocess.run(command, env=known | environment, capture_output=True, text=True)

    return setup


def test_a_missing_version_is_one_message_and_an_interrupted_install_is_repeated(checkout, tmp_path):
    first = checkout()
    assert first.returncode == 1
    assert "No matching distribution found for no-such-package==1.0" in first.stderr
    assert (
        "could not be installed for Python 3." in first.stderr and "pip install -r vla/locks/torch.txt" in first.stderr
    )
    assert not list((tmp_path / ".venv").glob(".vla-*")), "it must not count as installed"

    left = tmp_path / ".venv" / "lib" / "left-by-an-interrupted-pip"
    left.touch()
    assert "will be recreated" not in checkout().stdout  # pip was not interrupted, so the environment is kept
    assert left.exists()
    (tmp_path / ".venv" / ".vla-installing").touch()  # left by an interrupted installation
    assert "will be recreated" in checkout().stdout
    assert not left.exists()


def test_problems_are_reported_before_the_environment_is_created(checkout, tmp_path):
    assert "unknown extra 'metawrld'. Valid: dev" in checkout("metawrld").stderr
    assert "there is no 'python9'" in checkout(PYTHON="python9").stderr
    old = tmp_path / "python3"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 1); exec(sys.stdin.read())'\n"
    )
    old.chmod(0o755)
    assert re.search(r"Python 3\.11 to 3\.\d+ is needed", checkout(PYTHON=str(old)).stderr)
    assert not (tmp_path / ".venv").exists()
