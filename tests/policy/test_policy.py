"""The policy: decoding equals `generate`, and checkpoints are reloaded exactly or rejected."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.decoders import greedy, reference
from vla.errors import CheckpointError, ConfigError, SpecError, VLAError
from vla.policy import Policy, checkpoint
from vla.serving.client import load

INSTRUCTIONS = ["pick up the red cube", "open the drawer", "please put the green ball on the blue zone", "reach"]


def test_greedy_equals_generate_token_for_token(nano, observations):
    network, processor = nano
    batch = processor.observe(observations(4), INSTRUCTIONS)  # lengths differ, so prompts are padded
    assert not batch["attention_mask"].all()
    assert torch.equal(greedy(network, batch), reference(network, batch))
    single = processor.observe(observations(1), INSTRUCTIONS[:1])
    assert torch.equal(greedy(network, single), reference(network, single))


def test_generate_without_a_cache_gives_the_same_tokens(nano, observations):
    network, processor = nano
    batch = processor.observe(observations(2), INSTRUCTIONS[:2])
    cached = reference(network, batch)
    before, network.generation_config.use_cache = network.generation_config.use_cache, False
    try:
        assert torch.equal(reference(network, batch), cached)
    finally:
        network.generation_config.use_cache = before


def test_padding_does_not_change_a_chunk(nano, observations):
    network, processor = nano
    together = greedy(network, processor.observe(observations(4), INSTRUCTIONS))
    alone = [greedy(network, processor.observe([o], [i])) for o, i in zip(observations(4), INSTRUCTIONS, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_every_decoded_id_is_an_action_token(nano, observations):
    network, processor = nano
    ids = greedy(network, processor.observe(observations(8), ["reach"] * 8))
    begin = network.config.action_token_begin
    assert ids.shape == (8, processor.action_tokenizer.max_tokens)
    assert ids.min() >= begin and ids.max() < begin + processor.action_tokenizer.vocab_size


def test_greedy_is_the_argmax_of_the_teacher_forced_logits(nano, observations):
    """Stepwise decoding agrees with scoring the decoded sequence in one forward pass."""
    network, processor = nano
    batch = processor.observe(observations(4), INSTRUCTIONS)
    ids = greedy(network, batch)
    full = dict(batch)
    full["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    full["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1)
    with torch.inference_mode():
        logits = network(**full, labels=ids).logits
    begin = network.config.action_token_begin
    rows = logits[..., begin : begin + processor.action_tokenizer.vocab_size].argmax(-1)
    assert torch.equal(rows + begin, ids)


def test_loss_is_the_mean_over_samples_of_the_cross_entropy_of_their_valid_tokens(nano, observations):
    network, processor = nano
    chunks = np.random.default_rng(0).uniform(-1, 1, (2, 4, 7)).astype(np.float32)
    suffix = processor.encode_actions(chunks)
    labels = suffix.copy()
    labels[1, -5:] = -100
    states = processor.state(np.stack([o["agent_pos"] for o in observations(2)]))
    batch = processor([processor.images(o) for o in observations(2)], INSTRUCTIONS[:2], states, suffix)
    with torch.inference_mode():
        output = network(**batch, labels=torch.from_numpy(labels))
    log_p = output.logits.log_softmax(-1).numpy()
    picked = np.take_along_axis(log_p, suffix[..., None], -1)[..., 0]
    per_sample = [-picked[row][labels[row] >= 0].mean() for row in range(2)]
    assert float(output.loss) == pytest.approx(np.mean(per_sample), rel=1e-5)


def test_action_round_trip_through_the_vocabulary(nano, robot):
    _, processor = nano
    chunks = np.random.default_rng(1).uniform(-0.95, 0.95, (5, 4, robot.action_dim)).astype(np.float32)
    chunks[..., 3:6] = 0
    back = processor.decode_actions(processor.encode_actions(chunks))
    assert np.abs(back - chunks).max() <= 1 / 31 + 0.01
    assert (back[..., 3:6] == 0).all()


def test_reload_in_another_process_gives_the_same_chunk(nano, observations, tmp_path, run_vla):
    network, processor = nano
    checkpoint.save(network, processor, tmp_path / "policy")
    here = Policy(network, processor).predict_chunk(observations(1)[0], "reach")
    np.savez(tmp_path / "o.npz", **observations(1)[0]["pixels"], state=observations(1)[0]["agent_pos"])
    code = (
        "import sys, numpy as np; from vla.policy import Policy; o = np.load(sys.argv[1] + '/o.npz');"
        "p = Policy.from_pretrained(sys.argv[1]);"
        "c = p.predict_chunk({'pixels': {k: o[k] for k in ('front', 'wrist')}, 'agent_pos': o['state']}, 'reach');"
        "np.save(sys.argv[1] + '/c.npy', c)"
    )
    assert run_vla("-c", code, tmp_path).returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), here)


@pytest.mark.parametrize("name", ["nano", "random"])
def test_a_loaded_policy_can_be_saved_again(nano, tmp_path, name):
    """Also after decoding, although the engine packs the weights."""
    if name == "random":
        checkpoint.save(*nano, tmp_path / "policy")
    policy = Policy.from_pretrained(name if name == "nano" else str(tmp_path), device="cpu")
    blank = {"pixels": {camera: np.full((96, 96, 3), 90, np.uint8) for camera in policy.robot.cameras}}
    blank["agent_pos"] = np.linspace(-1, 1, policy.robot.state_dim).astype(np.float32)
    ids = policy.predict([blank], ["reach the red cube"]).ids
    for folder in ("again", "once-more"):
        checkpoint.save(policy.network, policy.processor, tmp_path / folder)
        policy = Policy.from_pretrained(str(tmp_path / folder), device="cpu")
        np.testing.assert_array_equal(policy.predict([blank], ["reach the red cube"]).ids, ids)


def test_an_engine_keeps_the_training_mode_of_its_network(nano, observations):
    network, processor = nano
    before = {name: (p.stride(), p.data_ptr(), p.requires_grad) for name, p in network.named_parameters()}
    Policy(network, processor).predict(observations(1), ["reach"])
    assert before == {name: (p.stride(), p.data_ptr(), p.requires_grad) for name, p in network.named_parameters()}


def test_act_returns_a_chunk_action_by_action(nano, observations):
    policy = Policy(*nano, n_action_steps=3)
    first, second = observations(2)
    policy.reset("reach")
    chunk = policy.predict_chunk(first)
    served = [policy.act(first), policy.act(second), policy.act(second)]
    np.testing.assert_array_equal(served, chunk[:3])
    np.testing.assert_array_equal(policy.act(second), policy.predict_chunk(second)[0])
    policy.reset("open the drawer")
    np.testing.assert_array_equal(policy.act(first), policy.predict_chunk(first, "open the drawer")[0])


def test_invalid_calls_are_explained(nano, observations):
    policy = Policy(*nano)
    with pytest.raises(ConfigError, match=r"policy.reset\(instruction\)"):
        policy.act(observations(1)[0])
    policy.reset("reach")
    broken = observations(1)[0]
    broken["pixels"]["front"] = broken["pixels"]["front"].transpose(2, 0, 1)
    with pytest.raises(SpecError, match="channels-first"):
        policy.act(broken)
    with pytest.raises(SpecError, match="expected uint8"):
        policy.act({**observations(1)[0], "pixels": {k: v / 255 for k, v in observations(1)[0]["pixels"].items()}})
    with pytest.raises(SpecError, match="s2=nan"):
        policy.act({**observations(1)[0], "agent_pos": np.array([0, 0, np.nan, 0, 0, 0, 0])})
    with pytest.raises(SpecError, match=r"must be \{camera: image\}"):
        policy.act({**observations(1)[0], "pixels": observations(1)[0]["pixels"]["front"]})
    with pytest.raises(SpecError, match="'wrist'"):
        policy.act({**observations(1)[0], "pixels": {"front": observations(1)[0]["pixels"]["front"]}})
    with pytest.raises(ConfigError, match="horizon 4"):
        Policy(*nano, n_action_steps=5)
    with pytest.raises(ConfigError, match="not available"):
        Policy(*nano, device="cuda")


FIELDS = ["statistics", "robot", "action_tokenizer", *checkpoint.REQUIRED]


@pytest.mark.parametrize("field", [*FIELDS, "robot.control_hz", "robot.gripper_open", "robot.cameras"])
def test_a_checkpoint_with_incomplete_metadata_is_rejected(tiny, tmp_path, field):
    checkpoint.save(*tiny, tmp_path / "policy")
    path = tmp_path / "policy" / "config.json"
    values = json.loads(path.read_text())
    parent, _, name = field.rpartition(".")
    del (values[parent] if parent else values)[name]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"no `?{field}"):
        Policy.from_pretrained(str(tmp_path))


def test_a_checkpoint_with_missing_weights_is_rejected(tiny, tmp_path):
    """transformers would initialise them randomly."""
    checkpoint.save(*tiny, tmp_path / "policy")
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    del weights["projector.0.weight"]
    save_file(weights, tmp_path / "policy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"projector\.0\.weight"):
        Policy.from_pretrained(str(tmp_path))


def test_a_truncated_checkpoint_is_rejected(tiny, tmp_path):
    checkpoint.save(*tiny, tmp_path / "policy")
    path = tmp_path / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        Policy.from_pretrained(str(tmp_path))


ODD = [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: json.dumps(json.loads(text) | {"robot": "arm"}),
    lambda text: json.dumps(json.loads(text) | {"statistics": [1]}),
    lambda text: json.dumps(json.loads(text) | {"text_config": "llama"}),
    lambda text: json.dumps(json.loads(text) | {"horizon": "four"}),
    lambda text: json.dumps(json.loads(text) | {"action_tokenizer": {"name": "uniform", "size": 3}}),
    lambda text: json.dumps(json.loads(text) | {"layout": "images_first"}),
    lambda text: json.dumps(json.loads(text) | {"image_token_id": 4}),
    lambda text: json.dumps(json.loads(text) | {"image_mean": [[0.5]]}),
    lambda text: json.dumps(json.loads(text) | {"n_action_steps": 40}),
    lambda text: json.dumps(json.loads(text) | {"normalization": "q1_q99"}),
    lambda text: json.dumps(json.loads(text) | {"max_state_dim": 3}),
    lambda text: json.dumps(json.loads(text) | {"max_cameras": 1}),
    lambda text: json.dumps(json.loads(text) | {"vision_feature_layer": 7}),
]


@pytest.mark.parametrize("change", ODD)
def test_an_invalid_config_is_rejected(tiny, tmp_path, change):
    checkpoint.save(*tiny, tmp_path / "policy")
    path = tmp_path / "policy" / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(VLAError):
        Policy.from_pretrained(str(tmp_path))


def test_a_checkpoint_with_another_tokenizer_is_rejected(tiny, tmp_path):
    checkpoint.save(*tiny, tmp_path / "policy")
    path = tmp_path / "policy" / "config.json"
    values = json.loads(path.read_text())
    values["action_tokenizer"]["horizon"] = 16
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tokenizer has chunks \[16, .*original config.json"):
        Policy.from_pretrained(str(tmp_path))


def test_no_policy(tmp_path):
    with pytest.raises(CheckpointError, match="not a policy of this package"):
        Policy.from_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        Policy.from_pretrained(str(tmp_path / "typo"))


def test_several_statistics_require_a_choice(tiny):
    network, processor = tiny
    network.config.statistics["other"] = network.config.statistics["demo"]
    try:
        with pytest.raises(CheckpointError, match="demo, other"):
            Policy(network, processor)
        with pytest.raises(CheckpointError, match="Did you mean 'demo'"):
            Policy(network, processor, unnorm_key="demos")
    finally:
        del network.config.statistics["other"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:this processor has no .* instructions")
def test_reduced_precision(observations, dtype):
    policies = [Policy.from_pretrained("nano", device="cpu", dtype=name) for name in ("float32", dtype)]
    sizes = [sum(p.nbytes for p in policy.network.parameters()) for policy in policies]
    assert sizes[1] == sizes[0] / 2
    robot, rng = policies[0].robot, np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (96, 96, 3), np.uint8) for name in robot.cameras}
    observation = {"pixels": pixels, "agent_pos": np.zeros(robot.state_dim, np.float32)}
    exact, reduced = (policy.predict([observation], ["pick up the red cube"]) for policy in policies)
    assert reduced.log_probs.dtype == np.float32
    np.testing.assert_allclose(reduced.entropy[:, 0], exact.entropy[:, 0], atol=0.2)
    assert not np.array_equal(reduced.log_probs, exact.log_probs)


def test_unknown_and_unsupported_dtypes(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown dtype 'float61'. Did you mean 'float16'"):
        Policy.from_pretrained("nano", dtype="float61")

    def conv2d(*args):
        raise RuntimeError('"slow_conv2d" not implemented for Half')

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    with pytest.raises(ConfigError, match=r"dtype 'float16' is not supported by the device 'cpu' .*not implemented"):
        Policy.from_pretrained("nano", device="cpu", dtype="float16")
    with pytest.raises(ConfigError, match="vla serve --dtype bfloat16"):
        load("ws://localhost:1", dtype="bfloat16")
