"""`vla <verb>`: the command line.

Owns: the table of verbs, building a configuration from flags and `--config`, and turning errors into a message and an
exit status. Each verb is implemented by a function in `vla.jobs`, which is imported only when the verb runs, so that
`vla --help` and `vla doctor` start immediately.

Exit status: 0 success; 1 a check found problems, or the machine failed; 2 invalid request (a wrong flag, file, name or
value); 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import functools
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, Literal, NamedTuple, cast, get_type_hints

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
        operand: the field that the word after the verb sets, if it is not a flag.
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
        "serve a policy to OpenVLA's and openpi's robot clients",
        "vla serve --policy runs/drawer --host 0.0.0.0",
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
        "evaluate a policy on a benchmark suite: metaworld, or your own",
        "vla benchmark metaworld --policy runs/mt50 --config configs/benchmark/metaworld.yaml",
        operand="suite",
    ),
    "analyze exposure": Verb(
        "ExposureConfig",
        "vla.jobs.analyze:exposure",
        "measure a policy's exposure bias on a dataset",
        "vla analyze exposure --policy runs/drawer --data datasets/drawer",
    ),
}


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM. As a KeyboardInterrupt, it makes a job save its work as on Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    if argv is None:  # run as a program, not called from Python
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
    sys.unraisablehook = _again
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
    except BrokenPipeError:  # the reader of the output has exited (`vla ... | head`): not an error
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
        if _reports():
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
        "`vla <verb> --help` lists the flags of a verb. Flags override the YAML file, which overrides the defaults.\n"
        "--plugin imports a module that registers tokenizers, protocols, ... of your own; several can be given.\n"
        "VLA_DEBUG=1 shows the traceback of an error."
    )


def _import_plugins(arguments: list[str]) -> list[str]:
    """Import the modules that `--plugin` in front of the verb names; returns the arguments that follow."""
    while arguments and arguments[0].partition("=")[0] == "--plugin":
        flag, _, module = arguments.pop(0).partition("=")
        module = module or (arguments.pop(0) if arguments else "")
        try:
            plugins.import_module(module)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VLAError(
                f"cannot import the plugin {module!r} ({reason}). {flag} takes the name of an installed module or of "
                "one in the working directory."
            ) from error
    if not arguments:
        raise VLAError("a verb must follow the plugins. `vla --help` lists the verbs.")
    return arguments


def _verb(name: str) -> Verb:
    if name not in VERBS:
        raise VLAError(unknown("verb", name, VERBS, "See `vla --help`."))
    return VERBS[name]


def _reports() -> bool:
    """Whether this process prints errors: in distributed training, only the first process of a machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _parse(name: str, verb: Verb, arguments: Sequence[str]) -> Any:
    """Parse the configuration of a verb; precedence: default < YAML < flag.

    Nested fields are flags without a prefix (`--backbone`). One that shares its name with a field of the verb itself
    keeps its prefix (`--adapter.robot` of `vla deploy`). If two nested fields share a name, as where a whole job is
    nested, every field has its full name (`--train.model.backbone`).
    """
    import tyro

    from vla import config

    cls = getattr(config, verb.config)
    first = argparse.ArgumentParser(prog=f"vla {name}", add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="PATH")
    if verb.operand and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{verb.operand}", *arguments]
    known, flags = first.parse_known_args(arguments)
    summary = f"{verb.summary[0].upper()}{verb.summary[1:]}."
    values, rest = tyro.cli(
        cls,
        prog=f"vla {name}",
        description=f"{summary}\n\nexample: {verb.example}\n\n--config PATH: YAML file with values for these flags; "
        "flags override it.",
        args=_with_values(cls, flags),
        default=config.load(cls, known.config) if known.config else cls(),
        config=(tyro.conf.OmitArgPrefixes,) if _short(cls) else (),
        registry=_type_rules(cls),
        return_unknown_args=True,
    )
    if rest:
        raise VLAError(_unknown_argument(name, cls, rest[0]))
    config.check(values)
    return values


def _unknown_argument(name: str, cls: Any, argument: str) -> str:
    """Message for an argument that does not belong to the verb."""
    from vla import config

    help_ = f"`vla {name} --help` lists the flags."
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}: a value must follow a flag. {help_}"
    flag = argument.partition("=")[0].replace("_", "-")
    if (new := _renamed(cls).get(flag.removeprefix("--"))) is not None:
        return f"{flag} is now called --{new.replace('_', '-')}."
    ours = _flags(cls)
    short = [known for known in ours if flag.lstrip("-") == "".join(word[0] for word in known[2:].split("-"))]
    near = short or difflib.get_close_matches(flag, ours, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    others = [verb for verb, other in VERBS.items() if flag in _flags(getattr(config, other.config))]
    elsewhere = f" It is a flag of {', '.join(others)}." if others and not near else ""
    return f"`vla {name}` has no flag {flag!r}.{hint}{elsewhere} {help_}"


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a configuration's fields. Python evaluates them anew at every call, which takes milliseconds."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _renamed(cls: Any) -> dict[str, str]:
    """Old names of flags -> new names."""
    nested = [kind for kind in _hints(cls).values() if dataclasses.is_dataclass(kind)]
    return getattr(cls, "RENAMED", {}) | {old: new for kind in nested for old, new in _renamed(kind).items()}


def _flags(cls: Any) -> list[str]:
    """The flags of a configuration, as `vla <verb> --help` spells them."""
    full = _prefixed(cls) if _short(cls) else _fields(cls)
    names = [path if path in full else path.rpartition(".")[2] for path in _fields(cls)]
    return [f"--{name.replace('_', '-')}" for name in names]


def _short(cls: Any) -> bool:
    """Whether no two nested fields of a configuration share a name, so that their flags need no prefix."""
    prefixed = _prefixed(cls)
    names = [path.rpartition(".")[2] for path in _fields(cls) if path not in prefixed]
    return len(names) == len(set(names))


def _prefixed(cls: Any) -> list[str]:
    """The fields one level down that share their name with a field of the configuration itself."""
    return [path for path in _fields(cls) if path.count(".") == 1 and path.partition(".")[2] in _hints(cls)]


def _fields(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration, including nested ones."""
    found = []
    for name, kind in _hints(cls).items():
        found += _fields(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return found


def _type_rules(cls: Any) -> Any:
    """What to change in tyro: its help shows an empty list or mapping as nothing instead of "none", it refuses an
    unknown choice without naming the nearest one, as `config.check` does, it has no flag for a mapping of anything, and
    it cannot keep the prefix of a single field.
    """
    from tyro.conf import arg
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructTypeInfo,
    )

    registry, asked = ConstructorRegistry(), set[Any]()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin not in (tuple, dict, Literal) or info.type in asked:
            return None
        asked.add(info.type)  # so that the next lookup uses tyro's own rule
        usual = registry.get_primitive_spec(info)
        asked.remove(info.type)
        if info.type == dict[str, Any]:
            return PrimitiveConstructorSpec(
                1, "{KEY: VALUE, ...}", _mapping, lambda value: isinstance(value, dict), _flow
            )
        if not isinstance(usual, PrimitiveConstructorSpec):
            return None
        if info.type_origin is Literal:
            return dataclasses.replace(usual, choices=None, instance_from_str=lambda words: words[0])
        return dataclasses.replace(usual, str_from_instance=lambda value: usual.str_from_instance(value) or ["none"])

    full = _prefixed(cls) if _short(cls) else []
    owners = {kind: name for name, kind in _hints(cls).items() if dataclasses.is_dataclass(kind)}

    @registry.struct_rule
    def keep_prefix(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not full or info.type not in owners or info.type in asked:
            return None
        asked.add(info.type)
        usual = registry.get_struct_spec(info)
        asked.remove(info.type)
        assert isinstance(usual, StructConstructorSpec)
        paths = {field.name: f"{owners[info.type]}.{field.name}" for field in usual.fields}
        fields = [
            dataclasses.replace(field, type=cast(Any, Annotated[field.type, arg(name=paths[field.name])]))
            if paths[field.name] in full
            else field
            for field in usual.fields
        ]
        return dataclasses.replace(usual, fields=tuple(fields))

    return registry


def _mapping(words: list[str]) -> dict[str, Any]:
    import yaml

    value = yaml.safe_load(words[0])
    if not isinstance(value, dict):
        raise ValueError(f"expected {{key: value}}, got {words[0]!r}")
    return value


def _flow(mapping: dict[str, Any]) -> list[str]:
    import yaml

    return [yaml.safe_dump(mapping, default_flow_style=True, width=10_000).strip() if mapping else "none"]


def _with_values(cls: Any, flags: Sequence[str]) -> list[str]:
    """Add the value to `--x` and `--no-x` for fields `x: bool | None`: tyro supports such switches only for plain
    booleans.
    """
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
    for name, kind in _hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _optional_switches(kind)
        elif kind == bool | None:
            found.add(name.replace("_", "-"))
    return found


def _explain(error: Exception) -> tuple[str | None, int]:
    """The message to print, or None for an unexpected error that needs its traceback; and the exit status."""
    if isinstance(error, VLAError):
        return str(error), 2
    # safetensors, PyAV and pyarrow wrap this error in types of their own; only the text is the same.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return f"the disk is full: {error}. Free some space, or choose another folder with --out.", 1
    if isinstance(error, PermissionError):
        return f"{error}. Choose a writable folder with --out.", 1
    return None, 1


def _after_a_stop(name: str, config: Any) -> str:
    if getattr(config, "out", None) is None or not config.out.exists():
        return ""
    hint = f"Finished results are in {config.out}."
    return hint + (f" `vla {name} ... --resume` continues it." if hasattr(config, "resume") else "")


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _again(lost: sys.UnraisableHookArgs) -> None:
    """Send a stop signal again that arrived during a `__del__`, where Python only prints the exception."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signum = signal.SIGTERM if issubclass(lost.exc_type, Terminated) else signal.SIGINT
    # Raised here, it would be lost as well; send it later, from another thread.
    later = threading.Timer(0.05, os.kill, (os.getpid(), signum))
    later.daemon = True  # do not delay the exit of a job that ends first
    later.start()


if __name__ == "__main__":
    sys.exit(main())
