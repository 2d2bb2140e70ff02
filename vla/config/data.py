"""Jobs on demonstrations: collecting, inspecting and replaying them, and where an environment keeps what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from vla.config.files import STRICT
from vla.config.limits import Count, Natural, NonNegative, Seed, Share


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Where a Gymnasium environment keeps its images, state, instruction and success. The defaults fit this package's
    environments; another environment is described by these values alone.

    Attributes:
        module: imported before `gymnasium.make`, so that it can register its ids (the "module" of "module:id").
        kwargs: keyword arguments of `gymnasium.make`, e.g. {image_size: 128}.
        images: camera name -> dotted path into the observation, e.g. {"top": "pixels"}; empty: every entry of
            observation["pixels"]. Parts of tuples go by their index ("0"), all of the observation is "", and
            "render()" takes `env.render()`.
        flip: cameras whose image is upside down (rotated by 180 degrees).
        state: dotted paths into the observation, concatenated; empty: a policy without proprioception.
        instruction: a fixed instruction; None takes info["instruction"], else the attribute `task_description`.
        success: dotted path into `info`; the episode is a success while it is true (>= 0.5). The entry may be absent
            until the episode ends.
        expert: where demonstrations come from: "env" (the environment's own `make_expert`), "random", or
            "module:callable", called with (env, seed), which returns an object with `act() -> action`.
        robot: properties of the RobotSpec that the environment does not state itself, e.g. {control_hz: 10,
            action_space: ee_delta}. Action spaces are joint_position, joint_delta, joint_velocity, ee_position,
            ee_delta and ee_velocity.
        max_steps: overrides the environment's registered episode limit.
    """

    __pydantic_config__ = STRICT
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


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """`vla collect`: run an expert, keep the successes, write a LeRobotDataset v3.

    Attributes:
        env: environment ids; episodes are spread evenly over them.
        out: dataset folder.
        episodes: successful episodes in all.
        seed: first environment seed; episode i uses seed + i.
        noise: strength of the expert's noise (0: the clean expert); the recorded action is the clean one.
        noise_share: share of the episodes that are noisy.
        keep: "success" or "all".
        workers: processes; 0 takes one per core.
        resume: continue an interrupted collection in `out`.
    """

    __pydantic_config__ = STRICT
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

    def contradiction(self) -> str | None:
        if not self.env:
            return "env: name at least one environment."
        if self.noise and self.adapter.expert != "env":
            return (
                f"noise is given to an environment's own expert; {self.adapter.expert!r} (adapter.expert) would ignore "
                "it. Leave noise out, and let that expert make its own."
            )
        if self.adapter.instruction is not None and not self.adapter.instruction.strip():
            return "adapter.instruction is blank; a demonstration needs an instruction."
        return None


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """`vla inspect`: print and plot what is in a dataset, and what is wrong with it.

    Attributes:
        data: dataset folder.
        out: where the plots and the page go; None: `<data>/inspect`.
        bins: bins of the action tokenizer whose edges are drawn; None: as many as the embedded backbone has (63).
    """

    __pydantic_config__ = STRICT
    data: Path = Path("datasets/demos")
    out: Path | None = None
    bins: Annotated[int, Ge(2)] | None = None


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """`vla replay`: send recorded actions to the environment they came from and report success.

    Attributes:
        data: dataset folder.
        env: environment id; None takes the one recorded with each episode.
        episodes: how many episodes, from the first on.
        out: folder for the report; None prints only.
    """

    __pydantic_config__ = STRICT
    data: Path = Path("datasets/demos")
    env: str | None = None
    episodes: Count = 10
    out: Path | None = None
    adapter: AdapterConfig = AdapterConfig()
