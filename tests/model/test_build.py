"""Building networks: fields of backbones and towers are read, and unsupported ones are rejected before training."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import random_models
from vla.config import ModelConfig
from vla.errors import CheckpointError, ConfigError, VLAError
from vla.model.build import DataFacts, build_policy
from vla.policy import Policy, checkpoint
from vla.transforms.normalize import compute_statistics

pytestmark = pytest.mark.filterwarnings("ignore:vision tower .* has no image_mean")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    random_models.save_llama(folder / "llm")
    random_models.save_siglip(folder / "eyes")
    return folder


@pytest.fixture
def parts(saved, tmp_path):
    """A folder with a language model `llm` and a vision tower `eyes`."""
    shutil.copytree(saved, tmp_path / "parts")
    return tmp_path / "parts"


def compose(parts, facts, **values):
    values = {"backbone": str(parts / "llm"), "vision": (str(parts / "eyes"),), "horizon": 2, "bins": 31} | values
    return build_policy(ModelConfig(**values), facts)


def edit(file, **values):
    """Change fields of a JSON file; None removes a field."""
    stored = (json.loads(file.read_text()) if file.exists() else {}) | values
    file.write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def rewrite(folder, change):
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("llm", lambda w: {f"language_model.{k}": v for k, v in w.items()}, "missing keys"),
        ("llm", lambda w: {k: v for k, v in w.items() if ".layers.1." not in k}, r"missing keys: model\.layers\.1\."),
        (
            "llm",
            lambda w: w | {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)},
            r"unexpected keys: .*up_proj\.bias",
        ),
        ("llm", lambda w: w | {"model.norm.weight": torch.ones(32)}, r"model\.norm\.weight"),
        ("eyes", lambda w: {f"visual.{k}": v for k, v in w.items()}, "missing keys"),
        ("eyes", lambda w: {k: v for k, v in w.items() if "layers.1" not in k}, r"missing keys: .*layers\.1"),
        ("eyes", lambda w: w | {"vision_model.encoder.layers.9.mlp.fc1.bias": torch.zeros(64)}, "unexpected keys"),
    ],
)
def test_wrong_weights(parts, facts, part, change, named):
    rewrite(parts / part, change)
    with pytest.raises(ConfigError, match=f"(?s){part}'.*{named}"):
        compose(parts, facts)


@pytest.mark.parametrize("part", ["llm", "eyes"])
def test_pickled_weights(parts, facts, part):
    torch.save(load_file(parts / part / "model.safetensors"), parts / part / "pytorch_model.bin")
    (parts / part / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="Save them as safetensors"):
        compose(parts, facts)


def test_a_tied_head_is_not_missing(tmp_path, saved, facts):
    shutil.copytree(saved / "eyes", tmp_path / "eyes")
    random_models.save_llama(tmp_path / "llm", tie_word_embeddings=True)
    compose(tmp_path, facts)


PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7], "rescale_factor": 1 / 255}


@pytest.mark.parametrize(
    ("file", "values", "pixel"),
    [
        ("preprocessor_config.json", PROCESSOR, lambda p: (p / 255 - 0.1) / 0.9),
        ("processor_config.json", {"image_processor": PROCESSOR}, lambda p: (p / 255 - 0.1) / 0.9),
        ("preprocessor_config.json", PROCESSOR | {"do_normalize": False}, lambda p: p / 255),
        ("preprocessor_config.json", PROCESSOR | {"rescale_factor": 1 / 127.5}, lambda p: (p / 127.5 - 0.1) / 0.9),
        ("preprocessor_config.json", PROCESSOR | {"do_rescale": False}, lambda p: (p - 0.1) / 0.9),
        ("preprocessor_config.json", PROCESSOR | {"image_mean": 0.4}, lambda p: (p / 255 - 0.4) / 0.9),
        ("processor_config.json", {"tokenizer": {}}, lambda p: (p / 255 - 0.5) / 0.5),
    ],
)
def test_pixels_are_scaled_as_the_tower_was_trained(parts, facts, file, values, pixel):
    edit(parts / "eyes" / file, **values)
    network, _ = compose(parts, facts)
    seen = []
    network.vision_towers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    network.encode_images(torch.full((1, 2, 3, 32, 32), 77, dtype=torch.uint8))
    torch.testing.assert_close(seen[0]["pixel_values"][:, 0], torch.full((2, 32, 32), pixel(77.0)))


def test_the_newer_file_of_an_image_processor_is_used(parts, facts):
    edit(parts / "eyes/preprocessor_config.json", **PROCESSOR)
    edit(parts / "eyes/processor_config.json", image_processor=PROCESSOR | {"image_mean": [0.4, 0.4, 0.4]})
    assert compose(parts, facts)[0].config.image_mean == [[0.4, 0.4, 0.4]]


def test_a_tower_without_statistics_warns(parts, facts):
    with pytest.warns(UserWarning, match=r"using \[0.5, 0.5, 0.5\] and \[0.5, 0.5, 0.5\]"):
        compose(parts, facts)


@pytest.mark.parametrize(
    "values",
    [{"image_mean": [0.5]}, {"image_std": [0, 1, 1]}, {"do_flip_channel_order": True}, {"rescale_offset": True}],
    ids=lambda values: next(iter(values)),
)
def test_unsupported_image_processors(parts, facts, values):
    edit(parts / "eyes/preprocessor_config.json", **(PROCESSOR | values))
    with pytest.raises(ConfigError, match="eyes'"):
        compose(parts, facts)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (transformers.LlavaConfig(), "already has its vision tower"),
        (transformers.Gemma3Config(), "vision-language model"),
        (transformers.Qwen2_5_VLConfig(), "vision-language model"),
        (transformers.CLIPVisionConfig(**SMALL), "not a language model"),
    ],
    ids=["llava", "gemma3", "qwen2.5-vl", "clip"],
)
def test_other_models_as_backbone(parts, facts, config, named):
    config.save_pretrained(parts / "llm")
    with pytest.raises(ConfigError, match=named):
        compose(parts, facts)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (transformers.Siglip2VisionConfig(**SMALL, num_patches=4, patch_size=16), "no fixed image size"),
        (transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2]), "swin"),
        (transformers.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, num_channels=4), "4 channels, not RGB"),
        (transformers.ResNetConfig(), "no patch grid"),
        (transformers.PixtralVisionConfig(**SMALL, image_size=32, patch_size=8), "pixtral"),
    ],
    ids=["naflex", "swin", "four channels", "resnet", "pixtral"],
)
def test_other_models_as_tower(parts, facts, config, named):
    shutil.rmtree(parts / "eyes")
    config.save_pretrained(parts / "eyes")
    with pytest.raises(ConfigError, match=named):
        compose(parts, facts)


@pytest.mark.parametrize("part", ["llm", "eyes"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_parts(parts, facts, part, method):
    edit(parts / part / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=rf"{part}' is quantised \({method}\)"):
        compose(parts, facts)


@pytest.mark.parametrize("part", ["llm", "eyes"])
@pytest.mark.parametrize("text", ['{"model_type": "lla', "[1, 2]", '{"model_type": "nosuch"}', '{"hidden_size": 1}'])
def test_an_invalid_config(parts, facts, part, text):
    (parts / part / "config.json").write_text(text)
    with pytest.raises(VLAError, match=part):
        compose(parts, facts)


def test_a_checkpoint_cannot_choose_the_attention_code(parts, facts):
    """A name with a slash would download and run a kernel."""
    for part in ("llm", "eyes"):
        edit(parts / part / "config.json", attn_implementation="someone/kernel")
    network, _ = compose(parts, facts)
    assert network.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("field", ["return_dict", "output_attentions", "output_hidden_states"])
def test_output_options_in_a_config_are_ignored(parts, facts, observations, field):
    for part in ("llm", "eyes"):
        edit(parts / part / "config.json", **{field: field != "return_dict"})
    network, processor = compose(parts, facts)
    network.eval()(**processor.observe(observations(1), ["reach"]))


def add_token(folder, name, token, row=700):
    """Add a special token to a tokenizer, with an id outside the embedding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), row)])
    tokenizer.add_special_tokens({name: token})
    assert tokenizer.convert_tokens_to_ids(token) >= 640
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["pad_token", "bos_token"])
def test_special_tokens_outside_the_embedding(parts, facts, observations, tmp_path, name):
    add_token(parts / "llm", name, "[NEW]")
    network, processor = compose(parts, facts)
    words = ["pick up the red cube", "reach"]  # of different lengths, so one is padded
    ids = Policy(network, processor).predict(observations(2), words).ids
    checkpoint.save(network, processor, tmp_path / "policy")
    np.testing.assert_array_equal(Policy.from_pretrained(str(tmp_path)).predict(observations(2), words).ids, ids)


def test_a_language_model_reserves_as_many_action_ids_as_there_are_bins(parts, facts, observations, tmp_path):
    network, processor = compose(parts, facts, tokenizer="fast", bins=300)
    assert network.config.n_action_rows == 300 and network.config.action_token_begin == 640 - 300
    words = ["reach", "open"]
    ids = Policy(network, processor).predict(observations(2), words).ids
    checkpoint.save(network, processor, tmp_path / "policy")
    np.testing.assert_array_equal(Policy.from_pretrained(str(tmp_path)).predict(observations(2), words).ids, ids)
    with pytest.raises(ConfigError, match="bins is 300, but 'nano-init' has 256 ids"):
        build_policy(ModelConfig(backbone="nano-init", bins=300), facts)
    with pytest.raises(ConfigError, match="a vocabulary of 640 has no room for 639 action rows"):
        compose(parts, facts, bins=639)


def test_words_outside_the_embedding_are_dropped(parts, facts, observations):
    add_token(parts / "llm", "pad_token", "[NEW]")
    network, processor = compose(parts, facts)
    assert max(processor.prefix_ids("reach <650> now")) < network.config.vocab_size
    network.eval()(**processor.observe(observations(1), ["reach <650> now"]))


def test_a_padding_id_in_the_config_does_not_freeze_an_action_token(parts, facts, observations):
    """The common value -1 would mean the last row, which is an action token."""
    edit(parts / "llm/config.json", pad_token_id=-1)
    network, _ = compose(parts, facts)
    embedding = network.get_input_embeddings()
    embedding(torch.tensor([639])).sum().backward()
    assert embedding.weight.grad[639].abs().sum() > 0


def wide(facts, cameras=2, states=7):
    """The facts of a robot with other numbers of cameras and state entries."""
    names = tuple(f"s{i}" for i in range(states))
    robot = dataclasses.replace(facts.robot, cameras=tuple(f"c{i}" for i in range(cameras)), state_names=names)
    rng, statistics = np.random.default_rng(0), {}
    for key, values in facts.statistics.items():
        statistics[key] = values | {"state": compute_statistics(rng.normal(size=(50, states)))}
    return DataFacts(robot, statistics, facts.actions)


def observe(robot):
    return {
        "pixels": {camera: np.full((40, 40, 3), 9 * i, np.uint8) for i, camera in enumerate(robot.cameras)},
        "agent_pos": np.linspace(-1, 1, robot.state_dim).astype(np.float32),
    }


@pytest.mark.parametrize("cameras, states", [(9, 7), (2, 48), (12, 33)])
def test_new_networks_accept_any_number_of_cameras_and_states(parts, facts, cameras, states, tmp_path):
    data = wide(facts, cameras, states)
    for backbone in ("nano-init", str(parts / "llm")):
        vision = () if backbone == "nano-init" else (str(parts / "eyes"),)
        network, processor = build_policy(ModelConfig(backbone=backbone, vision=vision, horizon=1, bins=31), data)
        chunk = Policy(network, processor).predict_chunk(observe(data.robot), "reach")
        checkpoint.save(network, processor, tmp_path / "policy")
        again = Policy.from_pretrained(str(tmp_path)).predict_chunk(observe(data.robot), "reach")
        np.testing.assert_array_equal(again, chunk)


def test_a_trained_network_reports_its_limits(facts):
    with pytest.raises(ConfigError, match=r"9 cameras.*'nano' supports at most 8.*`cameras`.*nano-init"):
        build_policy(ModelConfig(), wide(facts, cameras=9))
    with pytest.raises(ConfigError, match=r"33 entries; 'nano' supports at most 32.*use_state.*nano-init"):
        build_policy(ModelConfig(), wide(facts, states=33))
    data = wide(facts, states=48)
    network, processor = build_policy(ModelConfig(use_state=False), data)
    Policy(network, processor).predict_chunk(observe(data.robot), "reach")
    build_policy(ModelConfig(cameras=("c1", "c8")), wide(facts, cameras=9))


@pytest.mark.parametrize("what", ["backbone", "vision", "policy"])
def test_a_folder_that_does_not_exist(parts, facts, what, monkeypatch):
    monkeypatch.chdir(parts.parent)
    (parts / "llm-run").mkdir()
    for name, said in (
        ("parts/lmm", "no such folder. Did you mean 'parts/llm'"),
        ("./nope/x", "no such folder"),
        ("someone/model-7b", "hub"),
        ("parts/llm/deeper/still", "no such folder"),
    ):
        with pytest.raises(VLAError, match=name) as refused:
            if what == "policy":
                Policy.from_pretrained(name)
            elif what == "backbone":
                build_policy(ModelConfig(backbone=name), facts)
            else:
                compose(parts, facts, vision=(name,))
        assert said in str(refused.value)


def test_a_misspelt_backbone(facts):
    with pytest.raises(ConfigError, match=r"'nano-inti'\. Did you mean 'nano-init'"):
        build_policy(ModelConfig(backbone="nano-inti"), facts)


def quantiles(facts, tmp_path):
    """A checkpoint in which all settings differ from the defaults."""
    values = {"tokenizer": "quantile", "bins": 31, "normalization": "min_max", "use_state": False, "horizon": 4}
    values |= {"prompt": "openvla", "n_action_steps": 3}
    checkpoint.save(*build_policy(ModelConfig(backbone="nano-init", **values), facts), tmp_path / "first")
    return str(tmp_path / "first")


def test_further_training_keeps_the_settings_of_the_checkpoint(facts, tmp_path):
    first = quantiles(facts, tmp_path)
    before = build_policy(ModelConfig(backbone=first), facts)[0].config
    assert before.action_tokenizer["name"] == "quantile" and before.action_tokenizer["n_bins"] == 31
    assert (before.normalization, before.use_state, before.prompt) == ("min_max", False, "openvla")
    assert (before.horizon, before.n_action_steps) == (4, 3)
    told = {"tokenizer": "uniform", "normalization": "mean_std", "use_state": True, "bins": 63}
    after = build_policy(ModelConfig(backbone=first, **told), facts)[0].config
    assert after.action_tokenizer["name"] == "uniform" and after.action_tokenizer["n_bins"] == 63
    assert (after.normalization, after.use_state, after.prompt) == ("mean_std", True, "openvla")


def test_defaults_of_a_new_network(facts):
    config = build_policy(ModelConfig(backbone="nano-init"), facts)[0].config
    assert (config.action_tokenizer["name"], config.action_tokenizer["n_bins"]) == ("uniform", 255)
    assert (config.normalization, config.use_state, config.prompt) == ("q01_q99", True, "plain")


def test_a_trained_tower_keeps_its_outputs(facts, tmp_path):
    with pytest.raises(ConfigError, match="keypoints 32 does not fit the existing vision tower of 'nano'"):
        build_policy(ModelConfig(keypoints=32), facts)
    values = {"keypoints": 8, "grid": False}
    checkpoint.save(*build_policy(ModelConfig(backbone="nano-init", **values), facts), tmp_path / "first")
    again = build_policy(ModelConfig(backbone=str(tmp_path / "first"), **values), facts)[0].config
    assert [(tower.keypoints, tower.grid) for tower in again.vision_configs] == [(8, False)]
    with pytest.raises(ConfigError, match="grid True does not fit"):
        build_policy(ModelConfig(backbone=str(tmp_path / "first"), grid=True), facts)


def test_openvla_has_256_bins(facts):
    with pytest.raises(ConfigError, match="'openvla' has 256 bins, not 63"):
        build_policy(ModelConfig(backbone="nano-init", tokenizer="openvla", bins=63), facts)
    for bins in (None, 256):
        for backbone in ("nano-init", "nano"):
            config = build_policy(ModelConfig(backbone=backbone, tokenizer="openvla", bins=bins), facts)[0].config
            assert config.action_tokenizer["n_bins"] == 256


def test_training_from_incomplete_weights_is_rejected(facts, tmp_path):
    first = quantiles(facts, tmp_path)
    rewrite(tmp_path / "first", lambda w: {k: v for k, v in w.items() if "state_projector" not in k})
    with pytest.raises(CheckpointError, match=r"missing keys: state_projector"):
        build_policy(ModelConfig(backbone=first), facts)
