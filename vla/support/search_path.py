"""Module search path of the command line.

Owns: one rule: the working directory is searched after the installed packages, and data folders in it are not packages.
Python treats every folder as a namespace package. Without this rule, a library that checks whether the package
`datasets` is installed would find the folder `datasets/` of recordings, and fail.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import ModuleType

_LOADERS = (
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (SourceFileLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)


def installed_packages_first() -> None:
    """Move the working directory after the installed packages in `sys.path`, and ignore data folders in it."""
    here = Path.cwd()
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    if len(others) < len(sys.path):
        # Keep it before the paths of editable installations, so that a checkout uses its own code.
        installed = [i for i, entry in enumerate(others) if Path(entry).name in ("site-packages", "dist-packages")]
        others.insert(installed[-1] + 1 if installed else len(others), str(here))
        sys.path[:] = others
    if not any(isinstance(hook, _Hook) for hook in sys.path_hooks):
        sys.path_hooks.insert(0, _Hook(str(here)))
        sys.path_importer_cache.pop(str(here), None)


class _Hook:
    """A path hook, so that Python searches one folder through `_Modules`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, path: str) -> FileFinder:
        if path != self._folder:
            raise ImportError(path)
        return _Modules(path, *_LOADERS)


class _Modules(FileFinder):
    """Finds modules and packages in a folder.

    A subfolder without `__init__.py` is a package only if it contains Python files and does not have the name of a
    required or optional dependency of an installed package.
    """

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, target)
        if spec is None or spec.loader is not None:
            return spec
        folder = Path(self.path, fullname.rpartition(".")[2])
        has_python = any(folder.glob("*.py")) or any(folder.glob("*/*.py"))
        return spec if has_python and fullname not in _optional_packages() else None


@functools.cache
def _optional_packages() -> set[str]:
    """Names of all required and optional dependencies of the installed packages."""
    needs = [need for package in importlib.metadata.distributions() for need in package.requires or ()]
    names = [match[0] for need in needs if (match := re.match(r"[\w.-]+", need))]
    return {name.lower().replace("-", "_") for name in names}
