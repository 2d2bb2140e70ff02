"""Configuration of the jobs that run a policy on a robot (deploy, serve) and of `vla doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from vla.config.data import AdapterConfig
from vla.config.evaluation import GREEDY, DecodingConfig
from vla.config.files import Strict
from vla.config.limits import Count, Dtype, Finite, NonNegative, Port, Positive, Seed, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig(Strict):
    """Limits on commands, and requirements on observations.

    In addition to these limits, commands are clipped to the action range that tokens can encode.

    Attributes:
        max_age_s: maximum age of an observation in seconds; if the last one is older, the robot holds.
        max_frozen_s: hold if a camera repeats the same image for longer than this, in seconds; None: never. Not for
            simulations, because their images do not change at rest.
        max_change: maximum change of an action dimension between two commands, as a fraction of its range; None: no
            limit. Does not apply to grippers.
        max_velocity: action name -> limit, in the unit of this dimension per second.
        max_acceleration: action name -> limit, in the unit of this dimension per second squared.
        workspace: action name -> (name of the state dimension that it moves, minimum, maximum).
        max_entropy: hold while the mean entropy of the chunk's tokens exceeds this value, in nats; None: never. After
            the end of a sequence of variable length, the entropy is 0.
    """

    max_age_s: Positive = 0.5
    max_frozen_s: Positive | None = None
    max_change: Positive | None = None
    max_velocity: dict[str, Positive] = dataclasses.field(default_factory=dict)
    max_acceleration: dict[str, Positive] = dataclasses.field(default_factory=dict)
    workspace: dict[str, tuple[str, Finite, Finite]] = dataclasses.field(default_factory=dict)
    max_entropy: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlConfig(Strict):
    """The real-time control loop.

    Attributes:
        hz: commands per second; None: the robot's control rate.
        transition: how a new chunk replaces the last one: "switch" (replace it), "ensemble" (average overlapping
            chunks), or "prefix" (prefix conditioning: the new chunk continues the actions that are executed while it
            is decoded).
        prefix_threshold: acceptance threshold for "prefix". The action prefix ends before the first token whose
            probability is below this fraction of the most likely token's. 0: keep the whole prefix, even if the images
            contradict it.
        injected_latency_s: latency added to each decoding, in seconds, to simulate a remote policy.
        black_box_s: length of the black box recording (observations, tokens, commands, timings, interventions), in
            seconds. It is written to the result folder after a fault, at most once per this interval. 0: no recording.
    """

    RENAMED: ClassVar = {"seam": "transition", "trust": "prefix_threshold"}
    hz: Positive | None = None
    transition: Literal["switch", "ensemble", "prefix"] = "switch"
    prefix_threshold: Share = 0.5
    injected_latency_s: NonNegative = 0.0
    black_box_s: NonNegative = 30.0
    safety: SafetyConfig = SafetyConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeployConfig(Strict):
    """`vla deploy`: run a policy in real time on a simulated robot, on recorded demonstrations, or on your own robot.

    Attributes:
        policy: the built-in backbone "nano", a run folder, a checkpoint folder, or the address of a `vla serve`
            ("ws://host:8000").
        env: environment id of the simulated robot.
        replay: dataset folder. Replay its episodes in real time instead of simulating a robot, and compare the policy's
            commands with the demonstrated actions.
        robot: your own robot, as "module:callable", instead of a simulated one. The callable returns an object with the
            methods of `vla.control.robot.Robot` (docs/robots.md). Set its task with `--instruction`.
        robot_kwargs: keyword arguments of that callable, e.g. {port: /dev/ttyUSB0}.
        episodes: number of episodes; episode i uses seed + i. None: run until stopped.
        seed: seed of the first episode in a simulation.
        seconds: time limit of an episode.
        out: output folder, for `deploy.json` and the black boxes.
        ui: serve the live page with cameras, instruction, hold and emergency stop.
        host: network address of the live page.
        port: port of the live page; 0: any free port.
        connect_s: timeout for the first connection to a policy server, in seconds.
        n_action_steps: actions executed per chunk; None: the checkpoint's value.
        unnorm_key: dataset whose statistics un-normalise the actions; needed only if the checkpoint has several.
        device: torch device; "auto" chooses one.
        decoding: how action tokens are decoded; greedy by default. For overlapping chunks, see `control.transition`.
        dtype: type of weights and computation. bfloat16 and float16 take half the memory.
    """

    policy: str = "nano"
    env: str = "envs:vla/PickUp-v0"
    replay: Path | None = None
    robot: str | None = None
    robot_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    episodes: Count | None = None
    seed: Seed = 100_000
    seconds: Positive = 30.0
    out: Path = Path("runs/deploy")
    ui: bool = True
    host: str = "127.0.0.1"
    port: Port = 8080
    connect_s: Positive = 30.0
    n_action_steps: Count | None = None
    unnorm_key: str | None = None
    device: str = "auto"
    decoding: DecodingConfig = GREEDY
    dtype: Dtype = "float32"
    control: ControlConfig = ControlConfig()
    adapter: AdapterConfig = AdapterConfig()

    def contradiction(self) -> str | None:
        if self.robot is not None and self.robot.startswith("{"):
            return (
                "--robot must be module:callable. To describe an environment's robot, use "
                f"`--adapter.robot {self.robot}`."
            )
        if self.robot is not None and self.replay is not None:
            return "--robot and --replay cannot be combined: choose the robot or the recorded demonstrations."
        if self.robot is None and self.robot_kwargs:
            return "robot_kwargs are the arguments of `robot`: also set robot, or omit robot_kwargs."
        if self.decoding.ensemble is not None:
            return "decoding.ensemble is not for real-time control: set control.transition to 'ensemble' instead."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeysConfig(Strict):
    """Keys of clients' requests that cannot be inferred. Join the parts of a nested key with "/".

    Attributes:
        images: camera of the policy -> key of its image.
        state: keys of the state; their values are concatenated.
        prompt: key of the instruction.
    """

    images: dict[str, str] = dataclasses.field(default_factory=dict)
    state: tuple[str, ...] = ()
    prompt: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(Strict):
    """`vla serve`: serve a policy with the protocols of OpenVLA (POST /act), openpi (websocket), vla-eval (websocket
    /vla-eval) and plugins.

    If the environment variable VLA_API_KEY is set, clients must send `Authorization: Api-Key <key>`, the same with
    Bearer, or the key as the password of the URL (ws://any:<key>@host:8000).

    Attributes:
        policy: the built-in backbone "nano", a run folder or a checkpoint folder.
        host: network address to listen on. By default, only clients on this machine can connect; "0.0.0.0" accepts
            connections from the network.
        port: port to listen on.
        n_action_steps: actions executed per chunk; None: the checkpoint's value.
        unnorm_key: dataset whose statistics un-normalise the actions; needed only if the checkpoint has several.
        device: torch device; "auto" chooses one.
        dtype: type of weights and computation. bfloat16 and float16 take half the memory.
        decoding: how action tokens are decoded; greedy by default.
        keys: keys of clients' requests that cannot be inferred.
        max_batch: maximum number of requests per batch.
        max_queue: maximum number of waiting requests; further requests are rejected.
        max_request_mb: maximum size of a request, in MB.
        patience_s: timeout for receiving a complete request, in seconds.
        certificate: PEM file; enables TLS together with `private_key`.
        private_key: PEM file.
        tracebacks: send tracebacks to clients, as openpi's own server does. They reveal paths and code.
    """

    policy: str = "nano"
    host: str = "127.0.0.1"
    port: Port = 8000
    unnorm_key: str | None = None
    n_action_steps: Count | None = None
    device: str = "auto"
    dtype: Dtype = "float32"
    decoding: DecodingConfig = GREEDY
    keys: KeysConfig = KeysConfig()
    max_batch: Count = 32
    max_queue: Count = 256
    max_request_mb: Positive = 32.0
    patience_s: Positive = 10.0
    certificate: Path | None = None
    private_key: Path | None = None
    tracebacks: bool = False

    def contradiction(self) -> str | None:
        if (self.certificate is None) != (self.private_key is None):
            return "TLS needs both --certificate and --private-key."
        if self.decoding.ensemble is not None:
            return (
                "decoding.ensemble cannot be used with `vla serve`, because the server does not know when a client's "
                "episode begins. Omit it."
            )
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Strict):
    """`vla export`: write a policy in another format.

    Attributes:
        policy: the built-in backbone "nano", a run folder, or the folder or hub id of a checkpoint of this package or
            OpenVLA. An adapter from OpenVLA's fine-tuning script is merged.
        format: "vla" (this package's checkpoints), "hub" (the same with a complete model card), "openvla" (the layout
            that OpenVLA's code loads), or "onnx" (two graphs for onnxruntime, in float32; needs the extra `onnx`).
        push: repository on the Hugging Face hub, "owner/name", whose contents the new folder replaces. A new repository
            is private. Only for the format "hub".
        out: the new folder.
        unnorm_key: keep only the statistics of this dataset; None: keep all.
        image_transform: how images are resized, as in `vla train`; None: the policy's own.
        overwrite: replace the checkpoint in `out`.
    """

    policy: str = "nano"
    format: Literal["vla", "hub", "openvla", "onnx"] = "vla"
    push: str | None = None
    out: Path = Path("runs/export")
    unnorm_key: str | None = None
    image_transform: str | None = None
    overwrite: bool = False

    def contradiction(self) -> str | None:
        if self.push is not None and self.format != "hub":
            return f"push needs the model card of the format 'hub', got format {self.format!r}."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(Strict):
    """`vla doctor`: find problems of this machine, and print how to fix them.

    Attributes:
        out: folder whose disk is checked for free space.
        json: print the findings as JSON.
    """

    out: Path = Path()
    json: bool = False
