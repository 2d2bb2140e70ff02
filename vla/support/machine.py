"""Description of this machine: hardware, package versions and GL implementation.

Owns: the properties of a machine that may affect results. `vla rollout` stores them with its results, and `vla doctor`
interprets them. Versions are read from package metadata, without slow imports.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("vla", "torch", "transformers", "peft", "gymnasium", "mujoco", "numpy", "av")


def describe() -> dict[str, Any]:
    """Operating system, processor and software versions, as plain JSON values."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "torch_threads": torch_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def version(package: str) -> str | None:
    """Installed version; None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Number of cores available to this process, which a container or `taskset` may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_threads() -> int | None:
    """Number of threads that torch uses; None if torch is not imported."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def cpu_quota() -> float | None:
    """CPU quota of a Linux container, in cores; None without a limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.is_file():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def free_memory() -> int:
    """Memory available without swapping, in bytes."""
    return psutil.virtual_memory().available


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_model() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction sets by their Linux names ("avx512_bf16", "amx_tile", ...); empty if unknown."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def gl() -> dict[str, str | None]:
    """The GL implementation of this process. Renderer and version are None until an image has been rendered."""
    facts = {"backend": os.environ.get("MUJOCO_GL"), "renderer": None, "version": None}
    # Importing PyOpenGL before `mujoco` has selected its backend could select a different one.
    if "mujoco" in sys.modules:
        from OpenGL import GL

        for fact, name in (("renderer", GL.GL_RENDERER), ("version", GL.GL_VERSION)):
            try:
                text = GL.glGetString(name)
            except Exception:  # PyOpenGL's own error types; there is no current context
                continue
            facts[fact] = text.decode() if text else None
    return facts


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
