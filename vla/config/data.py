"""Configuration of jobs on demonstrations (collect, inspect, replay), of environments, and of their processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from vla.config.files import Strict
from vla.config.limits import Count, Natural, NonNegative, Seed, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Strict):
    """Where to find images, state, instruction and success in a Gymnasium environment.

    The defaults are for this package's environments.

    Attributes:
        module: module to import, which registers the environment; an alternative to the id "module:id".
        kwargs: keyword arguments of `gymnasium.make`, e.g. {image_size: 128}.
        images: camera name -> dotted path in the observation, e.g. {"top": "pixels"}; empty: all images in
            observation["pixels"]. A path may be an index ("0") into a tuple, "" for the whole observation, or
            "render()" for the result of `env.render()`.
        flip: cameras to rotate by 180 degrees, because their images are upside down.
        state: dotted paths in the observation, whose values are concatenated; empty: no state.
        instruction: a fixed instruction; None: info["instruction"] or, if absent, the attribute `task_description`.
        success: dotted path in `info`. The task is solved while this value is true (>= 0.5). Until the end of the
            episode, the value may be absent.
        expert: source of demonstrations: "env" (the environment's own `make_expert`), "random", or "module:callable".
            The callable receives (env, seed) and returns an object with `act() -> action`.
        robot: properties of the RobotSpec, which override those of the environment, e.g. {control_hz: 10,
            action_space: ee_delta}. Action spaces: joint_position, joint_delta, joint_velocity, ee_position, ee_delta
            and ee_velocity.
        max_steps: maximum steps per episode; None: the environment's registered limit.
    """

    module: str | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: dict[str, str] = dataclasses.field(default_factory=dict)
    flip: tuple[str, ...] = ()
    state: tuple[str, ...] = ("agent_pos",)
    instruction: str | None = None
    success: str = "is_success"
    expert: str = "env"
    robot: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_steps: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig(Strict):
    """Where environments run. Results do not depend on it.

    Attributes:
        backend: "local": processes on this machine. "ray": actors in a Ray cluster.
        address: address of the Ray cluster: "auto" (this machine's cluster), "host:port" or "ray://host:port"; None:
            start a cluster on this machine.
    """

    backend: str = "local"
    address: str | None = None

    def contradiction(self) -> str | None:
        if self.address is not None and self.backend == "local":
            return f"address {self.address!r} requires the backend 'ray': add --backend ray, or omit the address."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig(Strict):
    """`vla collect`: run an expert and write its successful episodes as a LeRobotDataset v3.

    Attributes:
        env: environment ids; episodes are distributed evenly over them.
        out: dataset folder.
        episodes: total number of episodes to write.
        seed: first environment seed; episode i uses seed + i.
        noise: strength of the expert's noise; 0: no noise. The recorded action is always the clean one.
        noise_share: fraction of episodes with noise.
        keep: episodes to write: "success" (only successful ones) or "all".
        workers: number of workers; 0: one per core of this machine.
        resume: continue an interrupted collection in `out`.
    """

    env: tuple[str, ...] = ("envs:vla/PickUp-v0",)
    out: Path = Path("datasets/demos")
    episodes: Count = 50
    seed: Seed = 0
    noise: NonNegative = 0.0
    noise_share: Share = 0.5
    keep: Literal["success", "all"] = "success"
    workers: Natural = 0
    resume: bool = False
    adapter: AdapterConfig = AdapterConfig()
    hosts: HostsConfig = HostsConfig()

    def contradiction(self) -> str | None:
        if not self.env:
            return "env must be one or more environment ids."
        if self.noise and self.adapter.expert != "env":
            return (
                f"noise is only for an environment's own expert; {self.adapter.expert!r} (adapter.expert) would ignore "
                "it. Omit noise; that expert can add noise itself."
            )
        if self.adapter.instruction is not None and not self.adapter.instruction.strip():
            return "adapter.instruction is empty, but a demonstration needs an instruction."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(Strict):
    """`vla inspect`: print and plot the contents of a dataset, and report its problems.

    Attributes:
        data: dataset folder.
        out: folder for the plots and the HTML page; None: `<data>/inspect`.
        bins: number of action bins, for the plot of their edges; None: that of the built-in backbone (63).
        rerun: number of episodes, evenly spaced in the dataset, to record for Rerun's viewer (cameras, state and
            actions). Needs the extra `rerun`.
    """

    data: Path = Path("datasets/demos")
    out: Path | None = None
    bins: Annotated[int, Ge(2)] | None = None
    rerun: Natural = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig(Strict):
    """`vla replay`: replay recorded actions in the environment of the recording, and report success.

    Attributes:
        data: dataset folder.
        env: environment id; None: the id recorded with each episode.
        episodes: number of episodes to replay, starting with the first.
        out: folder for the report; None: print it only.
    """

    data: Path = Path("datasets/demos")
    env: str | None = None
    episodes: Count = 10
    out: Path | None = None
    adapter: AdapterConfig = AdapterConfig()
