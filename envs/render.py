"""Pictures of a MuJoCo model: small fast ones for observations, larger and nicer ones for people.

Owns renderers and the settings that make software GL fast. Does not know what is in the picture.
"""

from __future__ import annotations

import atexit
import os
import weakref

import mujoco
import numpy as np


class Camera:
    """One off-screen renderer, shared by all cameras of a model that want the same size.

    `nice` adds shadows and multisampling, which cost 13 times the rest in software GL; `sky` draws the model's skybox.
    """

    def __init__(self, model: mujoco.MjModel, size: int, nice: bool = False, sky: bool = False) -> None:
        model.vis.quality.offsamples = 4 if nice else 0  # read when the GL context is created
        model.vis.quality.shadowsize = 2048 if nice else 0
        model.vis.quality.numslices, model.vis.quality.numstacks = (32, 16) if nice else (16, 8)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        try:
            self._renderer = mujoco.Renderer(model, size, size, max_geom=200)
        except Exception as error:  # each GL backend fails in its own way, down to AttributeError
            raise RuntimeError(
                f"could not create an off-screen renderer with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}. "
                "On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and set MUJOCO_GL=egl; "
                "or apt-get install libosmesa6 and set MUJOCO_GL=osmesa."
            ) from error
        #: Frees the GL context; at the latest when the interpreter exits, before GL itself is torn down: functions that
        #: were registered later run earlier, and mujoco registered its own when the renderer was made.
        self.close = weakref.finalize(self, self._renderer.close)
        atexit.register(self.close)
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = nice
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = sky
        flags[mujoco.mjtRndFlag.mjRND_HAZE] = False

    def __call__(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """The picture of `camera`, uint8 [size, size, 3] RGB."""
        self._renderer.update_scene(data, camera)
        return self._renderer.render()
