"""`vla export --format hub`: a model card, and an upload that is complete or does not happen."""

import re

import numpy as np
import pytest
import torch

from tests.hub import hub as hub
from vla import cli
from vla.config import ModelConfig
from vla.model.build import build_policy
from vla.policy import Policy, checkpoint

NAME = "maker/arm"
# huggingface_hub 2.4 calls its HTTP library so.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder with a tiny random policy."""
    network, processor = tiny
    checkpoint.save(network, processor, tmp_path / "run" / "policy", "\nTrained by `vla` (lora) on demos: 3 steps.\n")
    return tmp_path / "run"


def export(run, *more):
    return cli.main(["export", "--policy", str(run), "--format", "hub", "--out", str(run.parent / "out"), *more])


def test_the_card_shows_what_the_policy_needs(run, tiny):
    assert export(run) == 0
    card, config = (run.parent / "out" / "README.md").read_text(), tiny[0].config
    assert card.startswith("---\nlibrary_name: vla\npipeline_tag: robotics\n")
    for text in ("# out", *config.robot_spec.cameras, *config.robot_spec.action_names, *config.statistics):
        assert text in card
    assert card.endswith("## Training\n\nTrained by `vla` (lora) on demos: 3 steps.\n")
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    images = {f"{camera}_image": np.zeros((48, 48, 3), np.uint8) for camera in config.robot_spec.cameras}
    scope = images | {"state": np.zeros(config.robot_spec.state_dim, np.float32)}
    exec(program.replace('"out"', repr(str(run.parent / "out"))), scope)
    assert scope["chunk"].shape == (config.horizon, config.robot_spec.action_dim)


def test_a_pushed_policy_is_the_policy(hub, run, observations, capsys):
    assert export(run, "--push", NAME) == 0
    assert f"pushed to {hub.url}/{NAME}" in capsys.readouterr().out
    assert hub.private == {NAME: True} and hub.commits == 1
    assert f'from_pretrained("{NAME}"' in hub.repositories[NAME]["README.md"].decode()
    ours, theirs = (Policy.from_pretrained(name, device="cpu") for name in (str(run), NAME))
    seen = observations(2)
    np.testing.assert_array_equal(
        ours.predict(seen, ["go to square 1"] * 2).ids, theirs.predict(seen, ["go to square 1"] * 2).ids
    )


def test_a_pushed_policy_can_be_trained_further(hub, run, facts):
    assert export(run, "--push", NAME) == 0
    network, processor = build_policy(ModelConfig(backbone=NAME), facts)
    pushed = Policy.from_pretrained(str(run), device="cpu").network
    assert processor.config.horizon == pushed.config.horizon
    for name, weight in pushed.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], weight)


def test_another_policy_leaves_nothing_of_the_first(hub, run):
    hub.repositories[NAME] = dict.fromkeys((".gitattributes", "model-00001-of-00002.safetensors", "notes.txt"), b"old")
    assert export(run, "--push", NAME) == 0
    files = {path.name for path in (run.parent / "out").iterdir()}
    assert set(hub.repositories[NAME]) == files | {".gitattributes"} and hub.commits == 1


@pytest.mark.parametrize("path", ["/lfs/", "/commit/"])
def test_an_interrupted_push_changes_nothing(hub, run, capsys, path):
    before = hub.repositories[NAME] = {".gitattributes": b"", "config.json": b"of another policy"}
    hub.refuse = lambda asked: 403 if path in asked else None
    assert export(run, "--push", NAME) == 2
    error = capsys.readouterr().err
    assert f"cannot push to {NAME}" in error and "out is complete" in error
    assert hub.repositories[NAME] == before
    hub.refuse = lambda asked: None
    assert export(run, "--push", NAME, "--overwrite") == 0
    assert hub.repositories[NAME]["config.json"] != before["config.json"]


def test_what_cannot_be_pushed_is_reported_before_anything_is_written(hub, run, monkeypatch, capsys):
    def refused(name, words, *more):
        assert export(run, "--push", name, *more) == 2
        assert words in capsys.readouterr().err
        assert not (run.parent / "out").exists()

    refused("arm", "push must be 'owner/name', got 'arm'")
    refused("a/b/c", "push: Repo id must be")
    refused(NAME, "push needs the model card of the format 'hub'", "--format", "vla")
    monkeypatch.setattr("vla.policy.hub.get_token", lambda: None)
    refused(NAME, "Log in with `hf auth login`")
    monkeypatch.setattr("vla.policy.hub.is_offline_mode", lambda: True)
    refused(NAME, "HF_HUB_OFFLINE is set")
    assert not hub.repositories
