"""The command line: flags become a configuration; errors become one message and an exit status."""

import dataclasses
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla import cli, config
from vla.cli import VERBS, main
from vla.config import flags
from vla.errors import ConfigError, VLAError

ALONE = "import sys; from vla.cli import main; sys.exit(main(sys.argv[1:]))"


def vla(*arguments: str, code: str = ALONE, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a new process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1", **environment},
        timeout=60,
    )


@pytest.fixture
def job(monkeypatch):
    """Replace the job of `vla doctor`: `job(function)`."""

    def install(function):
        monkeypatch.setitem(VERBS, "doctor", VERBS["doctor"]._replace(job="test_cli:stand_in"))
        monkeypatch.setattr(sys.modules[__name__], "stand_in", function, raising=False)

    monkeypatch.setitem(sys.modules, "test_cli", sys.modules[__name__])
    return install


def test_help_lists_every_verb_without_importing_anything_heavy():
    code = ALONE.replace("sys.exit(", "assert 0 == (").replace(
        "[1:]))", "[1:])); assert not {'torch', 'transformers', 'numpy', 'tyro', 'gymnasium'} & set(sys.modules)"
    )
    done = vla("--help", code=code)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {verb} ", done.stdout, re.M) for verb in VERBS)


def test_version():
    assert vla("--version").stdout == "vla 0.1.0\n"


def test_an_unknown_verb_suggests_the_nearest(capsys):
    assert main(["rolout"]) == 2
    assert "Did you mean 'rollout'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "old", "new"), [("deploy", "--seam", "--transition"), ("train", "--committed", "--prefix")]
)
def test_a_renamed_flag_is_rejected_with_its_new_name(verb, old, new, capsys):
    assert main([verb, old, "1"]) == 2
    assert f"{old} is now called {new}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rollout --polcy x", "`vla rollout` has no flag '--polcy'. Did you mean '--policy'?"),
        ("train --lr 0.1", "Did you mean '--learning-rate'?"),
        ("train --device cuda", "no flag '--device'. It is a flag of rollout, deploy,"),
        ("dagger --trian.steps=3", "Did you mean '--train.steps'?"),
        ("train datasets/mine", "unexpected argument 'datasets/mine'"),
        ("train --report-to wnadb", "unknown report_to 'wnadb'. Did you mean 'wandb'? Valid: 'none',"),
        ("collect --keep al", "unknown keep 'al'. Did you mean 'all'?"),
    ],
)
def test_a_wrong_flag_or_choice_suggests_the_nearest(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_flag_ends_the_process_with_2():
    assert vla("rollout", "--episodes", "many").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data {0}/squres", "no folder .* Did you mean 'squares'"),
        ("train --data {0}/squares --cameras fornt", "unknown camera 'fornt'. Did you mean 'front'?"),
        ("train --data {0}/squares --rollout-every 5 --rollout-env vla/Rech-v0", "Did you mean 'vla/Reach-v0'"),
        ("train --steps 0", "steps must be at least 1, got 0"),
        ("train --val-fraction 1", "val_fraction must be at least 0 and below 1, got 1"),
        ("rollout --policy nowhere", "no policy at 'nowhere'"),
        ("deploy --policy ./nowhere", "no policy at './nowhere'"),
        ("deploy --replay {0}/squres", "no folder"),
        ("deploy --ensemble 0.1", "set control.transition to 'ensemble' instead"),
        ("deploy --max-age-s nan", "max_age_s must be a finite number, got nan"),
        ("serve --policy nowhere", "no policy at 'nowhere'"),
        ("serve --port 70000", "port must be between 0 and 65535, got 70000"),
        ("collect --env vla/Rech-v0", "Did you mean 'vla/Reach-v0'"),
        ("collect --noise-share 50", "noise_share must be between 0 and 1, got 50"),
        ("replay --data {0}/squres", "no folder"),
        ("dagger --env vla/Rech-v0", "Did you mean 'vla/Reach-v0'"),
        ("analyze exposure --policy nowhere", "no policy at 'nowhere'"),
        # The message must not also report that the list is empty without its invalid entry.
        ("analyze tokenizers --data {0}/squares --horizons 0", r"horizons\.0 must be at least 1, got 0\W*$"),
        ("benchmark metawrld", "unknown suite 'metawrld'. Did you mean 'metaworld'"),
        ("benchmark no_such:SUITE", "cannot import the suite 'no_such:SUITE' .*No module named 'no_such'"),
    ],
)
def test_wrong_names_and_numbers_are_reported_before_the_job_is_imported(
    arguments, message, robot, dataset, capsys, monkeypatch
):
    folder = dataset("squares", robot, episodes=1).parent
    words = arguments.format(folder).split()
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    monkeypatch.setitem(VERBS, name, VERBS[name]._replace(job="torch_and_all:job"))
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_cheap_checks_import_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom vla.cli import main\n"
        "for words in (['train', '--data', 'nope'], ['rollout', '--policy', 'nope'], ['serve', '--port', '-1'],\n"
        "              ['collect', '--env', 'vla/Nope-v0'], ['train', '--config', 'nope.yaml'],\n"
        "              ['benchmark', 'nope']):\n"
        "    assert main(words) == 2\n"
        "assert not {'torch', 'transformers', 'uvicorn'} & set(sys.modules)"
    )
    done = vla(code=code)
    assert done.returncode == 0, done.stderr


def test_only_one_of_several_training_processes_reports_an_error(capsys, monkeypatch):
    for rank, messages in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", "--data", "nowhere"]) == 2
        assert capsys.readouterr().err.count("vla: ") == messages


def test_help_keeps_names_as_they_are_and_has_no_empty_defaults(capsys):
    for verb in ("serve", "train", "collect"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
    said = capsys.readouterr().out
    assert "--kwargs {KEY: VALUE, ...}" in said and "--robot {KEY: VALUE, ...}" in said and "joint_position" in said
    assert "Serve a policy to clients of OpenVLA, openpi and vla-eval." in said
    assert "(default: )" not in said and "(default: none)" in said


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_an_example_that_parses_and_describes_every_flag(name, capsys):
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: {VERBS[name].example}" in shown
    assert cli._parse(name, VERBS[name], shlex.split(VERBS[name].example)[1 + len(name.split()) :])

    def undocumented(cls, path=""):
        for field, kind in flags.hints(cls).items():
            if dataclasses.is_dataclass(kind):
                yield from undocumented(kind, f"{path}{field}.")
            elif not re.search(rf"^        (\w+, )*{field}(, \w+)*: ", cls.__doc__, re.M):
                yield path + field

    assert not list(undocumented(getattr(config, VERBS[name].config)))


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if hasattr(config, verb.config)])
def test_every_verb_has_unambiguous_flags_and_keeps_its_defaults(name):
    verb = VERBS[name]
    assert cli._parse(name, verb, []) == getattr(config, verb.config)()


def test_nested_values_have_short_flags():
    flags = "--backbone llama --vision siglip dinov2 --data a b --rank 8 --shift 0 --resume"
    parsed = cli._parse("train", VERBS["train"], flags.split())
    assert parsed.model.backbone == "llama"
    assert parsed.model.vision == ("siglip", "dinov2")
    assert parsed.data == (Path("a"), Path("b"))
    assert (parsed.lora.rank, parsed.augment.shift, parsed.resume) == (8, 0.0, True)
    parsed = cli._parse("rollout", VERBS["rollout"], ["--kwargs", "{image_size: 64}", "--robot", "{control_hz: 5.0}"])
    assert (parsed.adapter.kwargs, parsed.adapter.robot) == ({"image_size": 64}, {"control_hz": 5.0})


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text("episodes: 5\nseed: 3\nadapter:\n  kwargs: {image_size: 64}\n  robot: {control_hz: 5.0}\n")
    parsed = cli._parse("rollout", VERBS["rollout"], ["--seed", "9", f"--config={path}", "--env", "a", "b"])
    assert (parsed.episodes, parsed.seed, parsed.env, parsed.n_envs) == (5, 9, ("a", "b"), 10)
    assert parsed.adapter.kwargs == {"image_size": 64}
    assert parsed.adapter.robot == {"control_hz": 5.0}


def test_a_wrong_key_in_the_file_is_one_message(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text("epsiodes: 5\n")
    done = vla("rollout", "--config", str(path))
    assert done.returncode == 2
    assert "Did you mean 'episodes'?" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="no configuration file"):
        cli._parse("rollout", VERBS["rollout"], ["--config", "nowhere.yaml"])


def test_an_error_of_the_package_is_one_line_and_a_traceback_on_request(tmp_path):
    arguments = ("rollout", "--episodes", "0", "--out", str(tmp_path / "r"))
    done = vla(*arguments)
    assert (done.returncode, done.stderr) == (2, "vla: episodes must be at least 1, got 0.\n")
    assert "Traceback" in vla(*arguments, VLA_DEBUG="1").stderr


def test_exit_status(job, capsys):
    outcomes = {0: None, 1: False}
    for status, result in outcomes.items():
        job(lambda _, result=result: result)
        assert main(["doctor"]) == status

    def full(_):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    job(full)
    assert main(["doctor"]) == 1
    assert "the disk is full" in capsys.readouterr().err

    def fuller(_):
        raise OSError(errno.ENOSPC, "out of room", "/data/x")

    job(fuller)
    assert main(["doctor"]) == 1
    assert "--out" in capsys.readouterr().err

    def wrong(_):
        raise VLAError("the arm is offline.")

    job(wrong)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "vla: the arm is offline.\n"

    def bug(_):
        raise ZeroDivisionError

    job(bug)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_job_clean_up_and_prints_the_next_step(sent, status, tmp_path):
    code = f"""
import sys, time, types
sys.modules["slow"] = slow = types.ModuleType("slow")
def job(config):
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("saved", flush=True)
slow.job = job
from vla import cli
cli.VERBS["collect"] = cli.VERBS["collect"]._replace(job="slow:job")
sys.exit(cli.main(["collect", "--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert out == "saved\n"
    assert f"Finished results are in {tmp_path}" in err
    assert "--resume` continues it" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_del_stops_the_job(sent, status):
    """Python ignores exceptions raised in `__del__`, and a signal handler may run there."""
    code = f"""
import os, signal, sys, time, types

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.{sent})
        time.sleep(0.5)

def job(config):
    Slow()
    time.sleep(30)

module = types.ModuleType("vla.jobs.doctor")
module.doctor = job
sys.modules["vla.jobs.doctor"] = module
from vla import cli
sys.exit(cli.main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert "vla: stopped." in done.stderr


def test_a_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", ALONE, "rollout", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "flags", "value"),
    [
        ("train", [], None),
        ("train", ["--no-use-state", "--steps", "3"], False),
        ("train", ["--use-state", "--steps", "3"], True),
        ("train", ["--steps", "3", "--no_use_state"], False),
        ("train", ["--use-state", "False"], False),
        ("train", ["--use-state", "None"], None),
        ("dagger", ["--train.model.no-use-state"], False),
    ],
)
def test_optional_switches(verb, flags, value):
    """`--x`, `--no-x`, or neither, which keeps the value of the checkpoint."""
    config = cli._parse(verb, cli.VERBS[verb], flags)
    assert getattr(config, "train", config).model.use_state is value
