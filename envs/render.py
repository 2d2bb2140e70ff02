"""Rendering of MuJoCo models: small images for observations, and larger ones for videos.

Owns the renderers and the settings that make software GL fast. Does not know the scene.
"""

from __future__ import annotations

import atexit
import os
import weakref

import mujoco
import numpy as np


class Camera:
    """An off-screen renderer for all cameras of a model; all images have the same size.

    `nice` adds shadows and multisampling; in software GL, they take 13 times as long as the rest. `sky` draws the
    model's skybox. With `as_modelled`, both have no effect, and the model's own settings are used. Geoms in the groups
    `hidden` are not drawn.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        size: int,
        nice: bool = False,
        sky: bool = False,
        as_modelled: bool = False,
        hidden: tuple[int, ...] = (),
    ) -> None:
        if not as_modelled:
            model.vis.quality.offsamples = 4 if nice else 0  # read when the GL context is created
            model.vis.quality.shadowsize = 2048 if nice else 0
            model.vis.quality.numslices, model.vis.quality.numstacks = (32, 16) if nice else (16, 8)
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        try:
            self._renderer = mujoco.Renderer(model, size, size, max_geom=1000)
        except Exception as error:  # each GL backend raises its own types, even AttributeError
            raise RuntimeError(
                f"could not create an off-screen renderer with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {error}. "
                "On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and set MUJOCO_GL=egl; "
                "or apt-get install libosmesa6 and set MUJOCO_GL=osmesa."
            ) from error
        #: Frees the GL context, at the latest at interpreter exit. It must run before mujoco's own exit function, which
        #: shuts GL down. Exit functions run in reverse order, so it is registered after creating the renderer.
        self.close = weakref.finalize(self, self._renderer.close)
        atexit.register(self.close)
        self._visible = mujoco.MjvOption()
        self._visible.geomgroup[list(hidden)] = 0
        if as_modelled:
            return
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = nice
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = sky
        flags[mujoco.mjtRndFlag.mjRND_HAZE] = False

    def __call__(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """The image of `camera`, uint8 [size, size, 3] RGB."""
        self._renderer.update_scene(data, camera, self._visible)
        return self._renderer.render()
