"""OpenVLA's layout: import and export, compared with the published maths, which is written here in plain PyTorch."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests import openvla_folder as published
from tests.decoders import greedy, reference
from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError, VLAError
from vla.model.build import DataFacts, build_policy
from vla.model.sources import openvla, openvla_export
from vla.policy import Policy, checkpoint
from vla.spec import RobotSpec

INSTRUCTION = "Put the RED cup on the plate."
FIELDS = ["robot", "statistics", "action_tokenizer", "action_token_begin", *checkpoint.REQUIRED]
FIELDS += ["prompt_end", "image_transform", "image_mean", "image_std", "vision_feature_layer"]
MEANS = [(0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5)]
STDS = [(0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5)]


@pytest.fixture(scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "published"
    published.save(folder, published.weights())
    return folder


@pytest.fixture
def folder(_folder, tmp_path):
    """A copy that tests may change."""
    return shutil.copytree(_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def policy(_folder):
    return Policy.from_pretrained(str(_folder), unnorm_key="bridge_orig", device="cpu")


def image(seed: int = 0, size: int = 224) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def observe(seed: int = 0) -> dict:
    return {"pixels": {"image": image(seed)}}


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def features(w, root, pixels, heads=16, blocks=2):
    """The output of the second-to-last block, without class and register tokens."""
    w = {key.removeprefix(f"{root}."): value for key, value in w.items() if key.startswith(f"{root}.")}
    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    x, before = x + w["pos_embed"], [w[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in w]
    x = torch.cat([*before, x], dim=1)
    for i in range(blocks - 1):
        name, (batch, length, width) = f"blocks.{i}", x.shape
        one = torch.ones(width)
        qkv = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x))
        q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        attended = linear(w, f"{name}.attn.proj", attended.transpose(1, 2).reshape(batch, length, width))
        x = x + attended * w.get(f"{name}.ls1.scale_factor", one)
        hidden = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))
        hidden = linear(w, f"{name}.mlp.fc2", 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
        x = x + hidden * w.get(f"{name}.ls2.scale_factor", one)
    return x[:, -256:]


def rms(w, name, x):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"language_model.{name}.weight"]


def rotate(x):
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def logits(w, ids, frame):
    """Logits of the published model, [length, 32064], for prompt ids and one image uint8 [224, 224, 3]."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
    towers = [
        features(
            w,
            f"vision_backbone.{name}",
            ((pixels - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None])[None],
        )
        for name, m, s in zip(("featurizer", "fused_featurizer"), MEANS, STDS, strict=True)
    ]
    patches = torch.cat(towers, dim=2)[0]
    for name in ("fc1", "fc2", "fc3"):
        patches = linear(w, f"projector.{name}", patches if name == "fc1" else F.gelu(patches))
    words = w["language_model.model.embed_tokens.weight"][torch.tensor(ids)]
    x = torch.cat([words[:1], patches, words[1:]])
    length, heads = len(x), published.HEADS
    causal = torch.full((length, length), -torch.inf).triu(1)
    for i in range(published.LAYERS):
        name, layer = f"model.layers.{i}", f"language_model.model.layers.{i}"
        hidden = rms(w, f"{name}.input_layernorm", x)
        q, k, v = (
            linear(w, f"{layer}.self_attn.{part}_proj", hidden).view(length, heads, -1).transpose(0, 1)
            for part in "qkv"
        )
        q, k = rotate(q), rotate(k)
        attended = (q @ k.mT * q.shape[-1] ** -0.5 + causal).softmax(-1) @ v
        x = x + linear(w, f"{layer}.self_attn.o_proj", attended.transpose(0, 1).reshape(length, -1))
        hidden = rms(w, f"{name}.post_attention_layernorm", x)
        gate = linear(w, f"{layer}.mlp.gate_proj", hidden)
        x = x + linear(w, f"{layer}.mlp.down_proj", gate * gate.sigmoid() * linear(w, f"{layer}.mlp.up_proj", hidden))
    return linear(w, "language_model.lm_head", rms(w, "model.norm", x))


def prompt_ids(instruction):
    """The prompt as in OpenVLA's code: BOS, the text, and the space before the first action token."""
    text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
    ids = [1, *published.tokenizer()(text, add_special_tokens=False)["input_ids"]]
    assert ids[-3:] == [13, 3744, 29901]  # line feed, "Out", ":"
    return [*ids, 29871]


def greedy_ids(w, instruction, frame):
    ids = prompt_ids(instruction)
    for _ in range(7):
        ids.append(31744 + int(logits(w, ids, frame)[-1, 31744:32000].argmax()))
    return ids[-7:]


def published_action(ids, statistics):
    edges = np.linspace(-1, 1, 256)
    values = ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - np.array(ids) - 1, 0, 254)]
    low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
    return np.where(statistics["mask"], 0.5 * (values + 1) * (high - low) + low, values)


def test_logits_equal_the_published_maths_at_every_position(policy):
    w, batch = published.weights(), policy.processor.observe([observe()], [INSTRUCTION])
    ids = [*prompt_ids(INSTRUCTION), 31800, 31999, 31744]
    suffix = torch.tensor([ids[-3:]])
    batch["input_ids"] = torch.cat([batch["input_ids"], suffix], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(suffix)], dim=1)
    with torch.inference_mode():
        ours, theirs = policy.network(**batch).logits[0], logits(w, ids, image())
    assert ours.shape == (256 + len(ids), 32064) and theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_greedy_actions_equal_the_published_ones(policy):
    w, different = published.weights(), set()
    for seed, instruction in enumerate([INSTRUCTION, "open the drawer", "go"]):
        prediction = policy.predict([observe(seed)], [instruction])
        ids = greedy_ids(w, instruction, image(seed))
        assert prediction.ids[0].tolist() == ids
        expected = published_action(ids, published.NORM_STATS["bridge_orig"]["action"])
        np.testing.assert_allclose(prediction.chunks[0, 0], expected, atol=1e-6)
        different |= set(ids)
    assert len(different) > 5


def test_fast_decoding_equals_generate(policy):
    batch = policy.processor.observe([observe(0), observe(1)], [INSTRUCTION, "go"])  # one row is padded
    assert torch.equal(greedy(policy.network, batch), reference(policy.network, batch))


def test_the_sequence_equals_the_published_one(policy):
    """BOS, 256 patches, the text, and id 29871; all of them are attended to."""
    batch = policy.processor.observe([observe()], [INSTRUCTION])
    ids, expected = batch["input_ids"][0].tolist(), prompt_ids(INSTRUCTION)
    image_id = policy.network.config.image_token_id
    assert ids == [expected[0], *[image_id] * 256, *expected[1:]] and bool(batch["attention_mask"].all())
    assert image_id >= 32000  # a row without a text token


def test_the_report_of_keys(_folder):
    source = openvla.OpenVLA(str(_folder), ModelConfig())
    source.load(source.config())
    assert (set(source.keys.used), source.keys.unused, source.keys.missing) == (set(published.shapes()), (), ())


def test_action_tokens_are_the_256_rows_before_the_padding(policy):
    config = policy.network.config
    assert (config.vocab_size, config.action_token_begin, config.n_action_rows) == (32064, 31744, 256)
    encode, decode = policy.processor.encode_actions, policy.processor.decode_actions
    low, high = policy.action_limits
    ids = encode(np.stack([low, high])[:, None], "bridge_orig")
    assert ids.tolist() == [[31999] * 7, [31744] * 7]
    gripper = encode(np.array([[[0, 0, 0, 0, 0, 0, 0.0]], [[0, 0, 0, 0, 0, 0, 1.0]]]), "bridge_orig")
    assert gripper[:, 6].tolist() == [31872, 31744]
    np.testing.assert_allclose(decode(gripper, "bridge_orig")[:, 0, 6], [0.0, 1 - 1 / 255], atol=1e-6)


def test_gripper_and_unnorm_key(policy, _folder):
    """The gripper is not normalised: 1 opens it and 0 closes it, for every dataset."""
    assert (policy.robot.gripper_open, policy.robot.gripper_closed, policy.robot.gripper_index) == (1.0, 0.0, 6)
    with pytest.raises(CheckpointError, match="bridge_orig, fractal"):
        Policy.from_pretrained(str(_folder))
    with pytest.raises(CheckpointError, match=r"unknown unnorm_key 'bridge'.*'bridge_orig'"):
        policy.for_key("bridge")
    first = policy.predict([observe()], ["go"]).chunks[0, 0]
    other = policy.for_key("fractal").predict([observe()], ["go"]).chunks[0, 0]
    assert other[6] == first[6] and (other[:6] != first[:6]).all()
    theirs = RobotSpec(policy.robot.cameras, (), policy.robot.action_names, "ee_delta", 6, -1.0, 1.0, 5.0)
    with pytest.raises(VLAError, match="opens its gripper with 1 and closes it with 0"):
        policy.robot.check_fits(theirs)


def test_statistics_of_a_fine_tuned_checkpoint_replace_those_of_its_base(folder):
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": published.statistics(-2.0, 2.0)}))
    assert Policy.from_pretrained(str(folder)).unnorm_key == "mine"


def exported(network, processor, folder):
    folder.mkdir()
    openvla_export.write(network, processor, folder)
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same_bits(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and tensor.shape == second[key].shape, key
        assert torch.equal(tensor.view(torch.uint8), second[key].view(torch.uint8)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_are_bit_equal(tmp_path, dtype):
    weights = published.weights(dtype=dtype)
    published.save(tmp_path / "published", weights)
    network, processor = checkpoint.load(str(tmp_path / "published"), None)
    first = processor.prefix_ids(INSTRUCTION)
    checkpoint.save(network, processor, tmp_path / "ours")  # through this package's format
    network, processor = checkpoint.load(str(tmp_path / "ours"), None)
    same_bits(exported(network, processor, tmp_path / "out"), weights)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = published.config() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    for name in set(theirs) - {"auto_map", "text_config", "transformers_version"}:
        assert config[name] == theirs[name], name
    assert theirs["text_config"].items() - {("torch_dtype", "bfloat16")} <= config["text_config"].items()
    assert json.loads((tmp_path / "out" / "dataset_statistics.json").read_text()) == published.NORM_STATS
    again, its_processor = checkpoint.load(str(tmp_path / "out"), None)
    same_bits(again.state_dict(), network.state_dict())
    assert its_processor.prefix_ids(INSTRUCTION) == processor.prefix_ids(INSTRUCTION) == first
    meaning = [config.to_dict() for config in (again.config, network.config)]
    assert all(meaning[0][name] == meaning[1][name] for name in FIELDS)


def test_additional_weights_are_folded_on_export(tmp_path, _folder):
    """A trained camera embedding and class position are folded into OpenVLA's weights."""
    policy = Policy.from_pretrained(str(_folder), unnorm_key="fractal")
    with torch.no_grad():
        policy.network.camera_embedding.weight[0] += 0.3
        policy.network.vision_towers[0].embeddings.position_embeddings[:, 0] += 0.2
    before = policy.predict([observe()], ["go"])
    exported(policy.network, policy.processor, tmp_path / "out")
    after = Policy.from_pretrained(str(tmp_path / "out"), unnorm_key="fractal").predict([observe()], ["go"])
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_allclose(before.log_probs, after.log_probs, atol=1e-4)


def test_policies_that_the_layout_cannot_represent_are_rejected(nano, tmp_path):
    with pytest.raises(ConfigError, match=r"OpenVLA's projector; .*one camera; no state; the tokenizer 'openvla'"):
        openvla_export.write(*nano, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exported_statistics_have_the_same_effect_in_openvla(_folder, facts):
    """Constant entries are exported with q01 = q99; all other entries keep their bounds."""
    model = ModelConfig(backbone=str(_folder), cameras=("front",))
    network, _ = build_policy(model, facts)
    stored = openvla_export._their_statistics(network.config, "demo")["action"]
    normalizer = network.config.action_normalizer("demo")
    for value in (-1.0, 0.3, 1.0):
        low, high = np.array(stored["q01"]), np.array(stored["q99"])
        theirs = 0.5 * (value + 1) * (high - low) + low
        np.testing.assert_allclose(normalizer.unnormalize(np.full(7, value)), theirs, atol=1e-6)


def test_fine_tuning_keeps_openvlas_conventions(_folder, facts: DataFacts):
    network, _ = build_policy(ModelConfig(backbone=str(_folder), cameras=("front",)), facts)
    config = network.config
    assert (config.prompt, config.prompt_end, config.image_transform) == ("openvla-verbatim", [29871], "lanczos")
    assert (config.horizon, config.action_tokenizer["name"], config.use_state) == (1, "openvla", False)
    assert config.robot_spec.cameras == ("front",) and list(config.statistics) == ["demo"]
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_an_adapter_of_openvlas_script_is_merged(tmp_path, _folder):
    merged = published.save_adapter(tmp_path / "adapter", _folder)
    (tmp_path / "adapter" / "dataset_statistics.json").write_text(json.dumps({"mine": published.statistics(-2.0, 2.0)}))
    policy = Policy.from_pretrained(str(tmp_path / "adapter"))
    assert policy.unnorm_key == "mine"
    out = exported(policy.network, policy.processor, tmp_path / "out")
    for key, tensor in merged.items():
        torch.testing.assert_close(out[key], tensor, atol=1e-5, rtol=1e-5, msg=key)
    assert policy.predict([observe()], ["go"]).ids[0].tolist() == greedy_ids(merged, "go", image())


def rename(tensors):
    return {f"base_model.model.{key}": value for key, value in tensors.items()}


def drop(name):
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("blocks.1.attn.qkv"), r"4 missing: vision_backbone\.featurizer\.blocks\.1\.attn\.qkv\.bias"),
        (lambda w: w | {"projector.fc4.weight": torch.zeros(2, 2)}, r"1 not part of the model: projector\.fc4\.weight"),
        (rename, r"missing: .*not part of the model: base_model\.model\."),
        (
            lambda w: w | {"language_model.lm_head.weight": torch.zeros(32000, published.WIDTH)},
            r"lm_head\.weight has the shape \[32000, 32\], expected \[32064, 32\]",
        ),
    ],
    ids=["missing", "unexpected", "renamed", "shape"],
)
def test_wrong_weights(tmp_path, change, named):
    published.save(tmp_path, change(published.weights()))
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        Policy.from_pretrained(str(tmp_path), unnorm_key="fractal")


def test_missing_and_truncated_shards(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is truncated"):
        Policy.from_pretrained(str(folder), unnorm_key="fractal")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors, 1 of the 2 files"):
        Policy.from_pretrained(str(folder), unnorm_key="fractal")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Policy.from_pretrained(str(folder), unnorm_key="fractal")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"norm_stats": None}, r"no statistics.*dataset_statistics\.json"),
        ({"norm_stats": {"x": {"action": {"q01": [0.0]}}}}, r"'x' have no action\.q01 and action\.q99"),
        ({"norm_stats": {"x": {"action": {"q01": [0.0], "q99": [1.0, 2.0]}}}}, r"'x' have different lengths"),
        ({"norm_stats": {"x": {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6}}}}, r"'x' have 6 action entries"),
        ({"vision_backbone_id": "siglip-vit-so400m"}, r"vision_backbone_id 'siglip-vit-so400m'"),
        ({"llm_backbone_id": "phi-2-3b"}, r"llm_backbone_id 'phi-2-3b'"),
        ({"text_config": {"model_type": "mistral"}}, r"of type 'mistral'"),
        ({"timm_model_ids": [published.DINO, "vit_huge"]}, r"unknown vision tower 'vit_huge'"),
        ({"text_config": "llama"}, r"does not describe an OpenVLA checkpoint"),
        ({"vla": {"robot": {"cameras": ["front"]}}}, r"needs action_names, state_names"),
        ({"timm_model_ids": [published.SIGLIP, published.DINO]}, r"DINOv2 and SigLIP, in this order"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_architectures_and_missing_statistics(folder, values, named):
    (folder / "config.json").write_text(json.dumps(published.config() | values))
    with pytest.raises(VLAError, match=f"(?s){named}"):
        Policy.from_pretrained(str(folder), unnorm_key="fractal")


def keep(count):
    return lambda tensors: dict(list(tensors.items())[:count])


@pytest.mark.parametrize(
    ("values", "change", "named"),
    [
        ({"use_dora": True}, None, "use_dora: True; only plain LoRA"),
        ({"r": 8}, None, r"expected \[8, \d+\] for its base"),
        (
            {},
            lambda a: {"base_model.model.model.layers.0.q.lora_A.weight": torch.zeros(4, 8)},
            "for another model.*layers",
        ),
        ({}, lambda a: {key: value[:, :-1] for key, value in a.items()}, "for another model.*has the shape"),
        ({}, keep(1), r"incomplete: .*but no .*lora_B\.weight"),
        ({"base_model_name_or_path": "/nowhere/base"}, None, "its base model '/nowhere/base' is not an OpenVLA"),
    ],
    ids=["dora", "rank", "keys", "shapes", "incomplete", "base"],
)
def test_adapters_for_another_base(tmp_path, _folder, values, change, named):
    published.save_adapter(tmp_path, _folder, **values)
    if change:
        save_file(
            {
                key: value.contiguous()
                for key, value in change(load_file(tmp_path / "adapter_model.safetensors")).items()
            },
            tmp_path / "adapter_model.safetensors",
        )
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        Policy.from_pretrained(str(tmp_path), unnorm_key="fractal")
