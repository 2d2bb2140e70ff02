"""Modules in the working directory can be imported, but never shadow installed packages."""

import subprocess
import sys

import pytest


@pytest.fixture
def found(tmp_path):
    """`found(*names)`: whether each module is found in the working directory, which contains misleading names."""
    (tmp_path / "datasets" / "drawer").mkdir(parents=True)
    (tmp_path / "datasets" / "convert.py").touch()  # `datasets` is also the name of a library
    (tmp_path / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "packaging").mkdir()
    (tmp_path / "packaging" / "__init__.py").touch()
    (tmp_path / "my_worlds").mkdir()
    (tmp_path / "my_worlds" / "push.py").touch()

    def find(*names: str) -> dict[str, bool]:
        code = (
            "import importlib.util, os, sys, vla.support.search_path\n"
            "vla.support.search_path.installed_packages_first()\n"
            "for name in sys.argv[1:]:\n"
            "    spec = importlib.util.find_spec(name)\n"
            "    places = [] if spec is None else [spec.origin or '', *(spec.submodule_search_locations or ())]\n"
            "    print(name, spec is not None and any(place.startswith(os.getcwd()) for place in places))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return {name: here == "True" for name, here in map(str.split, done.stdout.splitlines())}

    return find


def test_data_folders_are_not_packages_and_installed_packages_come_first(found):
    assert found("datasets", "wandb", "packaging") == {"datasets": False, "wandb": False, "packaging": False}
    assert found("my_worlds", "my_worlds.push") == {"my_worlds": True, "my_worlds.push": True}
