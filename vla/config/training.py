"""Configuration of the jobs that train a policy: train, pretrain, dagger and quickstart."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, MinLen

from vla.config.data import AdapterConfig, HostsConfig
from vla.config.files import Strict
from vla.config.limits import Count, Fraction, Natural, NonNegative, Positive, Quota, Seed, Share

ROUNDS_APART = 10_000  # distance between the first seeds of two DAgger rounds, so that their seeds differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Strict):
    """LoRA (Hu et al., 2021), and the other weights to train with it.

    Attributes:
        rank: rank of the adapters.
        alpha: scale; the output of an adapter is multiplied by alpha / rank.
        dropout: dropout probability of an adapter's input.
        targets: names of the decoder modules to adapt, as in peft.
        train_action_rows: also train the embeddings and output rows of the action tokens.
        train_projector: also train the projector.
        train_vision: also train the vision tower.
    """

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig(Strict):
    """Augmentation of training samples. The cameras of a sample have the same colour factors, but different shifts.

    Attributes:
        shift: maximum random translation, as a fraction of the image side.
        brightness: half-width of the range of the random brightness factor around 1.
        contrast: half-width of the range of the random contrast factor around 1.
        saturation: half-width of the range of the random saturation factor around 1.
        state_mask: fraction of samples with the normalised state replaced by zeros, so that the policy must use the
            images.
        state_noise: standard deviation of Gaussian noise on the normalised state.
        order_dropout: fraction of samples without the order of the words (`word_order`). Otherwise, the policy also
            learns the positions of words whose order does not matter, and may not understand other phrasings.
        prefix: fraction of samples for prefix conditioning (`vla deploy --transition prefix`): their first actions
            (one action to half a chunk) are the executed actions instead of the clean labels, and are not learned.
    """

    RENAMED: ClassVar = {"committed": "prefix"}
    shift: Share = 0.04
    brightness: Share = 0.1
    contrast: Share = 0.1
    saturation: Share = 0.1
    state_mask: Share = 0.0
    state_noise: NonNegative = 0.0
    order_dropout: Share = 0.0
    prefix: Share = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Strict):
    """The policy to train. If a field is None, the value of the initial checkpoint, if any, or the default is used.

    Attributes:
        backbone: "nano" (the built-in backbone; default of `vla train`), "nano-init" (the same, untrained; default of
            `vla pretrain`), "small-init" (a larger, untrained backbone for GPUs), a checkpoint of this package or
            OpenVLA, a vision-language model (Idefics3, SmolVLM, LLaVA), or a LLaMA-like language model: a folder, a hub
            id, a .gguf file, or "smollm2" (needs `scripts/setup pretrained`).
        vision: vision towers for a language model: folders or hub ids of SigLIP, DINOv2 or CLIP, "efficientnet-lite0"
            (needs `scripts/setup pretrained`) or "nano" (that of the built-in backbone). Features of several towers are
            concatenated.
        cameras: cameras of the dataset to use, in this order; empty: all.
        image_size: side of the square input image in pixels; None: that of the checkpoint or the vision tower.
        image_transform: how images are resized: "area" (averages areas; the default), "lanczos" (the default of
            OpenVLA's checkpoints) or "lanczos-crop" (the central 0.9 of the area, for OpenVLA networks trained with
            random crops).
        keypoints: number of keypoints (spatial softmax) whose coordinates are added to the image tokens; 0 by default.
            Only for untrained backbones of this package.
        word_order: whether the built-in vision tower sees the order of the words, which it needs for instructions with
            two objects ("stack red on blue"); false by default. It can be added to a trained policy; with LoRA, it
            needs `lora.train_vision`.
        grid: whether the vision tower has a token per image cell; true by default. Otherwise, each camera has one token
            made of its keypoints. Only for untrained backbones of this package.
        use_state: whether `agent_pos` is an input of the policy; true by default.
        horizon: actions per chunk, H; 8 by default.
        n_action_steps: actions executed before the next chunk is predicted; half the horizon by default.
        bins: bins per action dimension; 255 by default (256 for the tokenizer "openvla"). For "fast", the number of
            ids; 256 by default. More than 256 need a language model as backbone.
        tokenizer: action tokenizer (docs/tokenizers.md): "uniform" (the default), "quantile", "openvla", "digits",
            "fast", "spline", "pca", a tokenizer registered by a plugin, or the folder or hub id of a published FAST
            tokenizer ("physical-intelligence/fast").
        normalization: "q01_q99" (the default), "min_max" or "mean_std".
        prompt: prompt template (see `vla.transforms.prompt`); "plain" by default.
        latent: train a Free Transformer (docs/free_transformer.md) with one latent per "token", "chunk" or "episode";
            "none" by default.
        latent_bits: number of bits of a latent; 6 by default.
        latent_form: "one_hot" (an embedding for each of the 2^bits codes; the default) or "factored" (an embedding for
            each bit, which needs less memory).
        latent_kappa: number of bits per latent without a penalty in the loss; 1 by default.
        freeze_vision: do not train the vision tower.
    """

    backbone: str | None = None
    vision: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    image_size: Count | None = None
    image_transform: str | None = None
    keypoints: Natural | None = None
    word_order: bool | None = None
    grid: bool | None = None
    use_state: bool | None = None
    horizon: Count | None = None
    n_action_steps: Count | None = None
    bins: Annotated[int, Ge(2)] | None = None
    tokenizer: str | None = None
    normalization: Literal["q01_q99", "min_max", "mean_std"] | None = None
    prompt: str | None = None
    latent: Literal["none", "token", "chunk", "episode"] | None = None
    latent_bits: Annotated[int, Ge(1), Le(32)] | None = None
    latent_form: Literal["one_hot", "factored"] | None = None
    latent_kappa: Positive | None = None
    freeze_vision: bool = False

    def contradiction(self) -> str | None:
        options = [name for name in ("latent_bits", "latent_form", "latent_kappa") if getattr(self, name) is not None]
        if self.latent == "none" and options:
            return f"{options[0]} needs a latent: set latent to token, chunk or episode."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Strict):
    """`vla train` (LoRA or full fine-tuning) and `vla pretrain` (all weights).

    Attributes:
        data: dataset folders; several are sampled as a weighted mixture.
        weights: sampling weight of each dataset; empty: proportional to its number of frames.
        unnorm_keys: a name for the statistics of each dataset; empty: the folder names. Datasets with the same name
            share statistics.
        out: run folder.
        method: "lora" (train adapters, action rows and projector) or "full" (train all weights that are not frozen).
        steps: number of optimizer steps.
        batch_size: samples per forward pass and device; an optimizer step uses `batch_size * grad_accum` per device.
        grad_accum: batches per optimizer step.
        hard_frames: fraction of samples drawn in proportion to the error of a state-only model
            (`vla.data.state_only`); the others are drawn uniformly.
        label_sigma: standard deviation, in bins, of Gaussian labels: the target of an action token is a distribution
            over neighbouring bins (HL-Gauss; Imani and White, 2018, arXiv:1806.04613). 0: one-hot labels. Needs a
            tokenizer of bins.
        learning_rate: peak learning rate of AdamW; linear warm-up, then cosine decay.
        weight_decay: weight decay of AdamW.
        warmup_steps: optimizer steps of the warm-up.
        max_grad_norm: gradients are clipped to this norm; 0: no clipping.
        precision: "auto" uses bf16 if the hardware supports it natively, otherwise float32.
        gradient_checkpointing: compute the activations of each layer again in the backward pass instead of storing
            them: less memory, for about a third more computation.
        compile: use torch.compile.
        workers: number of processes that load data; 0: load it in the main process.
        frames: how images are read. "cache": decoded once, and cached on disk and in memory. "video": decoded from the
            videos whenever they are drawn; set `workers`. "auto": the cache if it fits into memory, else the videos.
        seed: seed of initial weights, sample order and augmentation.
        val_fraction: fraction of episodes held out for validation.
        eval_every: optimizer steps between validations.
        save_every: optimizer steps between checkpoints.
        log_every: optimizer steps between logged metrics.
        keep_checkpoints: number of most recent checkpoints to keep.
        rollout_every: optimizer steps between closed-loop evaluations in `rollout_env` (through `adapter`); 0: none.
        rollout_env: environment ids of the closed-loop evaluation.
        rollout_episodes: episodes per environment of the closed-loop evaluation.
        report_to: experiment tracker for the metrics, in addition to `metrics.jsonl`. It must be installed.
        resume: continue the run in `out` from its last checkpoint.
        dry_run: check configuration, data, shapes and memory in two steps, and write nothing.
    """

    data: Annotated[tuple[Path, ...], MinLen(1)] = (Path("datasets/demos"),)
    out: Path = Path("runs/train")
    method: Literal["lora", "full"] = "lora"
    steps: Count = 2000
    batch_size: Count = 64
    learning_rate: Positive = 1.0e-3
    weights: tuple[NonNegative, ...] = ()
    unnorm_keys: tuple[str, ...] = ()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    augment: AugmentConfig = AugmentConfig()
    grad_accum: Count = 1
    hard_frames: Share = 0.0
    label_sigma: NonNegative = 0.0
    weight_decay: NonNegative = 0.01
    warmup_steps: Natural = 50
    max_grad_norm: NonNegative = 1.0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: Natural = 0
    frames: Literal["auto", "cache", "video"] = "auto"
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
        if self.compile and self.model.latent not in (None, "none"):
            return "a network with a latent cannot be compiled: set compile false, or model.latent none."
        if self.gradient_checkpointing and self.model.latent not in (None, "none"):
            return (
                "a network with a latent needs its activations: set gradient_checkpointing false, or model.latent none."
            )
        if self.weights and (len(self.weights) != len(self.data) or not sum(self.weights) > 0):
            return (
                f"weights must be one number per dataset, and not all 0; got {list(self.weights)} for {len(self.data)} "
                "datasets."
            )
        if self.unnorm_keys and len(self.unnorm_keys) != len(self.data):
            return f"unnorm_keys must be one name per dataset ({len(self.data)}), got {list(self.unnorm_keys)}."
        if bool(self.rollout_every) != bool(self.rollout_env):
            return "closed-loop evaluation needs both rollout_every (steps) and rollout_env (environment ids)."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DaggerConfig(Strict):
    """`vla dagger`: DAgger (Ross et al., 2011). In each round, the policy is rolled out, the expert labels the visited
    states, and the policy is trained on all data.

    Attributes:
        env: ids of environments with an expert; episodes are distributed evenly over them.
        out: output folder; round k is in `round-k`.
        data: initial dataset folders; empty: round 0 collects `demonstrations`.
        demonstrations: number of successful episodes of the expert in round 0.
        noise: strength of the expert's noise in round 0, as in `vla collect`.
        noise_share: fraction of episodes with noise in round 0.
        rounds: maximum number of rounds after round 0.
        trials: episodes per environment of the policy without the expert, before each round. The round's rollouts are
            distributed over the environments in proportion to the failures. 0: no trials; distribute rollouts evenly.
        episodes: number of rollouts per round; unsuccessful ones are also kept.
        intervention: length of an intervention in control steps. It begins at a random decision; the expert then
            controls the robot, and the rollout ends with the intervention. Only its steps are labelled, so the same
            number of labels covers more scenes. None: the expert labels every step.
        intervention_after: mean number of decisions before an intervention. Rollouts that end earlier have no labels.
        labels: number of labelled frames after which no further round starts; None: no limit.
        target: success rate, 0 to 1, at which to stop.
        beta: in round k, the expert controls the robot with probability beta ** k. 0: never after round 0; 1: always.
        mixture: when to choose between expert and policy: at every "decision" (once per chunk), at every "step", or
            once per "episode".
        seed: first environment seed of round 0; the rollouts of round k start at seed + 10000 * k.
        n_envs: number of environments that run in parallel.
        eval_episodes: episodes per environment of the closed-loop evaluation after each round.
        eval_seed: first environment seed of that evaluation.
        warm_start: start the training of each round from the last policy instead of the backbone.
        finetune_steps: optimizer steps of each round after round 0; None: `train.steps`.
        compare_bc: after the last round, also train a policy on demonstrations only (behaviour cloning), with at least
            as many labels and the same number of optimizer steps, and compare the two policies.
        train: training configuration of each round, without datasets, folders and unnorm_keys.
        device: torch device for rollouts and evaluation; "auto" chooses one.
        resume: continue the run in `out`; rounds, labels, target, compare_bc and hosts may differ.
    """

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
    hosts: HostsConfig = HostsConfig()

    def contradiction(self) -> str | None:
        seeds = range(self.seed, self.seed + ROUNDS_APART * (self.rounds + 1))
        evaluated = range(self.eval_seed, self.eval_seed + self.eval_episodes)
        if not self.env:
            return "env must be one or more environment ids."
        if evaluated.start < seeds.stop and seeds.start < evaluated.stop:
            return f"eval_seed must not overlap the training seeds, {seeds[0]} to {seeds[-1]}; got {self.eval_seed}."
        for name in ("data", "weights", "unnorm_keys", "out", "resume", "dry_run"):
            if getattr(self.train, name) != getattr(TrainConfig(), name):
                return f"`vla dagger` sets train.{name}; omit it."
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Strict):
    """`vla quickstart`: collect demonstrations of a new task, fine-tune the built-in backbone with LoRA, and evaluate
    it before and after.

    Attributes:
        env: environment id of the task.
        demonstrations: number of successful expert episodes to collect.
        minutes: approximate training time in minutes, for a number of steps between `min_steps` and 4000.
        min_steps: minimum number of optimizer steps.
        episodes: number of rollouts on unseen seeds, before and after training.
        out: output folder; finished stages are not repeated.
        fresh: repeat all stages.
    """

    env: str = "envs:vla/OpenDrawer-v0"
    demonstrations: Count = 150
    minutes: NonNegative = 5.0
    min_steps: Count = 300
    episodes: Count = 20
    out: Path = Path("runs/quickstart")
    fresh: bool = False
