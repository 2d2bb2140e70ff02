"""Simplified meshes for small images.

Owns the simplification. LIBERO's scenes have 300,000 faces, 30 times the number of pixels of a small image, and they
dominate the rendering time of software GL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mujoco
import numpy as np


@contextlib.contextmanager
def simplified(model: mujoco.MjModel, cell: float) -> Iterator[None]:
    """Simplify the meshes of `model` within this context. Create the renderer inside it; physics does not use faces.

    Vertex clustering (Rossignac and Borrel, 1993): the vertices in a cube of side `cell` (metres) are merged, and faces
    without area are removed. Faces keep their normals and texture coordinates.
    """
    names = ("mesh_facenum", "mesh_face", "mesh_facenormal", "mesh_facetexcoord")
    before = {name: getattr(model, name).copy() for name in names}
    try:
        for mesh in range(model.nmesh):
            _simplify(model, mesh, cell)
        yield
    finally:
        for name, values in before.items():
            getattr(model, name)[:] = values


def _simplify(model: mujoco.MjModel, mesh: int, cell: float) -> None:
    first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    cubes = np.floor(model.mesh_vert[first : first + count] / cell).astype(np.int64)
    _, representative, cluster = np.unique(cubes, axis=0, return_index=True, return_inverse=True)
    start, end = model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh]
    faces = representative[cluster.ravel()[model.mesh_face[start:end]]]
    corners = np.sort(faces, axis=1)
    _, kept = np.unique(corners, axis=0, return_index=True)
    kept = kept[(np.diff(corners[kept], axis=1) > 0).all(1)]
    if not len(kept):  # smaller than a cube
        return
    model.mesh_facenum[mesh] = len(kept)
    rows = slice(start, start + len(kept))
    model.mesh_face[rows] = faces[kept]
    for name in ("mesh_facenormal", "mesh_facetexcoord"):
        values = getattr(model, name)
        values[rows] = values[start + kept]
