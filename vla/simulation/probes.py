"""Probes of rendering, torch and video encoding: `python -m vla.simulation.probes <name>`.

Owns: the checks of `vla doctor` that may crash their process (a GL driver, a mismatched binary) or need heavy imports.
Each probe runs in a separate process and prints one JSON object. `vla.jobs.doctor` interprets the results.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

SCENE = """
<mujoco>
  <visual><quality shadowsize="0" offsamples="0"/></visual>
  <worldbody>
    <light pos="0 0 2" castshadow="false"/>
    <geom type="plane" size="1 1 .1" rgba=".7 .7 .7 1"/>
    <geom type="box" size=".1 .1 .1" pos="0 0 .1" rgba=".8 .1 .1 1"/>
    <geom type="sphere" size=".1" pos=".3 0 .1" rgba=".1 .1 .8 1"/>
    <camera name="eye" pos="0 -1 1" xyaxes="1 0 0 0 .7 .7"/>
  </worldbody>
</mujoco>
"""


def render() -> dict[str, Any]:
    """Render a small MuJoCo scene with the backend MUJOCO_GL. Returns the GL implementation and the frame rate."""
    import mujoco

    from vla.support import machine

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 96, 96)
    renderer.update_scene(data, "eye")
    if renderer.render().std() < 1:
        raise RuntimeError("the rendered image is empty")
    frames, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.25:
        renderer.update_scene(data, "eye")
        renderer.render()
        frames += 1
    rate = frames / (time.perf_counter() - start)
    return machine.gl() | {"frames_per_s": rate}


def torch() -> dict[str, Any]:
    """The version and device of the installed torch, and the speed of a float32 matrix product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    facts = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "device": device,
        "gpu": None,
        "bf16": False,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    matrix = torch.randn(1024, 1024, device=device)
    (matrix @ matrix).sum().item()
    start = time.perf_counter()
    (matrix @ matrix @ matrix @ matrix).sum().item()
    return facts | {"gflops": 3 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9, "threads": torch.get_num_threads()}


def video() -> dict[str, Any]:
    """Encode a short clip with x264 through PyAV. Returns the frame rate."""
    import numpy as np

    from vla.simulation.clips import encode

    frames = [np.full((96, 96, 3), i, np.uint8) for i in range(60)]
    start = time.perf_counter()
    encode(frames, 20)
    return {"frames_per_s": len(frames) / (time.perf_counter() - start)}


PROBES = {"render": render, "torch": torch, "video": video}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
