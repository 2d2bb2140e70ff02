"""The output folder of a job.

Owns: the check whether a job may write to a folder, the settings file in it, and atomic writes. It does not know the
jobs.
"""

from __future__ import annotations

import contextlib
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
        path: the folder; it may not exist yet.
        config: the configuration of the job; None if the folder has no settings file.
        settings: name of the settings file in `path`, which contains `config` as YAML.
        free: keys that may change if a run is continued, in addition to `out` and `resume`.
        remedy: end of the error message for changed settings, after "Pass the same settings, or".
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
        """Check whether this job may write to the folder, without writing.

        Args:
            resume: continue a run in the folder.
            has_results: whether the run has results; otherwise, its settings may change.
        Raises:
            ConfigError: the folder contains unrelated files, a run with other settings or, without `resume`, any run.
        """
        found = self.entries()
        if found and self.read_settings() is None:
            raise self.unrelated_files(min(found))
        if found and not resume:
            raise ConfigError(
                f"{self.path} already contains a run. Continue it with --resume, or choose another --out."
            )
        if has_results:
            self.check_settings()

    def check_settings(self) -> None:
        """Raise ConfigError if the run in this folder was started with other settings."""
        if (before := self.read_settings()) is None:
            return
        then, now = map(configuration.to_dict, (before, self.config))
        if changed := list(_differences(then, now, ignored=("out", "resume", *self.free))):
            raise ConfigError(
                f"{self.path} was started with other settings: {'; '.join(changed)}. Pass the same "
                f"settings (`--config {self.settings_file}`), or {self.remedy}."
            )

    def begin(self) -> None:
        """Create the folder and write the settings, with `resume` off."""
        self.settings_file.parent.mkdir(parents=True, exist_ok=True)
        reset = {"resume": False} if hasattr(self.config, "resume") else {}
        configuration.dump(dataclasses.replace(self.config, **reset), self.settings_file)

    def entries(self) -> set[str]:
        """Names of the files and folders in the folder, except for scratch files of killed processes."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a folder. Choose another --out.")
        found = self.path.iterdir() if self.path.is_dir() else ()
        return {path.name for path in found if path.suffix not in (".part", ".partial")}

    def read_settings(self) -> Any:
        """The configuration in the settings file; None without one. ConfigError if it belongs to another job."""
        if not self.settings_file.is_file():
            return None
        try:
            return configuration.load(type(self.config), self.settings_file)
        except (ConfigError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")  # the first of many: another job's keys are all wrong
            raise self.unrelated_files(f"{self.settings} does not fit this job: {reason}") from None

    def unrelated_files(self, what: str) -> ConfigError:
        """The error for a folder with unrelated files."""
        return ConfigError(f"{self.path} contains unrelated files ({what}). Choose another --out.")

    def is_finished(self, name: str) -> bool:
        """Whether the result file `name` exists and is not marked `"interrupted": true`. An unreadable file counts as
        finished, so that it is not overwritten."""
        try:
            return (self.path / name).is_file() and self.read_json(name).get("interrupted") is not True
        except ConfigError:
            return True

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in the file `name`. ConfigError if it cannot be read."""
        reason: object = "not a JSON object"
        try:
            if isinstance(values := json.loads((self.path / name).read_text()), dict):
                return values
        except (OSError, ValueError) as error:
            reason = error
        raise self.unrelated_files(f"{name} cannot be read: {reason}")

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write the file `name` atomically. Creates the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        return write_json(self.path / name, values)


def write_json(path: Path, values: Any) -> Path:
    """Write strict JSON atomically. NaN and infinities become null."""
    return write_text(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one JSON object per line; empty if there is no file. Lines that a killed process left
    empty or incomplete are skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically."""
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
    """A text for each key with different values. Nested keys are dotted: "adapter.max_steps"."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if key in ignored:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{within}{key}.")
        elif old != new:
            yield f"{within}{key} = {old}, not {new}"
