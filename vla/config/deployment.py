"""Jobs that let a policy control something: the controller node, the server, and what is wrong with a machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from vla.config.data import AdapterConfig
from vla.config.evaluation import GREEDY, DecodingConfig
from vla.config.files import STRICT
from vla.config.limits import Count, Finite, NonNegative, Port, Positive, Seed, Share


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
    """Limits of a command, beside its range (that of the policy's training data), and of what it may be based on.

    Attributes:
        max_age_s: the robot holds when its last observation is older.
        max_frozen_s: the robot holds when a camera has shown the very same picture for longer; None: never. Real
            cameras are noisy and never do; a simulated world at rest does.
        max_change: largest change of an entry between two commands, as a share of its range; None: any. Grippers are
            exempt.
        max_velocity, max_acceleration: by action entry, in its unit per second and per second squared.
        workspace: action entry -> (the state entry that it moves, lowest, highest).
        max_entropy: the robot holds while the mean entropy of the chunk's tokens, in nats, is higher; None: never.
    """

    __pydantic_config__ = STRICT
    max_age_s: Positive = 0.5
    max_frozen_s: Positive | None = None
    max_change: Positive | None = None
    max_velocity: dict[str, Positive] = dataclasses.field(default_factory=dict)
    max_acceleration: dict[str, Positive] = dataclasses.field(default_factory=dict)
    workspace: dict[str, tuple[str, Finite, Finite]] = dataclasses.field(default_factory=dict)
    max_entropy: Positive | None = None


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """The real-time control loop.

    Attributes:
        hz: commands per second; None: the robot's own rate.
        seam: how a chunk takes over from the last one: "switch" (hard), "ensemble" (chunks that overlap are averaged),
            or "committed" (it continues the actions that are executed while it is decoded).
        trust: committed actions are continued as long as the policy itself gives their tokens at least this share of
            its best token's probability; 0: always, even where the pictures say that the plan is wrong.
        injected_latency_s: every decoding is made to take so much longer, to try a policy that is far away.
        black_box_s: so many last seconds (observations, tokens, commands, timings, reasons) are kept, and written to
            the result folder after a fault, at most once in as many seconds and at the end; 0: none.
    """

    __pydantic_config__ = STRICT
    hz: Positive | None = None
    seam: Literal["switch", "ensemble", "committed"] = "switch"
    trust: Share = 0.5
    injected_latency_s: NonNegative = 0.0
    black_box_s: NonNegative = 30.0
    safety: SafetyConfig = SafetyConfig()


@dataclasses.dataclass(frozen=True)
class DeployConfig:
    """`vla deploy`: run a policy in real time on a simulated robot, on recorded demonstrations, or on your own robot.

    Attributes:
        policy: the embedded backbone "nano", a run folder, a checkpoint folder, or the address of a `vla serve`
            ("ws://host:8000").
        env: environment id of the simulated robot.
        replay: a dataset folder: its episodes are played in real time instead, and the policy's commands are compared
            with the demonstrated actions.
        robot: your own robot instead, as "module:callable"; the callable returns an object with the methods of
            `vla.control.robot.Robot` (docs/robots.md). Its task is `--instruction`.
        robot_kwargs: keyword arguments of that callable, e.g. {port: /dev/ttyUSB0}.
        episodes: number of episodes, one after the other; episode i uses seed + i. None: until stopped.
        seconds: time limit of an episode.
        out: folder of `deploy.json` and of the black boxes.
        ui: serve the live page: cameras, instruction, hold and emergency stop.
        host, port: address of the live page; port 0 takes a free one.
        connect_s: how long to wait for a served policy at the start, in seconds.
    """

    __pydantic_config__ = STRICT
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
    control: ControlConfig = ControlConfig()
    adapter: AdapterConfig = AdapterConfig()

    def contradiction(self) -> str | None:
        if self.robot is not None and self.robot.startswith("{"):
            return f"an environment's properties are `--adapter.robot {self.robot}`; `--robot` takes module:callable."
        if self.robot is not None and self.replay is not None:
            return "--robot and --replay exclude each other: choose the robot or the recorded demonstrations."
        if self.robot is None and self.robot_kwargs:
            return "robot_kwargs are arguments of `robot`, which is not given."
        return None


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    """What clients call things, where it cannot be told: parts of nested keys are joined by "/".

    Attributes:
        images: camera of the policy -> key of its picture.
        state: keys whose values, one after the other, are the state.
        prompt: key of the instruction.
    """

    __pydantic_config__ = STRICT
    images: dict[str, str] = dataclasses.field(default_factory=dict)
    state: tuple[str, ...] = ()
    prompt: str | None = None


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """`vla serve`: a policy for robots elsewhere, in the protocols of OpenVLA (POST /act) and openpi (websocket).

    With the environment variable VLA_API_KEY set, clients must send `Authorization: Api-Key <key>` (or Bearer).

    Attributes:
        policy: the embedded backbone "nano", a run folder or a checkpoint folder.
        host, port: where to listen; only this machine can connect unless told otherwise ("0.0.0.0").
        keys: what clients call things, where it cannot be told from their requests.
        max_batch: observations of different clients that are decoded together.
        max_queue: requests that may wait; more are refused.
        max_request_mb: largest request.
        patience_s: time that a client has to send a request once it has begun.
        certificate, private_key: files in PEM format; both: TLS.
        tracebacks: send them to clients, as openpi's own server does; they show paths and code. Without it, a stock
            client of OpenVLA hears "error" only; one that adds `?errors=plain` to the address (http://host:8000/act?errors=plain)
            gets a status code and the reason. This server's log has a line for every refusal.
    """

    __pydantic_config__ = STRICT
    policy: str = "nano"
    host: str = "127.0.0.1"
    port: Port = 8000
    unnorm_key: str | None = None
    n_action_steps: Count | None = None
    device: str = "auto"
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
            return "a server does not know where its clients' episodes begin: their chunks cannot be averaged."
        return None


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """`vla doctor`: what is wrong with this machine, and how to mend it.

    Attributes:
        out: folder whose disk is checked.
        json: print the findings as JSON.
    """

    __pydantic_config__ = STRICT
    out: Path = Path()
    json: bool = False
