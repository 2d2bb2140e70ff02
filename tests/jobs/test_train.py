"""Training through the command line: learning, exact resumption after a kill, and export."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.decoders import greedy, reference
from vla import config
from vla.config import LoraConfig, ModelConfig, TrainConfig
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples
from vla.errors import ConfigError, DataError, TrainingError
from vla.jobs.train import _facts, _prepare, _validation, pretrain, seconds_per_step, train
from vla.model import lora
from vla.model.build import build_policy
from vla.model.configuration import VLAConfig
from vla.model.processing import VLAProcessor
from vla.policy import Policy, checkpoint
from vla.support.run_folder import read_lines
from vla.training import trainer

SMALL = {
    "steps": 12,
    "batch_size": 4,
    "save_every": 2,
    "log_every": 1,
    "eval_every": 6,
    "val_fraction": 0.2,
    "warmup_steps": 2,
    "precision": "float32",
    "model": {"backbone": "tiny-init", "image_size": 24, "horizon": 4, "n_action_steps": 2, "bins": 31},
}

QUICK = {"steps": 3, "save_every": 100, "val_fraction": 0.0}


@pytest.fixture(scope="module")
def demos(robot, dataset) -> Path:
    return dataset("squares", robot)


def small(**changes) -> TrainConfig:
    values = SMALL | {key: value for key, value in changes.items() if key != "model"}
    values["model"] = SMALL["model"] | changes.get("model", {})
    return config.from_dict(TrainConfig, json.loads(json.dumps(values, default=str)))


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_lines(run / trainer.METRICS) if "loss" in row}


def learned(run: Path) -> list[float]:
    """Loss and gradient norm at each step."""
    rows = [row for row in read_lines(run / trainer.METRICS) if "loss" in row]
    return [row[name] for row in rows for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def unbroken(demos, tmp_path_factory) -> Path:
    return pretrain(small(data=[demos], out=tmp_path_factory.mktemp("run") / "unbroken"))


def test_contents_of_a_run_folder(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "policy", "checkpoint-12"} <= names
    rows = read_lines(unbroken / trainer.METRICS)
    assert sorted(losses(unbroken)) == list(range(1, 13))
    evals = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evals] == [6, 12]
    assert {"eval_token_accuracy", "eval_l1/dx", "eval_l1/gripper"} <= set(evals[0])
    assert config.load(TrainConfig, unbroken / "config.yaml").steps == 12


def test_four_samples_are_overfitted(dataset, robot, tmp_path):
    demos = dataset("one", robot, episodes=1, length=4)
    values = {"steps": 60, "batch_size": 4, "learning_rate": 2e-3, "val_fraction": 0.0, "save_every": 100}
    still = {"shift": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    run = pretrain(small(data=[demos], out=tmp_path / "run", augment=still, model={"backbone": "nano-init"}, **values))
    assert losses(run)[60] < 0.3 < 3 < losses(run)[1]
    data, policy = Demonstrations(demos), Policy.from_pretrained(str(run))
    frames = {camera: list(data.frames(0, camera)) for camera in robot.cameras}
    observation = {"pixels": {camera: images[0] for camera, images in frames.items()}, "agent_pos": data.states[0]}
    chunk = policy.predict_chunk(observation, data.episodes[0].instruction)
    np.testing.assert_allclose(chunk, data.actions[:4], atol=0.1)


def test_gradient_accumulation_equals_a_large_batch(demos, tmp_path):
    together, apart = (
        pretrain(small(data=[demos], out=tmp_path / str(size), batch_size=size, grad_accum=8 // size, **QUICK))
        for size in (8, 4)
    )
    assert learned(apart) == pytest.approx(learned(together), rel=1e-5)


def test_images_from_videos_give_the_losses_of_cached_images(demos, tmp_path, capsys):
    both = {}
    for frames, workers in (("cache", 0), ("video", 1)):
        cfg = small(data=[demos], out=tmp_path / frames, frames=frames, workers=workers, **QUICK | {"steps": 1})
        both[frames] = learned(pretrain(cfg))
        said = capsys.readouterr().out
        assert ("decoded from the videos when they are drawn, by 1 process" in said) == (frames == "video")
    assert both["video"] == both["cache"]


def test_bfloat16_learns_like_float32(demos, tmp_path):
    precise, fast = (
        pretrain(small(data=[demos], out=tmp_path / name, precision=name, **QUICK)) for name in ("float32", "bf16")
    )
    assert losses(fast) == pytest.approx(losses(precise), rel=0.05) and losses(fast) != losses(precise)


def test_exported_policy_runs(unbroken, observations):
    policy = Policy.from_pretrained(str(unbroken))
    assert policy.robot.control_hz == 20 and policy.n_action_steps == 2
    chunk = policy.predict_chunk(observations(1)[0], "go to square 1")
    assert chunk.shape == (4, 7) and np.isfinite(chunk).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_at_random_moments_it_resumes_to_the_same_losses(demos, tmp_path, start_vla, method):
    """`kill -9` at random times, VLA_TEST_KILLS times. The losses equal those of an uninterrupted run."""
    kills = int(os.environ.get("VLA_TEST_KILLS", "2"))
    for name in ("unbroken", "run"):
        # Long enough to be still running at the last kill.
        cfg = small(
            data=[demos],
            out=tmp_path / name,
            method=method,
            batch_size=1,
            steps=40 * kills,
            save_every=4,
            eval_every=100,
        )
        config.dump(cfg, tmp_path / f"{name}.yaml")
    run, rng, killed = tmp_path / "run", random.Random(0), 0

    unbroken = start_vla("train", "--config", tmp_path / "unbroken.yaml")
    for attempt in range(kills + 1):
        resumes = trainer.last_checkpoint(run) is not None  # there is no checkpoint if the kill came earlier
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        process = start_vla("train", "--config", tmp_path / "run.yaml", *resume)
        if attempt < kills:
            before = max(losses(run), default=0)
            while max(losses(run), default=0) <= before and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for folder in run.glob("checkpoint-*"):  # at any time, a checkpoint with its final name is complete
            assert (folder / "trainer_state.json").exists() and (folder / "optimizer.pt").exists()
        if process.returncode == 0:
            break
    assert process.returncode == 0, err[-2000:]
    assert killed == kills
    assert resumes == bool(re.search(r"^resuming at step \d+ of \d+$", out, re.M))
    assert unbroken.wait() == 0, unbroken.communicate()[1][-2000:]
    assert losses(run) == losses(tmp_path / "unbroken")


@pytest.mark.parametrize(("log_every", "last"), [(1, 11), (100, 12)], ids=["soon", "not before the end"])
def test_a_loss_of_nan_ends_training(demos, tmp_path, log_every, last):
    values = {"learning_rate": 1e30, "log_every": log_every, "eval_every": 100, "save_every": 100}
    with pytest.raises(TrainingError, match=r"the loss is nan at step (\d+): .*--learning-rate") as error:
        pretrain(small(data=[demos], out=tmp_path / "run", **values))
    assert int(re.search(r"step (\d+)", str(error.value))[1]) <= last
    assert not (tmp_path / "run" / "policy").exists()


def test_an_interrupt_saves_a_checkpoint_and_prints_how_to_resume(demos, tmp_path, start_vla):
    config.dump(small(data=[demos], out=tmp_path / "run", steps=500, save_every=400), tmp_path / "job.yaml")
    process = start_vla("pretrain", "--config", tmp_path / "job.yaml")
    while len(losses(tmp_path / "run")) < 3 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in err
    assert trainer.last_checkpoint(tmp_path / "run") is not None


def test_lora_trains_few_parameters_and_merges_without_changing_tokens(demos, unbroken, observations, tmp_path):
    cfg = small(
        data=[demos],
        out=tmp_path / "run",
        model={"backbone": str(unbroken)},
        lora={"train_vision": True},
        learning_rate=0.01,
    )
    run = train(cfg)
    base, processor = checkpoint.load(str(unbroken))
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    trainable = lora.attach(checkpoint.load(str(unbroken))[0], LoraConfig()).parameters()
    trained = sum(p.numel() for p in trainable if p.requires_grad)
    assert trained < 0.35 * sum(p.numel() for p in base.parameters())
    batch = processor.observe(observations(16), ["go to square 1"] * 16)
    unmerged = greedy(adapted.get_base_model(), batch)
    merged, _ = checkpoint.load(str(run))
    assert torch.equal(greedy(merged, batch), unmerged)
    before, after = checkpoint.load(str(unbroken))[0].state_dict(), merged.state_dict()
    for name in ("language_model.model.layers.0.self_attn.q_proj.weight", "vision_towers.0.merge.weight"):
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("tied", [True, False])
def test_lora_of_a_composed_backbone_merges_exactly(demos, tmp_path, observations, tied):
    """Two towers, and a head that was tied to the embedding: the export contains the trained weights."""
    from tests import random_models

    random_models.save_llama(tmp_path / "llama", tie_word_embeddings=tied)
    random_models.save_siglip(tmp_path / "siglip")
    random_models.save_dinov2(tmp_path / "dino")
    vision = [str(tmp_path / "dino"), str(tmp_path / "siglip")]
    model = {"backbone": str(tmp_path / "llama"), "vision": vision, "image_size": None}
    values = {"steps": 4, "lora": {"train_vision": True}, "learning_rate": 0.01}
    cfg = small(data=[demos], out=tmp_path / "run", model=model, **values)
    run = train(cfg)
    merged, processor = checkpoint.load(str(run))
    facts, _ = _facts(cfg, [Demonstrations(demos)])
    torch.manual_seed(0)
    base, _ = build_policy(cfg.model, facts)
    # The random weights outside the adapter are taken from the run.
    parts = {key: value for key, value in merged.state_dict().items() if "language_model" not in key}
    base.load_state_dict(parts, strict=False)
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    batch = processor.observe(observations(4), ["go to square 1"] * 4)
    assert torch.equal(greedy(adapted.get_base_model(), batch), greedy(merged, batch))
    assert torch.equal(greedy(merged, batch), reference(merged, batch))
    before, begin = (
        random_models.save_llama(tmp_path / "again", tie_word_embeddings=tied),
        merged.config.action_token_begin,
    )
    head = merged.language_model.lm_head.weight
    assert not torch.allclose(head[begin : begin + 31], before.lm_head.weight[begin : begin + 31])
    assert torch.equal(head[:100], before.lm_head.weight[:100])


def test_mixture_needs_one_robot_and_distinct_names(robot, dataset, tmp_path):
    import dataclasses as dc

    other = dataset("other", dc.replace(robot, gripper_open=-1.0, gripper_closed=1.0), episodes=2)
    same = dataset("other", robot, episodes=2)
    with pytest.raises(DataError, match=r"gripper_open 1\.0 and -1\.0"):
        pretrain(small(data=[same, other], unnorm_keys=["a", "b"], out=tmp_path / "x"))
    with pytest.raises(ConfigError, match="one name for each of the 2 datasets"):
        pretrain(small(data=[same, same], out=tmp_path / "x"))
    run = pretrain(small(data=[same, same], unnorm_keys=["a", "b"], weights=[1, 3], out=tmp_path / "run", steps=2))
    assert sorted(checkpoint.load(str(run))[0].config.statistics) == ["a", "b"]


def test_any_llama_with_any_siglip(demos, tmp_path, observations, run_vla):
    """Small random checkpoints replace models from the hub: they are trained, saved, reloaded and rolled out."""
    from tests.random_models import save_llama, save_siglip

    save_llama(tmp_path / "llama")
    save_siglip(tmp_path / "siglip")
    command = ["train", "--backbone", tmp_path / "llama", "--vision", tmp_path / "siglip", "--data", demos]
    command += ["--out", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--horizon", 2, "--n-action-steps", 2]
    result = run_vla(*command, "--rank", 4, "--alpha", 4)
    assert result.returncode == 0, result.stderr[-2000:]
    policy = Policy.from_pretrained(str(tmp_path / "run"))
    assert policy.network.config.layout == "image_first"
    assert policy.predict_chunk(observations(1)[0], "go to square 1").shape == (2, 7)
    command = ["rollout", "--policy", tmp_path / "run", "--env", "vla/Reach-v0", "--out", tmp_path / "rollout"]
    result = run_vla(*command, "--episodes", 2, "--n-envs", 2, "--videos", 0, "--max-steps", 8)
    assert result.returncode == 0, result.stderr[-2000:]
    episodes = json.loads((tmp_path / "rollout" / "eval_info.json").read_text())["per_episode"]
    assert [episode["fault"] for episode in episodes] == [None, None] and episodes[0]["length"] > 1


@pytest.mark.parametrize("family", ["siglip", "dinov2", "clip"])
def test_vision_towers_keep_their_weights(facts, tmp_path, family):
    from tests import random_models

    tower = getattr(random_models, f"save_{family}")(tmp_path / family)
    random_models.save_llama(tmp_path / "llama")
    model = ModelConfig(backbone=str(tmp_path / "llama"), vision=(str(tmp_path / family),), horizon=2, n_action_steps=2)
    network, _ = build_policy(model, facts)
    ours = network.vision_towers[0].state_dict()
    theirs = {key.removeprefix("vision_model."): value for key, value in tower.state_dict().items()}
    compared = 0
    for key, value in ours.items():
        key = key.removeprefix("vision_model.")
        if key in theirs:
            assert torch.equal(value, theirs[key]), key
            compared += 1
    assert compared > 10
    pixels = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)
    assert network.encode_images(pixels).shape == (1, 2 * network.tokens_per_image, 64)


def test_two_towers_are_fused(facts, tmp_path):
    from tests import random_models

    random_models.save_siglip(tmp_path / "siglip")
    random_models.save_dinov2(tmp_path / "dino")
    random_models.save_llama(tmp_path / "llama")
    vision = (str(tmp_path / "dino"), str(tmp_path / "siglip"))
    model = ModelConfig(
        backbone=str(tmp_path / "llama"), vision=vision, horizon=2, n_action_steps=2, tokenizer="openvla"
    )
    network, _ = build_policy(model, facts)
    assert network.projector[0].in_features == 64 and len(network.projector) == 5
    assert network.config.image_mean[0] != network.config.image_mean[1]


def test_closed_loop_evaluation_during_training(tmp_path):
    from vla.config import CollectConfig
    from vla.jobs.collect import collect

    demos = collect(CollectConfig(env=("vla/Reach-v0",), out=tmp_path / "demos", episodes=2, workers=1))
    cfg = small(data=[demos], out=tmp_path / "run", steps=3, rollout_every=2, rollout_episodes=1)
    run = pretrain(config.from_dict(TrainConfig, config.to_dict(cfg) | {"rollout_env": ["vla/Reach-v0"]}))
    info = json.loads((run / "rollout-2" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 1
    assert sorted(losses(run)) == [1, 2, 3]


def test_a_closed_loop_evaluation_that_fails_does_not_end_training(tmp_path, capsys):
    from vla.config import AdapterConfig, CollectConfig
    from vla.jobs.collect import collect

    world = AdapterConfig(module="tests.rollout_env", expert="random", kwargs={"raise_on": 100_000})
    env = ("toy/Slide-v0",)
    demos = collect(CollectConfig(env=env, out=tmp_path / "demos", episodes=2, keep="all", workers=1, adapter=world))
    cfg = small(data=[demos], out=tmp_path / "run", steps=3, save_every=2, rollout_every=2, rollout_episodes=1)
    run = pretrain(dataclasses.replace(cfg, rollout_env=env, adapter=world))
    assert "step 2: the closed-loop evaluation failed: every episode ended" in capsys.readouterr().err
    assert sorted(losses(run)) == [1, 2, 3] and (run / "checkpoint-2").is_dir() and (run / "policy").is_dir()


def test_validation_uses_all_datasets():
    first, second = range(500), range(1000, 1500)
    chosen = np.array(_validation([first, second], [np.arange(500), np.arange(500)]))
    assert len(set(chosen)) == 512 and (chosen < 500).sum() == 256
    assert {0, 499, 1000, 1499} <= set(chosen)
    assert _validation([first], [np.arange(3)]) == [0, 1, 2] and _validation([first], [np.arange(0)]) == []


def test_two_cameras_fourteen_actions_no_state(dataset, tmp_path):
    from vla.spec import RobotSpec

    names = tuple(f"joint_{i}" for i in range(14))
    root = dataset("bimanual", RobotSpec(("left", "right"), (), names, control_hz=50), episodes=3)
    run = pretrain(small(data=[root], out=tmp_path / "run", steps=2))
    _, processor = checkpoint.load(str(run))
    assert processor.robot.action_dim == 14 and processor.robot.state_dim == 0
    assert processor.action_tokenizer.max_tokens == 4 * 14


@given(
    st.lists(st.integers(0, 44), min_size=1, max_size=3),
    st.permutations(["front", "wrist"]),
    st.integers(1, 2),
    st.sampled_from([24, 48, 72]),
    st.sampled_from([None, 60]),
)
@settings(max_examples=20)
def test_training_prefix_equals_serving_prefix(demos, unbroken, frames, cameras, count, size, pad_to):
    """The prompts of a training batch equal, bit for bit, those built for serving from the same frames: with other
    image sizes, one or two cameras, with and without padding."""
    config = VLAConfig.from_pretrained(unbroken / "policy")
    config.image_size = config.vision_configs[0].image_size = size
    config.robot = config.robot | {"cameras": cameras[:count]}
    processor = VLAProcessor(config, AutoTokenizer.from_pretrained(unbroken / "policy"))
    data = Demonstrations(demos)
    source = ChunkSamples(data, processor.robot.cameras, size, config.horizon, 0)
    samples = [source[frame] for frame in frames]
    trained = trainer.Collator(processor, list(config.statistics), pad_to)(samples)
    video = {camera: [image for e in range(5) for image in data.frames(e, camera)] for camera in cameras}
    observations = [
        {"pixels": {camera: video[camera][frame] for camera in cameras}, "agent_pos": data.states[frame]}
        for frame in frames
    ]
    served = processor.observe(observations, [sample.instruction for sample in samples])
    length = served["input_ids"].shape[1]
    prefix = trained["input_ids"].shape[1] - trained["labels"].shape[1]
    assert prefix == (pad_to or length)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(trained[name][:, prefix - length : prefix], served[name])
    assert not trained["attention_mask"][:, : prefix - length].any()
    assert torch.equal(trained["pixel_values"], served["pixel_values"])
    assert torch.equal(trained["state"], served["state"])


def test_a_dry_run_takes_two_steps_and_writes_nothing(demos, tmp_path, capsys, monkeypatch):
    steps, precisions = [], set()
    build, step = build_policy, torch.optim.AdamW.step

    def watched(*arguments):
        network, processor = build(*arguments)
        network.language_model.model.register_forward_pre_hook(
            lambda *_: precisions.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        )
        return network, processor

    def counted(self, *arguments, **keywords):
        result = step(self, *arguments, **keywords)
        steps.append(len(self.state))  # Adam's state exists after the first step
        return result

    monkeypatch.setattr("vla.jobs.train.build_policy", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    cfg = small(data=[demos], out=tmp_path / "run", dry_run=True, precision="bf16", grad_accum=2, batch_size=1)
    pretrain(cfg)
    assert precisions == {torch.bfloat16} and len(steps) == 2 and steps[0] > 10
    said = capsys.readouterr().out
    assert "a uniform guess among 31 action tokens has 3.434" in said and "no problems found" in said
    assert re.search(r"peak memory of this process \d\.\d\d GiB", said)
    assert seconds_per_step(cfg, steps=2) > 0 and len(steps) == 5 and precisions == {torch.bfloat16}
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_no_files(demos, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no such device")

    monkeypatch.setattr(trainer.VLATrainer, "get_train_dataloader", broken)
    with pytest.raises(RuntimeError, match="no such device"):
        pretrain(small(data=[demos], out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_state_with_another_name_is_reported(demos, tmp_path, capsys):
    root = shutil.copytree(demos, tmp_path / "renamed")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.joints"] = info["features"].pop("observation.state")
    (root / "meta/info.json").write_text(json.dumps(info | {"robot": None}))
    pretrain(small(data=[root], out=tmp_path / "run", dry_run=True))
    said = " ".join(capsys.readouterr().out.split())
    assert "none: the data has no observation.state" in said and "Rename or join these features" in said
    assert "observation.joints" in said
    pretrain(small(data=[root], out=tmp_path / "run", dry_run=True, model={"use_state": False}))
    assert "observation.joints" not in capsys.readouterr().out


def test_invalid_arguments_are_rejected_before_writing(demos, unbroken, tmp_path):
    with pytest.raises(ConfigError, match="Continue it with --resume"):
        pretrain(small(data=[demos], out=unbroken))
    with pytest.raises(ConfigError, match=r"other settings: learning_rate = .*, not 0\.5"):
        pretrain(small(data=[demos], out=unbroken, resume=True, learning_rate=0.5))
    with pytest.raises(ConfigError, match="contains no training run"):
        pretrain(small(data=[demos], out=tmp_path / "none", resume=True))
    with pytest.raises(ConfigError, match="Did you mean 'front'"):
        pretrain(small(data=[demos], out=tmp_path / "x", model={"cameras": ["fornt"]}))
    with pytest.raises(ConfigError, match="unknown backbone 'nowhere"):
        train(small(data=[demos], out=tmp_path / "x", model={"backbone": "nowhere", "vision": ["nowhere"]}))
    with pytest.raises(ConfigError, match="no module named w_proj"):
        bad = small(data=[demos], out=tmp_path / "x", method="lora", lora={"targets": ["w_proj"]})
        train(bad)
    with pytest.raises(ConfigError, match=r"state_mask.*this policy does not use the state"):
        train(small(data=[demos], out=tmp_path / "x", augment={"state_mask": 0.5}, model={"use_state": False}))
    for frozen in ({"method": "lora"}, {"method": "full", "model": {"freeze_vision": True}}):
        with pytest.raises(ConfigError, match=r"word_order has no effect, because the vision tower is not trained"):
            model = {"backbone": "nano-init", "word_order": True} | frozen.pop("model", {})
            train(small(data=[demos], out=tmp_path / "x", model=model, **frozen))
    with pytest.raises(ConfigError, match=r"order_dropout has no effect without word_order"):
        train(small(data=[demos], out=tmp_path / "x", augment={"order_dropout": 0.5}))
    with pytest.raises(ConfigError, match=r"label_sigma needs a tokenizer .* not 'fast'"):
        train(small(data=[demos], out=tmp_path / "x", label_sigma=2, model={"tokenizer": "fast", "bins": None}))
    for name, value in {"steps": 0, "batch_size": 0, "log_every": 0, "rollout_every": 5}.items():
        with pytest.raises(ConfigError, match=name):
            train(small(data=[demos], out=tmp_path / "x", **{name: value}))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_memory_only(demos, unbroken, tmp_path, method):
    model = {"backbone": str(unbroken)} if method == "lora" else {}
    runs = {}
    for checkpointing in (False, True):
        cfg = small(
            data=[demos],
            out=tmp_path / f"run-{checkpointing}",
            method=method,
            model=model,
            gradient_checkpointing=checkpointing,
            **QUICK,
        )
        job, _ = _prepare(cfg, quiet=True)
        passes = []
        network = job.model.get_base_model() if method == "lora" else job.model
        layer = network.language_model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        job.train()
        runs[checkpointing] = (len(passes), learned(cfg.out))
    assert runs[True][0] == 2 * runs[False][0] == 2 * QUICK["steps"]
    assert runs[True][1] == pytest.approx(runs[False][1], rel=1e-6)
