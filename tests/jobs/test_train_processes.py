"""Training with several processes: data parallelism, sharding, and resuming with another number of processes."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from tests.forked import Process
from tests.jobs.test_train import demos as demos  # a fixture
from tests.jobs.test_train import learned, losses, small
from vla import config
from vla.config import TrainConfig
from vla.errors import ConfigError
from vla.jobs.train import _prepare, train
from vla.policy import Policy
from vla.training import processes, trainer

ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.fixture
def start_two(tmp_path, start_vla):
    """`start_two(config, file)`: two processes that train together, as started by `accelerate launch --config_file
    file`."""

    def start(cfg: TrainConfig, file: str = "ddp.yaml") -> list[Process]:
        config.dump(cfg, tmp_path / "job.yaml")
        flags = ["--config_file", str(ACCELERATE / file), "-m", "vla.cli"]
        launch, *_ = _validate_launch_command(launch_command_parser().parse_args(flags))
        assert launch.num_processes == 2
        shared = {name: value for name, value in prepare_multi_gpu_env(launch).items() if name not in os.environ}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = ["-c", "from tests.sharded import main; main()"] if launch.use_fsdp else []
        command += ["train", "--config", tmp_path / "job.yaml"]
        return [start_vla(*command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]

    return start


@pytest.fixture
def finish_two(start_two):
    """`finish_two(config, file)`: the output of two processes that trained successfully."""

    def finish(cfg: TrainConfig, file: str = "ddp.yaml") -> str:
        both = start_two(cfg, file)
        said = [process.communicate() for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        return said[0][0] + said[1][0]

    return finish


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "model.safetensors")


def assert_close(run: Path, expected: Path) -> None:
    assert learned(run) == pytest.approx(learned(expected), rel=1e-4)
    torch.testing.assert_close(parameters(run), parameters(expected), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def six(demos):
    """Settings of a run of six steps."""
    return {"steps": 6, "data": [demos], "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def single(six, tmp_path_factory) -> Path:
    """A run of one process with the batch of two."""
    return train(small(out=tmp_path_factory.mktemp("single") / "run", batch_size=8, method="full", **six))


def test_two_processes_equal_one_with_twice_the_batch(tmp_path, finish_two, single, six):
    """Data parallelism: both draw the same samples together, so the losses are equal."""
    double = tmp_path / "double"
    said = finish_two(small(out=double, batch_size=4, method="full", **six))
    assert_close(double, single)
    assert Policy.from_pretrained(str(double)).horizon == 4
    # Only one of them prints.
    for line in (r"^step 6 of 6: loss \d", rf"^policy: +{double}/policy$", rf"^next: +vla rollout --policy {double}"):
        assert len(re.findall(line, said, re.M)) == 1, said


def test_the_command_in_the_readme_starts_two_processes(demos, tmp_path):
    """With --help, so that they do not train; the test above trains with two processes."""
    config.dump(small(data=[demos], out="run"), tmp_path / "my.yaml")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    line = re.search(r"^accelerate launch (-m vla\.cli train --config my\.yaml)", readme, re.M)
    # On CPUs, accelerate starts several processes only with the flag for GPUs.
    two = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *two.split()]
    launch += ["--dynamo_backend", "no", *line[1].split(), "--help"]
    result = subprocess.run(launch, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("usage: vla train ") == 2, result


def test_the_data_parallel_wrapper_is_freed_before_its_process_group(demos, tmp_path, monkeypatch):
    """If it is the last reference to a gloo group, torch may wait forever for the group's threads."""
    job, _ = _prepare(small(data=[demos], out=tmp_path / "run", dry_run=True), quiet=True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    job.accelerator._models.append(DistributedDataParallel(job.model))
    job.model_wrapped = job.accelerator._models[-1]
    wrapper, alive = weakref.ref(job.model_wrapped), []
    monkeypatch.setattr(job.accelerator, "end_training", lambda: alive.append(wrapper()))
    try:
        processes.leave(job)
    finally:
        torch.distributed.destroy_process_group()
    assert alive == [None]


def test_a_signal_to_one_process_stops_all_and_nothing_is_finished(demos, tmp_path, start_two):
    both = start_two(small(data=[demos], out=tmp_path / "run", method="full", steps=500, save_every=400))
    while len(losses(tmp_path / "run")) < 3 and both[0].poll() is None:
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [130, 143], said
    assert "--resume" in said[0]
    assert trainer.last_checkpoint(tmp_path / "run") is not None and not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sharded_network_learns_the_same(tmp_path, finish_two, single, six, method):
    """FSDP2: each process has half of every layer; the export has all of it."""
    model = {"backbone": str(single)} if method == "lora" else {}
    values = {"method": method, "model": model, **six}
    expected = train(small(out=tmp_path / "expected", batch_size=8, **values))
    finish_two(small(out=tmp_path / "run", batch_size=4, **values), "fsdp2.yaml")
    assert_close(tmp_path / "run", expected)


def test_a_sharded_run_is_resumed(tmp_path, finish_two, single, six):
    run = tmp_path / "run"
    cfg = small(out=run, batch_size=4, method="full", **six)
    finish_two(cfg, "fsdp2.yaml")
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "policy")
    finish_two(dataclasses.replace(cfg, resume=True), "fsdp2.yaml")
    assert_close(run, single)
    shutil.rmtree(run / "checkpoint-6")
    with pytest.raises(ConfigError, match=r"without sharding .*saved with it. Use the `accelerate launch"):
        train(dataclasses.replace(cfg, resume=True, batch_size=8))


def test_a_run_of_two_processes_is_resumed_by_one(tmp_path, finish_two, single, six):
    run = tmp_path / "run"
    cfg = small(out=run, batch_size=4, method="full", **six)
    finish_two(cfg)
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "policy")
    with pytest.raises(ConfigError, match="started with 8 samples per step, but batch_size 4 x grad_accum 1 x 1"):
        train(dataclasses.replace(cfg, resume=True))
    train(dataclasses.replace(cfg, resume=True, grad_accum=2))
    assert_close(run, single)


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (2, {"rollout_every": 2, "rollout_env": ["vla/Reach-v0"]}, r"Set rollout_every to 0\."),
        (1, {}, r"Set fsdp_version: 2, as in configs/accelerate/fsdp2\.yaml\."),
    ],
    ids=["closed-loop evaluation", "FSDP 1"],
)
def test_what_sharding_does_not_support_is_refused(tmp_path, version, changes, message):
    job = SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(is_fsdp2=version == 2))
    with pytest.raises(ConfigError, match=message):
        processes.check_sharding(job, small(data=[tmp_path], **changes), None)
