"""Simplified meshes look similar, and the model is restored."""

import mujoco
import numpy as np

from envs.libero.meshes import simplified
from envs.render import Camera


def ball(n=60):
    """A model of a ball with 2 n^2 faces and a radius of 10 cm in front of a camera."""
    polar, azimuth = np.meshgrid(np.linspace(0, np.pi, n + 1), np.linspace(0, 2 * np.pi, n + 1), indexing="ij")
    points = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], -1)
    corner = np.arange(n)[:, None] * (n + 1) + np.arange(n)
    faces = np.concatenate(
        [np.stack([corner, corner + n + 1, corner + 1], -1), np.stack([corner + 1, corner + n + 1, corner + n + 2], -1)]
    )
    spec = mujoco.MjSpec()
    spec.add_mesh(name="ball", uservert=(0.1 * points).ravel().tolist(), userface=faces.ravel().tolist())
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="ball", rgba=[0.8, 0.2, 0.1, 1])
    spec.worldbody.add_light(pos=[0, 0, 1])
    spec.worldbody.add_camera(name="above", pos=[0, 0, 0.4])
    return spec.compile()


def test_simplified_meshes_look_alike_with_an_eighth_of_the_faces():
    model = ball()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)

    def image():
        camera = Camera(model, 64)
        found = camera(data, "above").astype(int)
        camera.close()
        return found

    whole, faces, before = image(), model.mesh_face.copy(), model.mesh_facenum[0]
    with simplified(model, 0.02):
        assert 100 < model.mesh_facenum[0] < before / 8
        simple = image()
    np.testing.assert_array_equal(model.mesh_face, faces)
    assert model.mesh_facenum[0] == before
    seen = (whole.sum(-1) > 0).mean()
    assert seen > 0.15 and 0 < np.abs(simple - whole).mean() < 4
