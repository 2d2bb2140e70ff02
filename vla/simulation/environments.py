"""Lookup of Gymnasium environments by id.

Owns: importing the module of an environment, and the error for an unknown id.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib

import gymnasium as gym

from vla.config import AdapterConfig
from vla.errors import SimulatorError, unknown
from vla.support import plugins

OWN = "envs"  # the package with this project's environments


def resolve(env_id: str, adapter: AdapterConfig) -> str:
    """Import the module that registers `env_id` and return the registered id. SimulatorError if the id is unknown."""
    module, _, name = env_id.rpartition(":")
    module = module or adapter.module or (OWN if name.startswith("vla") else "")
    if module:
        try:
            plugins.import_module(module)
        except Exception as error:
            raise SimulatorError(
                f"environment {env_id!r}: cannot import {module!r} ({error}). Install the package that provides it, or "
                "run this command in the folder that contains the module."
            ) from error
    if name in gym.registry:
        return name
    fix = "For an environment of another package, set `adapter.module`, or use the id module:Id."
    family = name.rpartition("/")[0]
    kin = [known for known in gym.registry if family and known.rpartition("/")[0] == family]
    if kin:
        raise SimulatorError(unknown("environment", name, kin, fix))
    with contextlib.suppress(Exception):  # suggest the right id if "vla/" was forgotten
        importlib.import_module(OWN)
    near = difflib.get_close_matches(name, gym.registry, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise SimulatorError(f"unknown environment {name!r}.{hint} {fix}")
