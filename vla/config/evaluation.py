"""Configuration of the jobs that evaluate a policy, and of action decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen

from vla.config.data import AdapterConfig, HostsConfig
from vla.config.files import Strict
from vla.config.limits import Count, Dtype, Finite, Natural, NonNegative, Positive, Quota, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig(Strict):
    """How action tokens are decoded. The default is greedy decoding.

    Attributes:
        temperature: sampling temperature, the divisor of the logits; 0: take the most likely token.
        top_k: sample from the k most likely tokens; 0: from all tokens.
        top_p: sample from the most likely tokens whose total probability reaches this value (nucleus sampling).
        num_beams: number of beams in beam search; 1: no beam search.
        repetition_penalty: applies to tokens that already occur in the chunk: positive logits are divided by it,
            negative logits are multiplied by it.
        frequency_penalty: subtracted from a token's logit for each earlier occurrence in the chunk.
        presence_penalty: subtracted once from the logits of tokens that already occur in the chunk.
        readout: how an action value is computed from a token distribution: "mode" is the bin centre of the chosen
            token, "mean" is the probability-weighted mean of all bin centres.
        ensemble: coefficient of temporal ensembling. Overlapping chunks have the weights exp(-coefficient * i), with
            i = 0 for the oldest. It has an effect only if n_action_steps is less than the horizon. None: no ensembling.
        max_actions: number of actions to decode, from the start of each chunk; None: all.
        max_tokens: number of tokens to decode; None: all. Requires a tokenizer that decodes a whole chunk from its
            first tokens ("pca").
        deadline_ms: time in milliseconds after which decoding stops, with at least one token; None: no deadline.
            Requires the same kind of tokenizer as max_tokens.
        sampling_seed: random seed for token sampling, and for the latents of a Free Transformer.
        latent: codes of the latent of every chunk, for a Free Transformer; empty: random codes.
    """

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
    max_tokens: Count | None = None
    deadline_ms: Positive | None = None
    sampling_seed: Seed = 0
    latent: tuple[Natural, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether this is greedy decoding."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return self.temperature == 0 and self.num_beams == 1 and penalties == (1, 0, 0)

    def contradiction(self) -> str | None:
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            return "top_k and top_p need sampling: set temperature, e.g. to 1.0 to sample from the unscaled logits."
        if self.temperature and self.num_beams > 1:
            return "beam search cannot be combined with sampling: set temperature or num_beams, not both."
        return None


GREEDY = DecodingConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Strict):
    """`vla rollout`: evaluate a policy in closed loop on several environments and seeds.

    Attributes:
        policy: the built-in backbone "nano", a run folder, a checkpoint folder, or the address of a `vla serve`
            ("ws://host:8000").
        env: environment ids.
        episodes: episodes per environment.
        seed: first environment seed; episode i uses seed + i.
        n_envs: number of environments that run in parallel.
        n_action_steps: actions executed per chunk; None: the checkpoint's value.
        unnorm_key: dataset whose statistics un-normalise the actions; needed only if the checkpoint has several.
        decoding: how action tokens are decoded; greedy by default.
        videos: record videos of the first `videos` episodes of each environment, and of up to `videos` later failures.
        rerun: record the first `rerun` episodes of each environment, and up to `rerun` later failures, for Rerun's
            viewer (images, state, actions, token entropy). Needs the extra `rerun`.
        out: report folder.
        compare: another report folder to compare with.
        device: torch device; "auto" chooses one.
        dtype: type of weights and computation. bfloat16 and float16 take half the memory.
        overwrite: replace the results in `out`.
    """

    policy: str = "nano"
    env: tuple[str, ...] = ("envs:vla/PickUp-v0",)
    episodes: Count = 20
    seed: Seed = 100_000
    n_envs: Count = 10
    n_action_steps: Count | None = None
    unnorm_key: str | None = None
    decoding: DecodingConfig = GREEDY
    videos: Natural = 3
    rerun: Natural = 0
    out: Path = Path("runs/rollout")
    compare: Path | None = None
    device: str = "auto"
    dtype: Dtype = "float32"
    overwrite: bool = False
    adapter: AdapterConfig = AdapterConfig()
    hosts: HostsConfig = HostsConfig()

    def contradiction(self) -> str | None:
        if not self.env or len(set(self.env)) < len(self.env):
            return f"env must be one or more environment ids without duplicates, got {list(self.env)}."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Strict):
    """`vla benchmark <suite>`: evaluate a policy on a benchmark suite with the protocol of its published results.

    The same command resumes an interrupted benchmark; only `n_envs`, `videos` and `hosts` may differ.

    Attributes:
        suite: "metaworld", "libero", a suite registered by a plugin, or "module:attribute" for your own suite
            (docs/environments.md).
        policy: the built-in backbone "nano", a run folder, a checkpoint folder, or the address of a `vla serve`
            ("ws://host:8000").
        tasks: task sets of the suite (Meta-World: mt50, mt50/easy, mt50/medium, mt50/hard, mt50/very_hard, mt10,
            ml45-train, ml45-test; LIBERO: spatial, object, goal, 10, 90, pro-object_swap, ...) or environment ids;
            empty: the set of the published averages (mt50; LIBERO: four).
        episodes: episodes per task; None: as in the published results (Meta-World: 10, LIBERO: 50).
        seed: first environment seed; episode i of every task uses seed + i. None: the seed of the suite.
        n_envs: number of environments of a task that run in parallel.
        n_action_steps: actions executed per chunk; None: the checkpoint's value.
        unnorm_key: dataset whose statistics un-normalise the actions; needed only if the checkpoint has several.
        decoding: how action tokens are decoded; greedy by default.
        videos: record videos of the first `videos` episodes of each task, and of up to `videos` later failures.
        out: output folder, with one subfolder per task; None: runs/<name of the suite>-benchmark.
        device: torch device; "auto" chooses one.
        dtype: type of weights and computation. bfloat16 and float16 take half the memory.
    """

    suite: str = "metaworld"
    policy: str = "nano"
    tasks: tuple[str, ...] = ()
    episodes: Count | None = None
    seed: Seed | None = None
    n_envs: Count = 5
    n_action_steps: Count | None = None
    unnorm_key: str | None = None
    decoding: DecodingConfig = GREEDY
    videos: Natural = 1
    out: Path | None = None
    device: str = "auto"
    dtype: Dtype = "float32"
    adapter: AdapterConfig = AdapterConfig()
    hosts: HostsConfig = HostsConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExposureConfig(Strict):
    """`vla analyze exposure`: measure exposure bias, the loss of accuracy if tokens are conditioned on the policy's own
    earlier tokens instead of the demonstrated ones.

    Attributes:
        policy: the built-in backbone "nano", a run folder or a checkpoint folder.
        data: dataset folder; use demonstrations that the policy was not trained on.
        out: folder for the results and the plot.
        frames: maximum number of frames, evenly spaced in the dataset.
        batch_size: frames per forward pass.
        unnorm_key: dataset whose statistics normalise the actions; needed only if the checkpoint has several.
        device: torch device; "auto" chooses one.
    """

    policy: str = "nano"
    data: Path = Path("datasets/demos")
    out: Path = Path("runs/exposure")
    frames: Count = 2000
    batch_size: Count = 32
    unnorm_key: str | None = None
    device: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizersConfig(Strict):
    """`vla analyze tokenizers`: compare the length, accuracy and vocabulary of action tokenizers on a dataset.

    Attributes:
        data: dataset folder.
        tokenizers: names of tokenizers; empty: all, including those of plugins.
        horizons: the compared numbers of actions per chunk.
        normalization: "q01_q99", "min_max" or "mean_std".
        out: folder for the results and the plot.
        frames: maximum number of chunks, evenly spaced in the dataset.
    """

    data: Path = Path("datasets/demos")
    tokenizers: tuple[str, ...] = ()
    horizons: Annotated[tuple[Count, ...], MinLen(1)] = (8, 16, 50)
    normalization: Literal["q01_q99", "min_max", "mean_std"] = "q01_q99"
    out: Path = Path("runs/tokenizers")
    frames: Count = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(Strict):
    """`vla analyze latent`: roll out the same seeds under several codes of a policy's latent, and draw the paths.

    Attributes:
        policy: a run folder or a checkpoint folder.
        env: environment id.
        codes: codes of the latent to compare, each used for whole episodes; empty: the first eight.
        episodes: episodes per code.
        seed: first environment seed.
        axes: the two state entries to plot.
        out: folder for the results and the figure.
        n_action_steps: actions executed per chunk; None: the checkpoint's value.
        unnorm_key: dataset whose statistics un-normalise the actions; needed only if the checkpoint has several.
        device: torch device; "auto" chooses one.
    """

    policy: str = "runs/train"
    env: str = "envs:vla/PickUp-v0"
    codes: tuple[Natural, ...] = ()
    episodes: Count = 4
    seed: Seed = 100_000
    axes: tuple[str, str] = ("x", "y")
    out: Path = Path("runs/latent")
    n_action_steps: Count | None = None
    unnorm_key: str | None = None
    device: str = "auto"
    adapter: AdapterConfig = AdapterConfig()
