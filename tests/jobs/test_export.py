"""`vla export`, and all verbs that use a policy, with a checkpoint in OpenVLA's layout."""

import dataclasses
import json
import re
import time

import json_numpy
import numpy as np
import pytest
import requests

from tests import openvla_folder as published
from tests.model.test_openvla import image
from tests.openvla_env import NAMES
from vla import cli
from vla.config import ExportConfig
from vla.errors import CheckpointError, ConfigError
from vla.jobs.export import export
from vla.model.sources import openvla_export
from vla.policy import Policy, checkpoint
from vla.spec import RobotSpec

ROLLOUT = ["--env", "tests.openvla_env:toy/Arm-v0", "--state", "--episodes", 1, "--n-envs", 1, "--videos", 0]
KEY = ["--unnorm-key", "fractal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "published"
    published.save(folder, published.weights())
    return folder


def succeeds(run_vla, *arguments):
    done = run_vla(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_rollout_train_and_export(folder, dataset, tmp_path, run_vla):
    rolled = ["rollout", "--out", tmp_path / "first", "--policy", folder, *KEY, *ROLLOUT]
    succeeds(run_vla, *rolled)
    info = json.loads((tmp_path / "first" / "eval_info.json").read_text())
    assert info["overall"]["pc_success"] == 100.0

    robot = RobotSpec(("image",), (), NAMES, "ee_delta", 6, 1.0, 0.0, 5.0)
    demos, run = dataset("arm", robot, episodes=2, length=3), tmp_path / "run"
    train = ["train", "--backbone", folder, "--data", demos, "--out", run, "--steps", 1, "--batch-size", 2]
    succeeds(run_vla, *train, "--val-fraction", 0)
    trained = Policy.from_pretrained(str(run), device="cpu")
    said = succeeds(run_vla, "export", "--policy", run, "--format", "openvla", "--out", tmp_path / "out")
    assert "float32, unnorm_key arm" in said
    observations = [{"pixels": {"image": image(seed)}} for seed in range(2)]
    before = trained.predict(observations, ["go"] * 2)
    after = Policy.from_pretrained(str(tmp_path / "out"), device="cpu").predict(observations, ["go"] * 2)
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_allclose(before.chunks, after.chunks, atol=1e-6)


def test_serve(folder, start_vla):
    process = start_vla("serve", "--policy", folder, "--port", 0, *KEY)
    while not (found := re.search(r"at (http://\S+/act)", process.said()[0])):
        assert process.poll() is None, process.said()
        time.sleep(0.05)
    policy = Policy.from_pretrained(str(folder), unnorm_key="fractal", device="cpu")
    body = {"image": image().tolist(), "instruction": "Open the drawer."}
    for key in ("fractal", "bridge_orig"):
        expected = policy.for_key(key).predict_chunk({"pixels": {"image": image()}}, body["instruction"])[0]
        reply = requests.post(found[1], json=body | {"unnorm_key": key}, timeout=60).text
        np.testing.assert_allclose(json_numpy.loads(reply), expected, atol=1e-6)
    process.kill()


def test_a_robot_with_another_gripper_polarity_is_rejected(folder, tmp_path, capsys):
    arguments = ["rollout", "--policy", folder, *KEY, *ROLLOUT, "--kwargs", "{gripper_closed: -1.0}"]
    assert cli.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
    assert "closes it with 0" in capsys.readouterr().err


def test_export_with_one_key_and_a_centre_crop(folder, tmp_path):
    config = ExportConfig(policy=str(folder), out=tmp_path, unnorm_key="fractal", image_transform="lanczos-crop")
    with pytest.raises(CheckpointError, match="unknown unnorm_key 'bridge'"):
        export(dataclasses.replace(config, unnorm_key="bridge"))
    with pytest.raises(CheckpointError, match="unknown image transform 'crop'"):
        export(dataclasses.replace(config, image_transform="crop"))
    export(config)
    policy = Policy.from_pretrained(str(tmp_path), device="cpu")
    assert policy.unnorm_key == "fractal" and policy.network.config.image_transform == "lanczos-crop"
    other = Policy.from_pretrained(str(folder), unnorm_key="fractal", device="cpu")
    first, second = (p.processor.images({"pixels": {"image": image()}}) for p in (policy, other))
    assert first.shape == second.shape and (first != second).mean() > 0.5
    with pytest.raises(ConfigError, match="already contains a checkpoint"):
        export(config)
    export(dataclasses.replace(config, overwrite=True, format="openvla"))
    assert Policy.from_pretrained(str(tmp_path), device="cpu").network.config.image_transform == "lanczos-crop"


def test_an_export_does_not_replace_other_files(folder, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not a checkpoint folder"):
        export(ExportConfig(policy=str(folder), out=tmp_path, overwrite=True))
    with pytest.raises(ConfigError, match="is the policy itself"):
        export(ExportConfig(policy=str(folder), out=folder, overwrite=True))


def test_an_interrupted_export_leaves_no_loadable_checkpoint(folder, tmp_path, monkeypatch):
    network, processor = checkpoint.load(str(folder))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(openvla_export, "_save_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(ExportConfig(policy=str(folder), format="openvla", out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):  # as after a kill, when the scratch folder is not removed
        openvla_export.write(network, processor, tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="not a policy of this package"):
        Policy.from_pretrained(str(tmp_path))
