"""Modules that must not import torch, which takes seconds and several hundred MB per process, or Ray, which is
optional."""

import subprocess
import sys

MODULES = ["vla", "vla.cli", "vla.simulation.pool", "vla.training.dagger_rollouts"]


def test_imports_without_torch_and_ray():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'transformers', 'ray'} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
