"""Jobs that make a policy: training, DAgger and the quickstart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen

from vla.config.data import AdapterConfig
from vla.config.files import STRICT
from vla.config.limits import Count, Fraction, Natural, NonNegative, Positive, Quota, Seed, Share

ROUNDS_APART = 10_000  # between the first seeds of two rounds of DAgger: no two of its scenes share one


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What `vla train` adapts.

    Attributes:
        rank: of the adapters.
        alpha: what an adapter adds is multiplied by alpha / rank.
        dropout: of an adapter's input.
        targets: module names of the decoder, as in peft.
        train_action_rows: also train the embeddings and output rows of action tokens.
        train_projector, train_vision: also train the projector, the vision tower.
    """

    __pydantic_config__ = STRICT
    rank: Count = 32
    alpha: Count = 64
    dropout: Fraction = 0.0
    targets: Annotated[tuple[str, ...], MinLen(1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    train_action_rows: bool = True
    train_projector: bool = True
    train_vision: bool = False


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Image augmentation, the same for all cameras of a sample's draw except for the shift.

    Attributes:
        shift: random translation, as a share of the image side.
        brightness, contrast, saturation: half-width of the random factor around 1.
        committed: share of the samples whose first actions (one to half a chunk) are given instead of learned: those
            that were executed, which noisy demonstrations tell apart from those to learn. For policies that are to go
            on from what is executed while they decode (the "committed" seam of `vla deploy`).
    """

    __pydantic_config__ = STRICT
    shift: Share = 0.04
    brightness: Share = 0.1
    contrast: Share = 0.1
    saturation: Share = 0.1
    committed: Share = 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy to train. None means: as in the checkpoint that is trained further, else a default.

    Attributes:
        backbone: "nano" (the embedded backbone; the default of `vla train`), "nano-init" (the same, untrained; the
            default of `vla pretrain`), "small-init" (a larger one for GPUs, untrained), a checkpoint of this package,
            or a folder or hub id of a LLaMA-architecture causal language model.
        vision: folders or hub ids of SigLIP/DINOv2/CLIP towers, fused on the feature axis; for a language
            model only.
        cameras: which of the dataset's cameras, in this order; empty: all.
        image_size: side of the square image in pixels; None: what the vision tower was built for, as a checkpoint's is.
        use_state: give the policy `agent_pos`; by default it is given.
        horizon: actions per chunk, H; 8 by default.
        n_action_steps: actions executed before the next chunk is predicted; half the horizon by default.
        bins: bins per action entry; 255 by default ("openvla" has 256).
        tokenizer: action tokenizer, "uniform" (the default), "quantile" or "openvla".
        normalization: "q01_q99" (the default), "min_max" or "mean_std".
        prompt: prompt template, see `vla.transforms.prompt`; "plain" by default.
        freeze_vision: do not train the vision tower.
    """

    __pydantic_config__ = STRICT
    backbone: str | None = None
    vision: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    image_size: Count | None = None
    use_state: bool | None = None
    horizon: Count | None = None
    n_action_steps: Count | None = None
    bins: Annotated[int, Ge(2)] | None = None
    tokenizer: str | None = None
    normalization: Literal["q01_q99", "min_max", "mean_std"] | None = None
    prompt: str | None = None
    freeze_vision: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`vla train` (LoRA or full fine-tuning) and `vla pretrain` (all weights).

    Attributes:
        data: dataset folders; several make a weighted mixture.
        weights: sampling weight of each; empty: in proportion to their frames.
        unnorm_keys: name under which each dataset's statistics are stored (pooled where names repeat); empty: the
            folder names.
        out: run folder.
        method: "lora" trains adapters, action rows and projector; "full" trains everything that is not frozen.
        steps: optimizer steps.
        batch_size: samples per forward pass and device; times `grad_accum` per optimizer step.
        grad_accum: batches per optimizer step.
        learning_rate, weight_decay: of AdamW; the rate follows a cosine after a linear warm-up.
        warmup_steps: optimizer steps of the warm-up.
        max_grad_norm: gradients are clipped to this norm; 0: never.
        precision: "auto" is bf16 where the hardware computes it natively, else float32.
        compile: compile the network with torch.
        workers: processes that prepare batches; 0: none.
        val_fraction: share of episodes held out for validation.
        eval_every, save_every, log_every: optimizer steps between validations, checkpoints and rows of the metrics.
        keep_checkpoints: how many of the last checkpoints are kept.
        rollout_every: optimizer steps between closed-loop evaluations in `rollout_env` (through `adapter`); 0: none.
        rollout_env, rollout_episodes: environment ids, and episodes in each.
        report_to: where metrics go besides `metrics.jsonl`; the package must be installed.
        resume: continue the run in `out` from its last checkpoint.
        dry_run: check configuration, data, shapes and memory, take one step, write nothing.
    """

    __pydantic_config__ = STRICT
    data: Annotated[tuple[Path, ...], MinLen(1)] = (Path("datasets/demos"),)
    weights: tuple[NonNegative, ...] = ()
    unnorm_keys: tuple[str, ...] = ()
    out: Path = Path("runs/train")
    model: ModelConfig = ModelConfig()
    method: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    augment: AugmentConfig = AugmentConfig()
    steps: Count = 2000
    batch_size: Count = 64
    grad_accum: Count = 1
    learning_rate: Positive = 1.0e-3
    weight_decay: NonNegative = 0.01
    warmup_steps: Natural = 50
    max_grad_norm: NonNegative = 1.0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    compile: bool = False
    workers: Natural = 0
    seed: Seed = 0
    val_fraction: Fraction = 0.05
    eval_every: Count = 500
    save_every: Count = 500
    log_every: Count = 20
    keep_checkpoints: Count = 2
    rollout_every: Natural = 0
    rollout_env: tuple[str, ...] = ()
    rollout_episodes: Count = 10
    adapter: AdapterConfig = AdapterConfig()
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    resume: bool = False
    dry_run: bool = False

    def contradiction(self) -> str | None:
        if self.weights and (len(self.weights) != len(self.data) or not sum(self.weights) > 0):
            return f"weights needs one number per dataset, not all 0; got {list(self.weights)} for {len(self.data)}."
        if self.unnorm_keys and len(self.unnorm_keys) != len(self.data):
            return f"unnorm_keys: give one name per dataset, {len(self.data)} in all; got {list(self.unnorm_keys)}."
        if bool(self.rollout_every) != bool(self.rollout_env):
            return "closed-loop evaluation needs both: rollout_every (steps) and rollout_env (ids)."
        return None


@dataclasses.dataclass(frozen=True)
class DaggerConfig:
    """`vla dagger`: the policy drives, the expert says what it should have done, the policy learns it; and again.

    Attributes:
        env: environment ids that have an expert; episodes are spread evenly over them.
        out: folder of everything it makes; round k lies in `round-k`.
        data: dataset folders to begin with; none: round 0 collects `demonstrations`.
        demonstrations: successful episodes of the expert in round 0.
        noise, noise_share: of round 0's expert, as in `vla collect`.
        rounds: at most so many rounds after round 0.
        trials: scenes per environment in which the policy is tried alone before every round: the round's roll-ins are
            shared out in proportion to its failures there. 0: evenly, without trials.
        episodes: roll-ins per round; they are kept, solved or not.
        intervention: so many steps of a roll-in the expert drives and labels, from a random decision on, and then it
            ends: what comes before leads there and is no label. Many short interventions show many more scenes than
            as many labels of whole episodes. None: the expert labels every step.
        intervention_after: decisions before an intervention, on average; a roll-in that is over before has no label.
        labels: no round begins once the expert has labelled so many frames; None: no such limit.
        target: share of successes, 0 to 1, at which it ends.
        beta: in round k the expert drives with probability beta ** k; 0: never after round 0; 1: always.
        mixture: when it is decided who drives: at every "decision" of the policy (for the actions of a chunk that are
            executed), at every "step", or once per "episode".
        seed: first environment seed of round 0; the roll-ins of round k begin at seed + 10000 * k.
        n_envs: environments stepped side by side.
        eval_episodes, eval_seed: closed-loop evaluation after each round, per environment.
        warm_start: train the last policy further; if not, every round trains on all demonstrations from the start.
        finetune_steps: optimizer steps of each round after round 0; None: `train.steps`.
        compare_bc: at the end also train on demonstrations alone, with as many labels and optimizer steps, and compare.
        train: how each round trains; its data, folders and names of statistics are this job's.
        resume: continue what is in `out`; it may be given more rounds, labels, another target, or `compare_bc`.
    """

    __pydantic_config__ = STRICT
    env: tuple[str, ...] = ("envs:vla/OpenDrawer-v0",)
    out: Path = Path("runs/dagger")
    data: tuple[Path, ...] = ()
    demonstrations: Annotated[int, Ge(1), Le(ROUNDS_APART)] = 50
    noise: NonNegative = 0.0
    noise_share: Share = 0.5
    rounds: Count = 4
    trials: Annotated[int, Ge(0), Le(ROUNDS_APART)] = 0
    episodes: Annotated[int, Ge(1), Le(ROUNDS_APART)] = 50
    intervention: Count | None = None
    intervention_after: Natural = 10
    labels: Count | None = None
    target: Quota = 0.95
    beta: Share = 0.5
    mixture: Literal["decision", "step", "episode"] = "decision"
    seed: Seed = 0
    n_envs: Count = 10
    eval_episodes: Count = 50
    eval_seed: Seed = 100_000
    warm_start: bool = True
    finetune_steps: Count | None = None
    compare_bc: bool = False
    train: TrainConfig = TrainConfig()
    device: str = "auto"
    resume: bool = False
    adapter: AdapterConfig = AdapterConfig()

    def contradiction(self) -> str | None:
        seeds = range(self.seed, self.seed + ROUNDS_APART * (self.rounds + 1))
        judged = range(self.eval_seed, self.eval_seed + self.eval_episodes)
        if not self.env:
            return "env must be one or more environment ids."
        if judged.start < seeds.stop and seeds.start < judged.stop:
            return (
                f"eval_seed must be outside the seeds to learn from, {seeds[0]} to {seeds[-1]}, got {self.eval_seed}."
            )
        for name in ("data", "weights", "unnorm_keys", "out", "resume", "dry_run"):
            if getattr(self.train, name) != getattr(TrainConfig(), name):
                return f"train.{name} is set by `vla dagger` itself; leave it out."
        return None


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """`vla quickstart`: demonstrations of a task the embedded backbone has never seen, LoRA, rollouts before and after.

    Attributes:
        env: the task.
        demonstrations: successful expert episodes to learn from.
        minutes: training time; the number of steps follows from this machine's measured speed.
        min_steps: train for at least so many steps, however slow the machine.
        episodes: rollouts on unseen seeds, before and after.
        out: folder of everything it makes. What is finished in it is not done again.
        fresh: start over.
    """

    __pydantic_config__ = STRICT
    env: str = "envs:vla/OpenDrawer-v0"
    demonstrations: Count = 150
    minutes: NonNegative = 5.0
    min_steps: Count = 300
    episodes: Count = 20
    out: Path = Path("runs/quickstart")
    fresh: bool = False
