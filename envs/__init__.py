"""Language-conditioned tabletop worlds on MuJoCo; importing this package registers `vla/<Task>-v0` with Gymnasium, and
Meta-World's tasks as `vla-metaworld/<task>-v3`, which need the `metaworld` extra when they are made.

Owns the registration and the choice of the off-screen GL backend (it has to be made before `mujoco` is imported).
Knows nothing of policies, tokens or datasets: `envs` meets `vla` only through the Gymnasium API.
"""

from __future__ import annotations

import os

if not os.environ.get("DISPLAY") and not os.environ.get("MUJOCO_GL"):
    os.environ["MUJOCO_GL"] = "egl"
# Software GL: rasterising 96 px pictures in the calling thread is faster than handing them to a pool, and leaves the
# other cores to whoever runs other worlds there.
os.environ.setdefault("LP_NUM_THREADS", "0")

try:
    import mujoco  # noqa: F401  (imported here so that a missing GL library is explained once, for every entry point)
except (ImportError, AttributeError) as error:
    raise RuntimeError(
        f"MuJoCo could not load the GL backend MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}. "
        "On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (for MUJOCO_GL=egl) "
        "or libosmesa6 (for MUJOCO_GL=osmesa)."
    ) from error

from envs import metaworld, tasks
from envs.metaworld import METAWORLD_IDS
from envs.tasks import ENV_IDS

tasks.register_all()
metaworld.register_all()

__all__ = ["ENV_IDS", "METAWORLD_IDS"]
