"""Run folders: ownership, settings, and atomic writes."""

import dataclasses
import json
import math
import signal
import subprocess
import sys

import pytest

from vla import config as configuration
from vla.config import AdapterConfig, CollectConfig, RolloutConfig
from vla.errors import ConfigError
from vla.support.run_folder import RunFolder, write_json, write_text


def folder_of(path, **values) -> RunFolder:
    return RunFolder(path, CollectConfig(env=("toy/Slide-v0",), out=path, **values), "run.yaml", free=("workers",))


def holds(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_is_claimed_with_its_settings(tmp_path, resume):
    for path in (tmp_path / "made" / "here", holds(tmp_path / "empty")):
        folder = folder_of(path, episodes=7, resume=resume)
        folder.claim(resume)
        found = configuration.load(CollectConfig, path / "run.yaml")
        assert found == dataclasses.replace(
            folder.config, resume=False
        )  # `resume` is not stored, so it is not needed next time


def test_checking_writes_nothing(tmp_path):
    folder_of(tmp_path / "none").check(resume=False)
    folder_of(tmp_path / "none").check_settings()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_unrelated_folders_are_rejected_and_unchanged(tmp_path, resume):
    path = holds(tmp_path / "mine", thesis_txt="300 pages", notes_txt="")
    with pytest.raises(ConfigError, match=r"mine contains unrelated files \(notes.txt\). Choose another --out"):
        folder_of(path).claim(resume)
    assert (path / "thesis.txt").read_text() == "300 pages" and not (path / "run.yaml").exists()
    with pytest.raises(ConfigError, match=r"thesis.txt is a file"):
        folder_of(path / "thesis.txt").claim(resume)


def test_settings_of_another_job_are_rejected(tmp_path):
    holds(tmp_path)
    configuration.dump(RolloutConfig(), tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"does not fit this job: .*unknown key 'policy'.*\)\. Choose"):
        folder_of(tmp_path).claim(resume=True)


@pytest.mark.parametrize("text", ["", "episodes: [", "episodes: 0", "unheard_of: 1", "\x00"])
def test_unreadable_settings_are_one_message(tmp_path, text):
    path = holds(tmp_path / "run", run_yaml=text)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"unrelated files \(run.yaml does not fit this job: (.|\n)*--out"):
            folder_of(path).claim(resume)
    assert (path / "run.yaml").read_text() == text


def test_binary_settings_are_one_message(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match=r"unrelated files \(run.yaml does not fit this job"):
        folder_of(tmp_path).claim(resume=True)


def test_an_earlier_run_is_continued_only_with_resume(tmp_path):
    folder_of(tmp_path).claim(resume=False)
    with pytest.raises(ConfigError, match=r"already contains a run\. Continue it with --resume, or choose another"):
        folder_of(tmp_path).claim(resume=False)
    folder_of(tmp_path).claim(resume=True)


def test_only_free_settings_may_differ(tmp_path):
    folder_of(tmp_path, workers=1, seed=3).claim(resume=False)
    written = (tmp_path / "run.yaml").read_text()
    other = folder_of(tmp_path, workers=2, seed=4, adapter=AdapterConfig(max_steps=40, kwargs={"size": 2}))
    with pytest.raises(ConfigError) as refused:
        other.claim(resume=True)
    said = str(refused.value)
    assert "other settings: seed = 3, not 4; " in said and "workers" not in said
    assert "adapter.max_steps = None, not 40" in said and "adapter.kwargs.size = None, not 2" in said
    assert f"`--config {tmp_path}/run.yaml`), or choose another --out." in said
    assert (tmp_path / "run.yaml").read_text() == written
    folder_of(tmp_path, workers=2, seed=3).claim(resume=True)
    assert configuration.load(CollectConfig, tmp_path / "run.yaml").workers == 2


def test_a_folder_may_be_moved(tmp_path):
    folder_of(tmp_path / "here").claim(resume=False)
    (tmp_path / "here").rename(tmp_path / "there")
    folder_of(tmp_path / "there").claim(resume=True)


def test_settings_without_results_may_be_replaced(tmp_path):
    folder_of(tmp_path, seed=3).claim(resume=False)
    folder = folder_of(tmp_path, seed=4)
    folder.check(resume=True, has_results=False)
    folder.begin()
    assert configuration.load(CollectConfig, tmp_path / "run.yaml").seed == 4
    with pytest.raises(ConfigError, match="--resume"):
        folder.check(resume=False, has_results=False)


def test_settings_in_a_subfolder_with_another_hint(tmp_path):
    folder = dataclasses.replace(folder_of(tmp_path), settings=".partial/run.yaml", remedy="give --fresh")
    folder.begin()
    other = dataclasses.replace(folder, config=dataclasses.replace(folder.config, seed=9))
    with pytest.raises(ConfigError, match=r"seed = 0, not 9\. .*\.partial/run\.yaml`\), or give --fresh\."):
        other.check_settings()
    assert folder.entries() == {".partial"}


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        (None, False),
        ('{"interrupted": false}', True),
        ('{"interrupted":true}', False),
        ('{"note": "\\"interrupted\\": true"}', True),
        ('{"per_task": {"interrupted": true}}', True),
        ("[]", True),  # of another program, or damaged: must not be replaced
        ('{"interrupted": tr', True),
    ],
)
def test_is_finished(tmp_path, text, finished):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert RunFolder(tmp_path).is_finished("results.json") is finished


@pytest.mark.parametrize("text", [None, "", "[1]", '{"a": '])
def test_unreadable_json_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "facts.json").write_text(text)
    with pytest.raises(ConfigError, match=r"facts\.json"):
        RunFolder(tmp_path).read_json("facts.json")


def test_json_is_strict_and_creates_its_folder(tmp_path):
    folder = RunFolder(tmp_path / "out")
    folder.write_json("facts.json", {"a": (1.5, math.nan), "b": {"c": -math.inf, "d": [True, None, "NaN"]}})

    def not_json(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / "out/facts.json").read_text(), parse_constant=not_json)
    assert found == {"a": [1.5, None], "b": {"c": None, "d": [True, None, "NaN"]}} == folder.read_json("facts.json")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"new": object()})
    with pytest.raises(UnicodeEncodeError):  # the first half is written before the second half fails to encode
        write_text(tmp_path / "a.json", "x" * 100_000 + "\ud800")
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_process_killed_during_a_write_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    program = (
        "import pathlib, sys\n"
        "from vla.support.run_folder import write_json\n"
        "print(flush=True)\n"
        "while True:\n"
        "    write_json(pathlib.Path(sys.argv[1]), {'new': ['x' * 100] * 50_000})\n"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", program, tmp_path / "a.json"], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"\n"
        while not list(tmp_path.glob(".*.part")):
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert json.loads((tmp_path / "a.json").read_text()).keys() <= {"old", "new"}
    (tmp_path / "a.json").unlink()
    (tmp_path / ".a.json.part").write_text('{"ne')
    (tmp_path / "run.partial").write_text("epi")  # a leftover of writing the settings
    assert RunFolder(tmp_path).entries() == set()
    folder_of(tmp_path).claim(resume=False)
