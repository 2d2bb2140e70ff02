"""Domain randomisation of light, table colour, colour shades and camera poses. It is sampled once per episode.

Owns the randomised properties and their ranges. Does not know tasks or positions, and does not change the physics.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

_FIELDS = ("geom_rgba", "light_dir", "light_diffuse", "cam_pos", "cam_quat", "cam_fovy")


def remember(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """The neutral appearance of a model. It is restored at the start of every episode."""
    look = {name: getattr(model, name).copy() for name in _FIELDS}
    look["ambient"] = np.array(model.vis.headlight.ambient)
    return look


def restore(model: mujoco.MjModel, neutral: dict[str, np.ndarray]) -> None:
    """Undo `apply`."""
    for name in _FIELDS:
        getattr(model, name)[:] = neutral[name]
    model.vis.headlight.ambient[:] = neutral["ambient"]


def draw(rng: np.random.Generator) -> dict[str, Any]:
    """Sample an appearance, as plain values."""
    return {
        "table": rng.uniform(-0.14, 0.10, size=3).tolist(),
        "ambient": float(rng.uniform(-0.10, 0.10)),
        "light": rng.uniform(-0.5, 0.5, size=2).tolist(),
        "diffuse": float(rng.uniform(-0.12, 0.12)),
        "shades": int(rng.integers(2**31)),
        "camera": rng.normal(0.0, 1.0, size=6).clip(-2, 2).tolist(),
    }


def apply(model: mujoco.MjModel, look: dict[str, Any]) -> None:
    """Apply an appearance to `model`. Call this after setting the colours."""
    table = model.geom("table").id
    # One offset per colour, not per geom, so that all parts of an object keep the same colour.
    shades = np.random.default_rng(look["shades"])
    colors, inverse = np.unique(model.geom_rgba[:, :3], axis=0, return_inverse=True)
    colors = np.clip(colors + shades.uniform(-0.06, 0.06, size=colors.shape), 0, 1)
    model.geom_rgba[:, :3] = colors[inverse.ravel()]
    model.geom_rgba[table, :3] = np.clip(model.geom_rgba[table, :3] + look["table"], 0, 1)
    model.light_dir[0, :2] += look["light"]
    model.light_dir[0] /= np.linalg.norm(model.light_dir[0])
    model.light_diffuse[0] += look["diffuse"]
    model.vis.headlight.ambient[:] = np.array(model.vis.headlight.ambient) + look["ambient"]
    camera = model.camera("front").id
    shift, turn = np.array(look["camera"][:3]) * 0.006, np.array(look["camera"][3:]) * 0.008
    model.cam_pos[camera] += shift
    mujoco.mju_quatIntegrate(model.cam_quat[camera], turn, 1.0)
