"""Where Python looks for modules while a verb runs.

Owns: one rule. The working directory is searched after the installed packages, and a folder of data in it is never
taken for a package. To Python every folder is one (a namespace package), so a library that looks whether the optional
package `datasets` is installed would find the folder that `vla collect` writes to, and fail when it uses it.
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
    """Search the working directory after the installed packages, wherever it stood in `sys.path`, and only for what is
    meant as a module."""
    here = Path.cwd()
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    if len(others) < len(sys.path):
        # Before what an editable installation adds: a checkout that one works in is not replaced by another one.
        installed = [i for i, entry in enumerate(others) if Path(entry).name in ("site-packages", "dist-packages")]
        others.insert(installed[-1] + 1 if installed else len(others), str(here))
        sys.path[:] = others
    if not any(isinstance(hook, _Hook) for hook in sys.path_hooks):
        sys.path_hooks.insert(0, _Hook(str(here)))
        sys.path_importer_cache.pop(str(here), None)


class _Hook:
    """Makes Python look into one folder through `_Modules`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, path: str) -> FileFinder:
        if path != self._folder:
            raise ImportError(path)
        return _Modules(path, *_LOADERS)


class _Modules(FileFinder):
    """What a folder holds of modules and packages. A folder without `__init__.py` is one only if there is Python in it
    and no installed package may mean another package of that name."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, target)
        if spec is None or spec.loader is not None:
            return spec
        folder = Path(self.path, fullname.rpartition(".")[2])
        has_python = any(folder.glob("*.py")) or any(folder.glob("*/*.py"))
        return spec if has_python and fullname not in _optional_packages() else None


@functools.cache
def _optional_packages() -> set[str]:
    """Names of the packages that the installed ones need or can use."""
    needs = [need for package in importlib.metadata.distributions() for need in package.requires or ()]
    names = [match[0] for need in needs if (match := re.match(r"[\w.-]+", need))]
    return {name.lower().replace("-", "_") for name in names}
