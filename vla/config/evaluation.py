"""Jobs that judge a policy, and how its chunks are decoded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from vla.config.data import AdapterConfig
from vla.config.files import STRICT
from vla.config.limits import Count, Finite, Natural, NonNegative, Positive, Quota, Seed


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How a chunk is chosen from the network's probabilities. The default is greedy decoding.

    Attributes:
        temperature: divides the logits before sampling; 0 takes the likeliest token instead.
        top_k: sample among the k likeliest tokens; 0: among all.
        top_p: sample among the likeliest tokens that together have this probability.
        num_beams: beams of a search for the likeliest chunk; 1: no search.
        repetition_penalty: divides positive logits of tokens that are in the chunk already, multiplies negative ones.
        frequency_penalty: subtracted from a token's logit for each time it is in the chunk already.
        presence_penalty: subtracted from the logits of tokens that are in the chunk already.
        readout: what becomes of an entry's distribution: "mode" is the bin of the chosen token, "mean" the
            probability-weighted mean of all bin centres.
        ensemble: coefficient of temporal ensembling, the weights exp(-coefficient * i) of overlapping chunks with i = 0
            for the oldest; it takes effect where fewer actions are executed than a chunk has. None: no ensembling.
        max_actions: decode only so many first actions of each chunk. None: all.
        sampling_seed: of the draws.
    """

    __pydantic_config__ = STRICT
    temperature: NonNegative = 0.0
    top_k: Natural = 0
    top_p: Quota = 1.0
    num_beams: Count = 1
    repetition_penalty: Positive = 1.0
    frequency_penalty: Finite = 0.0
    presence_penalty: Finite = 0.0
    readout: Literal["mode", "mean"] = "mode"
    ensemble: Finite | None = None
    max_actions: Count | None = None
    sampling_seed: Seed = 0

    @property
    def greedy(self) -> bool:
        """Whether tokens are chosen as greedy decoding chooses them."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return self.temperature == 0 and self.num_beams == 1 and penalties == (1, 0, 0)

    def contradiction(self) -> str | None:
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            return "top_k and top_p choose among samples; give a temperature, 1.0 for the network's own."
        if self.temperature and self.num_beams > 1:
            return "beam search does not sample: give a temperature or num_beams, not both."
        return None


GREEDY = DecodingConfig()


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """`vla rollout`: evaluate a policy closed loop on environments x seeds.

    Attributes:
        policy: the embedded backbone "nano", a run folder, a checkpoint folder, or the address of a `vla serve`
            ("ws://host:8000").
        env: environment ids.
        episodes: episodes per environment.
        seed: first environment seed; episode i uses seed + i.
        n_envs: environments stepped side by side.
        n_action_steps: overrides the checkpoint's value.
        unnorm_key: whose statistics un-normalise the actions; needed only when the checkpoint holds several.
        decoding: how chunks are decoded; greedily by default.
        videos: videos per environment of the first episodes; as many again of failures.
        out: report folder.
        compare: another report folder to compare with.
    """

    __pydantic_config__ = STRICT
    policy: str = "nano"
    env: tuple[str, ...] = ("envs:vla/PickUp-v0",)
    episodes: Count = 20
    seed: Seed = 100_000
    n_envs: Count = 10
    n_action_steps: Count | None = None
    unnorm_key: str | None = None
    decoding: DecodingConfig = GREEDY
    videos: Natural = 3
    out: Path = Path("runs/rollout")
    compare: Path | None = None
    device: str = "auto"
    overwrite: bool = False
    adapter: AdapterConfig = AdapterConfig()

    def contradiction(self) -> str | None:
        if not self.env or len(set(self.env)) < len(self.env):
            return f"env needs one or more environment ids, each once; got {list(self.env)}."
        return None


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """`vla benchmark metaworld`: a policy on Meta-World's tasks as papers report it. Done again with the same `out`, it
    plays what is missing; only `n_envs` and `videos` may have changed.

    Attributes:
        policy: the embedded backbone "nano", a run folder, a checkpoint folder, or the address of a `vla serve`
            ("ws://host:8000").
        tasks: sets of tasks (mt50, mt50/easy, mt50/medium, mt50/hard, mt50/very_hard, mt10, ml45-train, ml45-test), or
            environment ids.
        episodes: episodes per task; papers take 10.
        seed: first environment seed; episode i of every task uses seed + i.
        n_envs: environments of a task stepped side by side.
        n_action_steps: overrides the checkpoint's value.
        unnorm_key: whose statistics un-normalise the actions; needed only when the checkpoint holds several.
        decoding: how chunks are decoded; greedily by default.
        videos: videos per task of the first episodes; as many again of failures.
        out: folder of the results; one folder per task in it.
    """

    __pydantic_config__ = STRICT
    policy: str = "nano"
    tasks: tuple[str, ...] = ("mt50",)
    episodes: Count = 10
    seed: Seed = 100_000
    n_envs: Count = 5
    n_action_steps: Count | None = None
    unnorm_key: str | None = None
    decoding: DecodingConfig = GREEDY
    videos: Natural = 1
    out: Path = Path("runs/metaworld-benchmark")
    device: str = "auto"
    adapter: AdapterConfig = AdapterConfig()


@dataclasses.dataclass(frozen=True)
class ExposureConfig:
    """`vla analyze exposure`: what a policy loses by reading its own tokens instead of the demonstrator's.

    Attributes:
        policy: the embedded backbone "nano", a run folder or a checkpoint folder.
        data: a dataset folder; demonstrations that the policy was not trained on, for a fair answer.
        out: folder of the figures and the picture.
        frames: at most so many frames, spread evenly over all episodes.
        batch_size: frames per forward.
        unnorm_key: whose statistics normalise the actions; needed only when the checkpoint holds several.
    """

    __pydantic_config__ = STRICT
    policy: str = "nano"
    data: Path = Path("datasets/demos")
    out: Path = Path("runs/exposure")
    frames: Count = 2000
    batch_size: Count = 32
    unnorm_key: str | None = None
    device: str = "auto"
