"""`vla <verb>`: the command line.

Owns: the table of verbs, how flags and `--config` become a configuration, and how errors become one message and an exit
status. It does nothing else: each verb is one function elsewhere, imported only when its verb runs, so that
`vla --help` and `vla doctor` answer at once.

Exit status: 0 done; 1 done, and what was checked is not in order, or the machine failed; 2 the request cannot be
carried out (a wrong flag, file, name or value); 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple, get_type_hints

from vla import __version__
from vla.errors import VLAError, unknown


class Verb(NamedTuple):
    """A job: its configuration class in `vla.config`, the function that does it, and one line for `vla --help`."""

    config: str
    job: str
    summary: str


VERBS = {
    "quickstart": Verb("QuickstartConfig", "vla.quickstart:quickstart", "from nothing to a rollout report"),
    "doctor": Verb("DoctorConfig", "vla.doctor:doctor", "say what is wrong with this machine and how to mend it"),
    "collect": Verb("CollectConfig", "vla.collect:collect", "run an expert and write its successes as a dataset"),
    "inspect": Verb("InspectConfig", "vla.inspect:inspect", "show what is in a dataset, and what is wrong with it"),
    "replay": Verb("ReplayConfig", "vla.replay:replay", "send recorded actions back to their environment"),
    "train": Verb("TrainConfig", "vla.train:train", "fine-tune a policy on demonstrations"),
    "pretrain": Verb("TrainConfig", "vla.train:pretrain", "train all weights of a policy"),
    "rollout": Verb("RolloutConfig", "vla.rollout:rollout", "evaluate a policy closed loop and write a report"),
    "deploy": Verb("DeployConfig", "vla.deploy:deploy", "run a policy on a simulated robot in real time"),
    "serve": Verb("ServeConfig", "vla.serve.server:serve", "serve a policy to OpenVLA's and openpi's robot clients"),
    "dagger": Verb("DaggerConfig", "vla.dagger:dagger", "let a policy drive, have an expert correct it, train, repeat"),
    "benchmark metaworld": Verb(
        "BenchmarkConfig", "vla.benchmark:benchmark", "measure a policy on Meta-World as papers report it"
    ),
    "analyze exposure": Verb(
        "ExposureConfig", "vla.exposure:exposure", "measure a policy's exposure bias on a dataset"
    ),
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be: a job that saves its work on the one saves it on the other."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"vla {__version__}")
        return 0
    config = None
    before, unraisable = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = _again
    try:
        if " ".join(arguments[:2]) in VERBS:
            arguments[:2] = [" ".join(arguments[:2])]
        verb = _verb(arguments[0])
        config = _parse(arguments[0], verb, arguments[1:])
        module, _, name = verb.job.partition(":")
        result = getattr(importlib.import_module(module), name)(config)
        return 1 if result is False else 0
    except BrokenPipeError:  # the reader of our output left (`vla ... | head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"\nvla: stopped. {_after_a_stop(arguments[0], config)}".rstrip(), file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except Exception as error:
        message, status = _explain(error)
        if os.environ.get("VLA_DEBUG"):
            traceback.print_exc()
        elif message is None:
            raise
        print(f"vla: {message}", file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = unraisable


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: vla <verb> [--config values.yaml] [--flag value ...]\n\n"
        f"Action-token robot policies.\n\n{verbs}\n\n"
        "`vla <verb> --help` lists a verb's flags. Values come from the defaults, then the YAML file, then the flags.\n"
        "VLA_DEBUG=1 shows the traceback behind an error."
    )


def _verb(name: str) -> Verb:
    if name not in VERBS:
        raise VLAError(unknown("verb", name, VERBS, "See `vla --help`."))
    return VERBS[name]


def _parse(name: str, verb: Verb, arguments: Sequence[str]) -> Any:
    """The verb's configuration: default < YAML < flag.

    Nested fields are flags without a prefix (`--backbone`), unless two of a verb's fields would share a name, as where
    a whole job is nested: then each has its full name (`--train.model.backbone`).
    """
    import tyro

    from vla import config

    cls = getattr(config, verb.config)
    names = _field_names(cls)
    first = argparse.ArgumentParser(prog=f"vla {name}", add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="PATH")
    known, flags = first.parse_known_args(arguments)
    return tyro.cli(
        cls,
        prog=f"vla {name}",
        description=f"{verb.summary.capitalize()}.\n\n--config PATH: values from YAML; flags override them.",
        args=_with_values(cls, flags),
        default=config.load(cls, known.config) if known.config else cls(),
        config=(tyro.conf.OmitArgPrefixes,) if len(names) == len(set(names)) else (),
    )


def _with_values(cls: Any, flags: Sequence[str]) -> list[str]:
    """The flags, where `--x` and `--no-x` of a field `x: bool | None` have the value that tyro expects of such a field:
    it makes switches of plain booleans only."""
    written: list[str] = []
    for index, flag in enumerate(flags):
        prefix, _, name = flag.removeprefix("--").replace("_", "-").rpartition(".")
        value = not name.startswith("no-")
        follows = flags[index + 1] if index + 1 < len(flags) else ""
        bare = flag.startswith("--") and follows not in ("True", "False", "None")
        if bare and (name := name.removeprefix("no-")) in _optional_switches(cls):
            written += [f"--{prefix}{'.' * bool(prefix)}{name}", str(value)]
        else:
            written.append(flag)
    return written


def _optional_switches(cls: Any) -> set[str]:
    found = set()
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _optional_switches(kind)
        elif kind == bool | None:
            found.add(name.replace("_", "-"))
    return found


def _field_names(cls: Any) -> list[str]:
    """Names of the fields of a configuration and of those nested in it."""
    types = get_type_hints(cls)
    nested = [name for kind in types.values() if dataclasses.is_dataclass(kind) for name in _field_names(kind)]
    return [name for name, kind in types.items() if not dataclasses.is_dataclass(kind)] + nested


def _explain(error: Exception) -> tuple[str | None, int]:
    """What to print and the exit status; None when only a traceback can explain the error."""
    if isinstance(error, VLAError):
        return str(error), 2
    # Writers wrap the system's error in their own types (safetensors, PyAV, pyarrow): the text is what they share.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return f"the disk is full: {error}. Free some space, or choose another place with --out.", 1
    if isinstance(error, PermissionError):
        return f"{error}. Choose a place that you may write to with --out.", 1
    return None, 1


def _after_a_stop(name: str, config: Any) -> str:
    if getattr(config, "out", None) is None or not config.out.exists():
        return ""
    hint = f"What was finished is in {config.out}."
    return hint + (f" `vla {name} ... --resume` continues it." if hasattr(config, "resume") else "")


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _again(lost: sys.UnraisableHookArgs) -> None:
    """A stop that comes in the middle of a `__del__` is lost: Python prints it and goes on. It is sent again."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signum = signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT
    # Here it would be lost, too: later, from elsewhere.
    later = threading.Timer(0.05, os.kill, (os.getpid(), signum))
    later.daemon = True  # a job that ends before needs no stop
    later.start()


if __name__ == "__main__":
    sys.exit(main())
