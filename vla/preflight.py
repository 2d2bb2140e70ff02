"""Fast checks before heavy imports: whether everything named in a configuration exists.

Owns: the checks of datasets, cameras, policies, suites and this package's environments. They are selected by field
name, because a field name has the same meaning in every verb. A job called from Python raises the same errors when it
opens the dataset, policy or environment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vla import config as configuration
from vla.errors import ConfigError, unknown
from vla.support.locations import check_policy


def preflight(config: Any) -> None:
    """Raise the errors of a valid configuration that can be found without loading a network or an environment."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if "policy" in values:
        check_policy(values["policy"])
    if "suite" in values:
        from vla.evaluation import suites

        suites.find(values["suite"])
    datasets = [folder for name in ("data", "replay") for folder in _several(values.get(name))]
    if datasets:
        _check_datasets(datasets, getattr(values.get("model"), "cameras", ()))
    adapter = values.get("adapter", configuration.AdapterConfig())
    for env_id in (*_several(values.get("env")), *_several(values.get("rollout_env"))):
        _check_environment(env_id, adapter)


def _check_datasets(folders: Iterable[Path], cameras: Iterable[str]) -> None:
    from vla.data.format import Info

    for folder in folders:
        valid = Info.load(Path(folder)).cameras
        for camera in cameras:
            if camera not in valid:
                raise ConfigError(unknown("camera", camera, valid, "`cameras` must be cameras of the dataset."))


def _check_environment(env_id: str, adapter: configuration.AdapterConfig) -> None:
    """Check this package's environments only, because importing another package may take long."""
    if env_id.removeprefix("envs:").startswith("vla") and adapter.module is None:
        from vla.simulation.environments import resolve

        resolve(env_id, adapter)


def _several(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)
