"""`vla <verb>`: the command line.

Owns: the table of verbs, building a configuration from flags and `--config`, and the message and exit status of an
error. The functions of verbs are in `vla.jobs`. They are imported only when their verb runs, so that `vla --help` and
`vla doctor` start immediately.

Exit status: 0 success; 1 a check found problems, or a system error occurred (such as a full disk); 2 invalid request
(a wrong flag, file, name or value); 130 stopped by Ctrl-C; 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

from vla import __version__
from vla.errors import VLAError, unknown
from vla.support import plugins, search_path


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        config: its configuration class in `vla.config`.
        job: the function that runs it.
        summary: its line in `vla --help`.
        example: a typical call, in `vla <verb> --help`.
        operand: the field that a word after the verb sets.
    """

    config: str
    job: str
    summary: str
    example: str
    operand: str | None = None


VERBS = {
    "quickstart": Verb(
        "QuickstartConfig",
        "vla.jobs.quickstart:quickstart",
        "collect, fine-tune, evaluate in minutes",
        "vla quickstart --minutes 5",
    ),
    "doctor": Verb(
        "DoctorConfig", "vla.jobs.doctor:doctor", "find problems with this machine and how to fix them", "vla doctor"
    ),
    "collect": Verb(
        "CollectConfig",
        "vla.jobs.collect:collect",
        "run an expert and record its successes as a dataset",
        "vla collect --env vla/OpenDrawer-v0 --episodes 100 --noise 0.5 --out datasets/drawer",
    ),
    "inspect": Verb(
        "InspectConfig",
        "vla.jobs.inspect:inspect",
        "show the contents of a dataset and its problems",
        "vla inspect --data datasets/drawer",
    ),
    "replay": Verb(
        "ReplayConfig",
        "vla.jobs.replay:replay",
        "replay recorded actions in their environment",
        "vla replay --data datasets/drawer",
    ),
    "train": Verb(
        "TrainConfig",
        "vla.jobs.train:train",
        "fine-tune a policy on demonstrations",
        "vla train --data datasets/drawer --out runs/drawer --steps 1000",
    ),
    "pretrain": Verb(
        "TrainConfig",
        "vla.jobs.train:pretrain",
        "train all weights of a policy",
        "vla pretrain --data datasets/a datasets/b --out runs/base --steps 50000",
    ),
    "rollout": Verb(
        "RolloutConfig",
        "vla.jobs.rollout:rollout",
        "evaluate a policy in closed loop and write a report",
        "vla rollout --policy runs/drawer --env vla/OpenDrawer-v0 --episodes 50 --out runs/drawer-eval",
    ),
    "deploy": Verb(
        "DeployConfig",
        "vla.jobs.deploy:deploy",
        "run a policy in real time, on a simulated robot or your own",
        'vla deploy --policy runs/drawer --robot my_robot:Arm --instruction "open the drawer"',
    ),
    "serve": Verb(
        "ServeConfig",
        "vla.jobs.serve:serve",
        "serve a policy to clients of OpenVLA, openpi and vla-eval",
        "vla serve --policy runs/drawer --host 0.0.0.0",
    ),
    "export": Verb(
        "ExportConfig",
        "vla.jobs.export:export",
        "write a policy in another format, such as OpenVLA's",
        "vla export --policy openvla/openvla-7b --format vla --out runs/openvla",
    ),
    "dagger": Verb(
        "DaggerConfig",
        "vla.jobs.dagger:dagger",
        "train on a policy's own rollouts, labelled by an expert",
        "vla dagger --config configs/dagger/tabletop.yaml",
    ),
    "benchmark": Verb(
        "BenchmarkConfig",
        "vla.jobs.benchmark:benchmark",
        "evaluate a policy on a benchmark suite: metaworld, libero, or your own",
        "vla benchmark metaworld --policy runs/mt50 --config configs/benchmark/metaworld.yaml",
        operand="suite",
    ),
    "analyze exposure": Verb(
        "ExposureConfig",
        "vla.jobs.analyze:exposure",
        "measure a policy's exposure bias on a dataset",
        "vla analyze exposure --policy runs/drawer --data datasets/drawer",
    ),
    "analyze tokenizers": Verb(
        "TokenizersConfig",
        "vla.jobs.analyze_tokenizers:tokenizers",
        "compare action tokenizers on a dataset",
        "vla analyze tokenizers --data datasets/drawer",
    ),
    "analyze latent": Verb(
        "LatentConfig",
        "vla.jobs.analyze_latent:latent",
        "roll out a policy under each code of its latent",
        "vla analyze latent --policy runs/drawer --env envs:vla/OpenDrawer-v0",
    ),
}


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM. As a KeyboardInterrupt, it makes a job save its work, as after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    if argv is None:  # started as a program, not called from Python
        search_path.installed_packages_first()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"vla {__version__}")
        return 0
    config: Any = None
    before, unraisable = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = _resend_signal
    try:
        arguments = _import_plugins(arguments)
        if " ".join(arguments[:2]) in VERBS:
            arguments[:2] = [" ".join(arguments[:2])]
        verb = _verb(arguments[0])
        config = _parse(arguments[0], verb, arguments[1:])
        importlib.import_module("vla.preflight").preflight(config)
        module, _, name = verb.job.partition(":")
        result = getattr(importlib.import_module(module), name)(config)
        return 1 if result is False else 0
    except BrokenPipeError:  # not an error: the reader of the output has exited (`vla ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        print(f"\nvla: stopped. {_hint_after_stop(arguments[0], config)}".rstrip(), file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except Exception as error:
        message, status = _explain(error)
        if os.environ.get("VLA_DEBUG"):
            traceback.print_exc()
        elif message is None:
            raise
        if _prints_errors():
            print(f"vla: {message}", file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = unraisable


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: vla [--plugin module ...] <verb> [--config values.yaml] [--flag value ...]\n\n"
        f"Action-token robot policies.\n\n{verbs}\n\n"
        "`vla <verb> --help` lists the flags of a verb. Flags override values in the YAML file.\n"
        "--plugin imports a module with your own tokenizers, protocols, ...; it can be repeated.\n"
        "VLA_DEBUG=1 shows the traceback of an error."
    )


def _import_plugins(arguments: list[str]) -> list[str]:
    """Import the modules passed with `--plugin` before the verb. Returns the remaining arguments."""
    while arguments and arguments[0].partition("=")[0] == "--plugin":
        flag, _, module = arguments.pop(0).partition("=")
        module = module or (arguments.pop(0) if arguments else "")
        try:
            plugins.import_module(module)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VLAError(
                f"cannot import the plugin {module!r} ({reason}). Pass {flag} the name of an installed module, or of a "
                "module in the working directory."
            ) from error
    if not arguments:
        raise VLAError("there is no verb after --plugin. `vla --help` lists the verbs.")
    return arguments


def _verb(name: str) -> Verb:
    if name not in VERBS:
        raise VLAError(unknown("verb", name, VERBS, "See `vla --help`."))
    return VERBS[name]


def _prints_errors() -> bool:
    """Whether this process prints errors. In distributed training, only the first process of each machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _parse(name: str, verb: Verb, arguments: Sequence[str]) -> Any:
    """The configuration of a verb; precedence: default < YAML < flag."""
    from vla import config
    from vla.config import flags

    cls = getattr(config, verb.config)
    first = argparse.ArgumentParser(prog=f"vla {name}", add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="PATH")
    if verb.operand and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{verb.operand}", *arguments]
    known, others = first.parse_known_args(arguments)
    description = (
        f"{verb.summary[0].upper()}{verb.summary[1:]}.\n\nexample: {verb.example}\n\n"
        "--config PATH: YAML file with values for these flags; flags override it."
    )
    default = config.load(cls, known.config) if known.config else cls()
    values, rest = flags.parse(default, others, f"vla {name}", description)
    if rest:
        raise VLAError(_unknown_argument(name, cls, rest[0]))
    config.check(values)
    return values


def _unknown_argument(name: str, cls: Any, argument: str) -> str:
    """Message for an unknown argument."""
    from vla import config
    from vla.config import flags

    help_ = f"`vla {name} --help` lists the flags."
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}: it does not follow a flag. {help_}"
    flag = argument.partition("=")[0].replace("_", "-")
    if (new := flags.renamed(cls).get(flag.removeprefix("--"))) is not None:
        return f"{flag} is now called --{new.replace('_', '-')}."
    ours = flags.names(cls)
    short = [known for known in ours if flag.lstrip("-") == "".join(word[0] for word in known[2:].split("-"))]
    near = short or difflib.get_close_matches(flag, ours, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    others = [verb for verb, other in VERBS.items() if flag in flags.names(getattr(config, other.config))]
    elsewhere = f" It is a flag of {', '.join(others)}." if others and not near else ""
    return f"`vla {name}` has no flag {flag!r}.{hint}{elsewhere} {help_}"


def _explain(error: Exception) -> tuple[str | None, int]:
    """The message to print (None for an unexpected error, which needs its traceback), and the exit status."""
    if isinstance(error, VLAError):
        return str(error), 2
    # safetensors, PyAV and pyarrow have their own error types, but keep the text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return f"the disk is full: {error}. Free some space, or choose another folder with --out.", 1
    if isinstance(error, PermissionError):
        return f"{error}. Choose a writable folder with --out.", 1
    return None, 1


def _hint_after_stop(name: str, config: Any) -> str:
    if getattr(config, "out", None) is None or not config.out.exists():
        return ""
    hint = f"Finished results are in {config.out}."
    return hint + (f" `vla {name} ... --resume` continues it." if hasattr(config, "resume") else "")


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _resend_signal(lost: sys.UnraisableHookArgs) -> None:
    """Resend a stop signal that arrived during a `__del__`, in which Python only prints exceptions."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signum = signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT
    # An exception raised here would also be lost, so send the signal later, from another thread.
    later = threading.Timer(0.05, os.kill, (os.getpid(), signum))
    later.daemon = True  # do not delay the exit
    later.start()


if __name__ == "__main__":
    sys.exit(main())
