"""The output folder of a job.

Owns: which folder a job may write into, the settings file in it, and atomic writes. It does not know the jobs, nor what
else they keep in their folders.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vla import config as configuration
from vla.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An output folder, and the configuration of the job that writes into it.

    Attributes:
        path: the folder. It need not exist.
        config: the job's configuration; None for a job that keeps no settings.
        settings: the file in `path` that holds `config` as YAML.
        free: keys that may change when a run is continued, beside `out` and `resume`.
        remedy: for messages, what to do instead of passing the same settings.
    """

    path: Path
    config: Any = None
    settings: str = "config.yaml"
    free: Collection[str] = ()
    remedy: str = "choose another --out"

    @property
    def settings_file(self) -> Path:
        return self.path / self.settings

    def claim(self, resume: bool) -> None:
        """`check`, then `begin`."""
        self.check(resume)
        self.begin()

    def check(self, resume: bool, has_results: bool = True) -> None:
        """Refuse a folder that this job may not write into. Writes nothing.

        Args:
            resume: continue a run that is already there.
            has_results: whether the run has results. Settings without results may be replaced.
        Raises:
            ConfigError: the folder holds something else, a run and not `resume`, or a run with other settings.
        """
        found = self.entries()
        if found and self.read_settings() is None:
            raise self.holds_something_else(min(found))
        if found and not resume:
            raise ConfigError(f"{self.path} already holds a run. --resume continues it; --out names another folder.")
        if has_results:
            self.check_settings()

    def check_settings(self) -> None:
        """ConfigError, naming every key that differs, when the run in this folder was started with other settings."""
        if (before := self.read_settings()) is None:
            return
        then, now = map(configuration.to_dict, (before, self.config))
        if changed := list(_differences(then, now, ignored=("out", "resume", *self.free))):
            raise ConfigError(
                f"{self.path} was started with other settings: {'; '.join(changed)}. Pass the same "
                f"(`--config {self.settings_file}`), or {self.remedy}."
            )

    def begin(self) -> None:
        """Create the folder and write the settings. `resume` is not one: a later run need not repeat it."""
        self.settings_file.parent.mkdir(parents=True, exist_ok=True)
        reset = {"resume": False} if hasattr(self.config, "resume") else {}
        configuration.dump(dataclasses.replace(self.config, **reset), self.settings_file)

    def entries(self) -> set[str]:
        """Names in the folder, except for scratch files that killed processes left."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a folder. Choose another --out.")
        found = self.path.iterdir() if self.path.is_dir() else ()
        return {path.name for path in found if path.suffix not in (".part", ".partial")}

    def read_settings(self) -> Any:
        """The configuration in the settings file, None without one; ConfigError when it is not of this job."""
        if not self.settings_file.is_file():
            return None
        try:
            return configuration.load(type(self.config), self.settings_file)
        except (ConfigError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")  # in another job's file, every key is wrong
            raise self.holds_something_else(f"{self.settings} does not fit this job: {reason}") from None

    def holds_something_else(self, what: str) -> ConfigError:
        """The error for a folder that is not this job's."""
        return ConfigError(f"{self.path} holds something else ({what}). Choose another --out.")

    def is_finished(self, name: str) -> bool:
        """Whether the result file `name` exists and is not marked `"interrupted": true`. An unreadable file counts as
        finished, so that no job replaces it unasked."""
        try:
            return (self.path / name).is_file() and self.read_json(name).get("interrupted") is not True
        except ConfigError:
            return True

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`; ConfigError when there is none."""
        reason: object = "not a JSON object"
        try:
            if isinstance(values := json.loads((self.path / name).read_text()), dict):
                return values
        except (OSError, ValueError) as error:
            reason = error
        raise self.holds_something_else(f"{name} cannot be read: {reason}")

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write the file `name` atomically. Creates the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        return write_json(self.path / name, values)


def write_json(path: Path, values: Any) -> Path:
    """Write strict JSON atomically. NaN and infinities become null."""
    return write_text(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically: when writing fails or the process is killed, the earlier file stays."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        return scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(before: Any, now: Any, within: str = "", ignored: Collection[str] = ()) -> Iterator[str]:
    """Every key whose value differs, with both values; nested keys as "adapter.max_steps"."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if key in ignored:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{within}{key}.")
        elif old != new:
            yield f"{within}{key} = {old}, not {new}"
