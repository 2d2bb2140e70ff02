"""What this machine is: hardware, versions, the GL that draws its pictures.

Owns: the facts that explain why a number differs between two machines; `vla rollout` writes them into its results and
`vla doctor` judges them. It does not judge, and it imports nothing heavy: versions come from the installed packages'
metadata.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

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
    """Installed version; None when the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Cores that this process may use (a container or `taskset` may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_threads() -> int | None:
    """Threads that torch computes with; None where torch is not in use."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def cpu_quota() -> float | None:
    """Cores' worth of time that a Linux container grants; None without a limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.is_file():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def free_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where that cannot be told."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def cpu_model() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction sets, as Linux names them ("avx512_bf16", "amx_tile", ...); empty where that cannot be told."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def gl() -> dict[str, str | None]:
    """The GL that draws in this process. Renderer and version are known only after a picture has been drawn."""
    facts = {"backend": os.environ.get("MUJOCO_GL"), "renderer": None, "version": None}
    # Before `mujoco` has chosen its backend, importing PyOpenGL could settle it on another one.
    if "mujoco" in sys.modules:
        from OpenGL import GL

        for fact, name in (("renderer", GL.GL_RENDERER), ("version", GL.GL_VERSION)):
            try:
                text = GL.glGetString(name)
            except Exception:  # PyOpenGL's own error types: no context is current, and the fact stays unknown
                continue
            facts[fact] = text.decode() if text else None
    return facts


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
