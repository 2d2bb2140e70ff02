"""Import of modules named by the user in a flag or a YAML file.

Owns: the search order (installed modules, then the working directory). Modules named in datasets and checkpoints must
never be imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def load(source: str) -> Callable[..., Any]:
    """Import the object at "module:callable". ValueError if `source` has another form; import errors are passed on."""
    module, _, name = source.partition(":")
    if not module or not name:
        raise ValueError("no colon between module and callable" if ":" not in source else "a part is missing")
    return getattr(import_module(module), name)


def import_module(name: str) -> ModuleType:
    """Import the module `name`, from the working directory if it is not installed."""
    here = Path.cwd()
    finder = next((f for f in sys.meta_path if isinstance(f, _WorkingDirectory) and f.folder == here), None)
    if finder is None:
        finder = _WorkingDirectory(here)
        sys.meta_path.append(finder)
    finder.named.add(name.partition(".")[0])
    return importlib.import_module(name)


class _WorkingDirectory(MetaPathFinder):
    """Finds modules in a folder if no installed module has their name.

    If the folder were on `sys.path`, it would take precedence over editable installs, and its subfolders would be
    namespace packages: a folder `datasets/` with recordings would replace the library `datasets`. With this finder, a
    subfolder without `__init__.py` is a package only if the user names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.named: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, [str(self.folder)]) if path is None else None
        return spec if spec is not None and (spec.loader is not None or name in self.named) else None
