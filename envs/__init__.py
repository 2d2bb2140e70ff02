"""Language-conditioned tabletop worlds on MuJoCo; importing this package registers `vla/<Task>-v0` with Gymnasium, and
Meta-World's tasks as `vla-metaworld/<task>-v3`, which need the `metaworld` extra when they are made.

Owns the registration and the choice of the off-screen GL backend (it has to be made before `mujoco` is imported).
Knows nothing of policies, tokens or datasets: `envs` meets `vla` only through the Gymnasium API.
"""

from __future__ import annotations

import os
import traceback

if not os.environ.get("DISPLAY") and not os.environ.get("MUJOCO_GL"):
    os.environ["MUJOCO_GL"] = "egl"
# Software GL: rasterising 96 px pictures in the calling thread is faster than handing them to a pool, and leaves the
# other cores to whoever runs other worlds there.
os.environ.setdefault("LP_NUM_THREADS", "0")

try:
    import mujoco  # noqa: F401  (imported here so that what is missing is explained once, for every entry point)
except Exception as error:  # GL backends and half-installed packages fail in their own ways
    if any("gl_context" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        raise RuntimeError(
            f"MuJoCo could not load the GL backend MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}. "
            "On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (for MUJOCO_GL=egl) "
            "or libosmesa6 (for MUJOCO_GL=osmesa)."
        ) from error
    # MuJoCo 3 and 4 are packaged differently and share a folder: going from one to the other, pip leaves a mixture.
    raise RuntimeError(
        f"MuJoCo is not installed, or only in part ({type(error).__name__}: {error}). Install it again: "
        "pip uninstall -y mujoco mujoco-core mujoco-studio, then install this package as before."
    ) from error

from envs import metaworld, tasks
from envs.metaworld import METAWORLD_IDS
from envs.tasks import ENV_IDS

tasks.register_all()
metaworld.register_all()

__all__ = ["ENV_IDS", "METAWORLD_IDS"]
