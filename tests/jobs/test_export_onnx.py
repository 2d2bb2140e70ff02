"""`vla export --format onnx`: onnxruntime decodes the tokens of the engine."""

import json

import numpy as np
import pytest
import torch

from tests.random_models import save_llama, save_siglip
from vla import cli
from vla.config import ExportConfig, ModelConfig
from vla.decoding import onnx_export
from vla.decoding.engine import Engine
from vla.errors import CheckpointError, ConfigError
from vla.jobs.export import export
from vla.model.build import build_policy
from vla.policy import Policy, checkpoint


def tokens(folder, batch, n_tokens):
    """Greedy decoding with onnxruntime alone, in a cache with room to spare."""
    import onnxruntime

    prefill, step = (
        onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        for name in ("prefill.onnx", "step.onnx")
    )
    inputs = {name: batch[name].numpy() for name in ("input_ids", "pixel_values", "state") if name in batch}
    position = inputs["input_ids"].shape[1]
    logits, entries = prefill.run(None, inputs)
    cache = np.full((*entries.shape[:3], position + n_tokens + 5, entries.shape[4]), 7, np.float32)
    cache[:, :, :, :position] = entries
    found = [logits.argmax()]
    while len(found) < n_tokens:
        given = {"token": np.array([[found[-1]]]), "position": np.array([position]), "cache": cache}
        logits, entries = step.run(None, given)
        cache[:, :, :, position : position + 1] = entries
        position += 1
        found.append(logits.argmax())
    return found


@pytest.mark.parametrize("kind", ["conditioned", "siglip"])
def test_onnxruntime_decodes_the_tokens_of_the_engine(kind, tiny, facts, observations, tmp_path):
    """For instructions of other lengths than the graphs were made with."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    network, processor = tiny
    if kind == "siglip":
        save_llama(tmp_path / "llama")
        save_siglip(tmp_path / "siglip")
        model = ModelConfig(backbone=str(tmp_path / "llama"), vision=(str(tmp_path / "siglip"),), use_state=False)
        network, processor = build_policy(model, facts)
    checkpoint.save(network, processor, tmp_path / "policy")
    out = tmp_path / "out"
    assert cli.main(["export", "--policy", str(tmp_path / "policy"), "--format", "onnx", "--out", str(out)]) == 0
    network, processor = checkpoint.load(str(tmp_path / "policy"))
    engine = Engine(network)
    for observation, text in zip(observations(2), ("go", "put the red cube into the drawer"), strict=True):
        batch = processor.observe([observation], [text])
        ids = engine.stepwise(batch).ids[0] - network.config.action_token_begin
        assert tokens(out, batch, len(ids)) == ids.tolist()
    assert json.loads((out / "config.json").read_text())["model_type"] == "vla"
    with pytest.raises(CheckpointError, match="out is damaged or incomplete"):  # it has no weights for torch
        Policy.from_pretrained(str(out))


def test_what_the_graphs_do_not_hold_is_named(tiny, tmp_path, monkeypatch):
    checkpoint.save(*tiny, tmp_path / "policy")

    def refused(words):
        with pytest.raises(ConfigError, match=words):
            export(ExportConfig(policy=str(tmp_path / "policy"), format="onnx", out=tmp_path / "out"))
        assert [path.name for path in tmp_path.iterdir()] == ["policy"]

    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    refused("the format 'onnx' needs onnx")
    monkeypatch.setattr(type(tiny[0].action_tokenizer), "constrained", True)
    refused("the action tokenizer 'uniform' allows different tokens at different positions")
    network = tiny[0]
    monkeypatch.undo()
    network.latent = torch.nn.Identity()
    with pytest.raises(ConfigError, match="does not hold latents"):
        onnx_export.check(network)
