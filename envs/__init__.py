"""Language-conditioned tabletop environments on MuJoCo.

Importing this package registers `vla/<Task>-v0`, `vla-metaworld/<task>-v3` and `vla-libero/<suite>-<number>` with
Gymnasium. Creating a Meta-World or LIBERO environment requires the extra `metaworld` or `libero`.

Owns the registration, and the selection of the off-screen GL backend before `mujoco` is imported. It does not know
policies, tokens or datasets. `envs` and `vla` interact only through the Gymnasium API.
"""

from __future__ import annotations

import os
import traceback

if not os.environ.get("DISPLAY") and not os.environ.get("MUJOCO_GL"):
    os.environ["MUJOCO_GL"] = "egl"
# Software GL: for 96 px images, rasterising in the calling thread is faster than using a thread pool, and keeps the
# remaining cores free for environments in other processes.
os.environ.setdefault("LP_NUM_THREADS", "0")

try:
    import mujoco  # noqa: F401  (imported here so that every entry point explains a missing dependency)
except Exception as error:  # GL backends and incomplete installations raise various types
    if any("gl_context" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        raise RuntimeError(
            f"MuJoCo could not load the GL backend MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}. "
            "On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (for MUJOCO_GL=egl) "
            "or libosmesa6 (for MUJOCO_GL=osmesa)."
        ) from error
    # MuJoCo 3 and 4 are packaged differently but share a folder. Switching between them with pip mixes their files.
    raise RuntimeError(
        f"MuJoCo is missing or incompletely installed ({type(error).__name__}: {error}). Install it again: "
        "pip uninstall -y mujoco mujoco-core mujoco-studio, then install this package as before."
    ) from error

from envs import libero, metaworld, metaworld_questions, tasks
from envs.libero import LIBERO_IDS
from envs.metaworld import METAWORLD_IDS
from envs.tasks import ENV_IDS

tasks.register_all()
metaworld.register_all()
metaworld_questions.register_all()
libero.register_all()

__all__ = ["ENV_IDS", "LIBERO_IDS", "METAWORLD_IDS"]
