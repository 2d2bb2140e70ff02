"""What must not import torch, which takes seconds and several hundred MB in each process, or Ray, which is optional."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["vla", "vla.cli", "vla.simulation.pool", "vla.training.dagger_rollouts"])
def test_it_is_imported_without_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'ray'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
