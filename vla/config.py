"""Configuration: one frozen dataclass per job, read strictly from YAML, overridden by flags.

Owns: the fields, types and defaults of every job, and how a YAML file becomes one of them (default < YAML < flag). It
does not know what the jobs do with the values; each job checks what only it can check (that a path exists, that an
environment id is registered).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import pydantic
import yaml

from vla.errors import ConfigError, unknown

Config = TypeVar("Config")

# Unknown keys are errors; "1e-4", which PyYAML reads as text, still becomes a number.
STRICT = pydantic.ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Where a Gymnasium environment keeps its images, state, instruction and success. The defaults fit this package's
    environments; another environment is described by these values alone.

    Attributes:
        module: imported before `gymnasium.make`, so that it can register its ids (the "module" of "module:id").
        kwargs: passed to `gymnasium.make`.
        images: camera name -> dotted path into the observation, e.g. {"top": "pixels"}; empty: every entry of
            observation["pixels"]. The path "render()" takes `env.render()`.
        flip: cameras whose image is upside down (rotated by 180 degrees).
        state: dotted paths into the observation, concatenated; empty: a policy without proprioception.
        instruction: a fixed instruction; None takes info["instruction"], else the attribute `task_description`.
        success: dotted path into `info`; the episode is a success while it is true (>= 0.5).
        expert: where demonstrations come from: "env" (the environment's own `make_expert`), "random", or
            "module:callable", called with (env, seed), which returns an object with `act() -> action`.
        robot: properties of the RobotSpec that the environment does not state itself (action_names, control_hz, ...).
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
    max_steps: int | None = None


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
    episodes: int = 50
    seed: int = 0
    noise: float = 0.0
    noise_share: float = 0.5
    keep: Literal["success", "all"] = "success"
    workers: int = 0
    resume: bool = False
    adapter: AdapterConfig = AdapterConfig()


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """`vla inspect`: print and plot what is in a dataset, and what is wrong with it.

    Attributes:
        data: dataset folder.
        out: where the plots and the page go; None: `<data>/inspect`.
        bins: bins of the action tokenizer whose edges are drawn.
    """

    __pydantic_config__ = STRICT
    data: Path = Path("datasets/demos")
    out: Path | None = None
    bins: int = 256


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
    episodes: int = 10
    out: Path | None = None
    adapter: AdapterConfig = AdapterConfig()


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What `vla train` adapts. `targets` are module names of the decoder, as in peft."""

    __pydantic_config__ = STRICT
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
    shift: float = 0.04
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    committed: float = 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy to train. None means: as in the checkpoint that is trained further, else a default.

    Attributes:
        backbone: "nano" (the embedded policy; the default of `vla train`), "nano-init" (its architecture, untrained;
            the default of `vla pretrain`), "small-init" (a larger one for GPUs, untrained), a checkpoint of this
            package, or a folder or hub id of a LLaMA-architecture causal language model.
        vision: folders or hub ids of SigLIP/DINOv2/CLIP towers, fused on the feature axis; for a language
            model only.
        cameras: which of the dataset's cameras, in this order; empty: all.
        image_size: side of the square image in pixels; None: what the vision tower was built for, as a checkpoint's is.
        use_state: give the policy `agent_pos`.
        horizon: actions per chunk, H; 8 by default.
        n_action_steps: actions executed before the next chunk is predicted; half the horizon by default.
        bins: bins per action entry; 255 by default.
        tokenizer: action tokenizer, see `vla.actions.tokenizer`.
        normalization: "q01_q99", "min_max" or "mean_std".
        prompt: prompt template, see `vla.prompt`; "plain" by default.
        freeze_vision: do not train the vision tower.
    """

    __pydantic_config__ = STRICT
    backbone: str | None = None
    vision: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    image_size: int | None = None
    use_state: bool = True
    horizon: int | None = None
    n_action_steps: int | None = None
    bins: int | None = None
    tokenizer: str = "uniform"
    normalization: Literal["q01_q99", "min_max", "mean_std"] = "q01_q99"
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
        precision: "auto" is bf16 where the hardware computes it natively, else float32.
        val_fraction: share of episodes held out for validation.
        rollout_every: optimizer steps between closed-loop evaluations in `rollout_env` (through `adapter`); 0: none.
        report_to: "none", "tensorboard", "trackio" or "wandb".
        resume: continue the run in `out` from its last checkpoint.
        dry_run: check configuration, data, shapes and memory, take one step, write nothing.
    """

    __pydantic_config__ = STRICT
    data: tuple[Path, ...] = (Path("datasets/demos"),)
    weights: tuple[float, ...] = ()
    unnorm_keys: tuple[str, ...] = ()
    out: Path = Path("runs/train")
    model: ModelConfig = ModelConfig()
    method: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    augment: AugmentConfig = AugmentConfig()
    steps: int = 2000
    batch_size: int = 64
    grad_accum: int = 1
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    compile: bool = False
    workers: int = 0
    seed: int = 0
    val_fraction: float = 0.05
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 20
    keep_checkpoints: int = 2
    rollout_every: int = 0
    rollout_env: tuple[str, ...] = ()
    rollout_episodes: int = 10
    adapter: AdapterConfig = AdapterConfig()
    report_to: str = "none"
    resume: bool = False
    dry_run: bool = False


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
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    readout: Literal["mode", "mean"] = "mode"
    ensemble: float | None = None
    max_actions: int | None = None
    sampling_seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether tokens are chosen as greedy decoding chooses them."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return self.temperature == 0 and self.num_beams == 1 and penalties == (1, 0, 0)

    def check(self) -> None:
        """ConfigError for values that no strategy has."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.num_beams < 1:
            raise ConfigError(
                "decoding needs temperature >= 0, top_k >= 0, 0 < top_p <= 1 and num_beams >= 1; got "
                f"{self.temperature}, {self.top_k}, {self.top_p}, {self.num_beams}."
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p choose among samples; give a temperature, 1.0 for the network's own.")
        if self.temperature and self.num_beams > 1:
            raise ConfigError("beam search does not sample: give a temperature or num_beams, not both.")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be positive (1 is none), got {self.repetition_penalty}.")
        if self.max_actions is not None and self.max_actions < 1:
            raise ConfigError(f"max_actions must be at least 1, got {self.max_actions}.")


GREEDY = DecodingConfig()


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """`vla rollout`: evaluate a policy closed loop on environments x seeds.

    Attributes:
        policy: "nano", a run folder, a checkpoint folder, or the address of a `vla serve` ("ws://host:8000").
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
    episodes: int = 20
    seed: int = 100_000
    n_envs: int = 10
    n_action_steps: int | None = None
    unnorm_key: str | None = None
    decoding: DecodingConfig = GREEDY
    videos: int = 3
    out: Path = Path("runs/rollout")
    compare: Path | None = None
    device: str = "auto"
    overwrite: bool = False
    adapter: AdapterConfig = AdapterConfig()


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """`vla benchmark metaworld`: a policy on Meta-World's tasks as papers report it. Done again with the same `out`, it
    plays what is missing; only `n_envs` and `videos` may have changed.

    Attributes:
        policy: "nano", a run folder, a checkpoint folder, or the address of a `vla serve` ("ws://host:8000").
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
    episodes: int = 10
    seed: int = 100_000
    n_envs: int = 5
    n_action_steps: int | None = None
    unnorm_key: str | None = None
    decoding: DecodingConfig = GREEDY
    videos: int = 1
    out: Path = Path("runs/metaworld-benchmark")
    device: str = "auto"
    adapter: AdapterConfig = AdapterConfig()


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
    max_age_s: float = 0.5
    max_frozen_s: float | None = None
    max_change: float | None = None
    max_velocity: dict[str, float] = dataclasses.field(default_factory=dict)
    max_acceleration: dict[str, float] = dataclasses.field(default_factory=dict)
    workspace: dict[str, tuple[str, float, float]] = dataclasses.field(default_factory=dict)
    max_entropy: float | None = None


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
            the result folder after every fault; 0: none.
    """

    __pydantic_config__ = STRICT
    hz: float | None = None
    seam: Literal["switch", "ensemble", "committed"] = "switch"
    trust: float = 0.5
    injected_latency_s: float = 0.0
    black_box_s: float = 30.0
    safety: SafetyConfig = SafetyConfig()


@dataclasses.dataclass(frozen=True)
class DeployConfig:
    """`vla deploy`: run a policy on a simulated robot in real time, where the world does not wait for it.

    Attributes:
        policy: "nano", a run folder, a checkpoint folder, or the address of a `vla serve` ("ws://host:8000").
        env: environment id of the simulated robot.
        replay: a dataset folder: its episodes are played in real time instead, and what the policy commands is
            compared with what was demonstrated.
        episodes: episodes, one after the other; episode i uses seed + i. None: until it is stopped.
        seconds: longest time of an episode.
        out: folder of `deploy.json` and of the black boxes.
        ui: serve the live page: cameras, instruction, hold and emergency stop.
        host, port: where the live page is; port 0 takes a free one.
    """

    __pydantic_config__ = STRICT
    policy: str = "nano"
    env: str = "envs:vla/PickUp-v0"
    replay: Path | None = None
    episodes: int | None = None
    seed: int = 100_000
    seconds: float = 30.0
    out: Path = Path("runs/deploy")
    ui: bool = True
    host: str = "127.0.0.1"
    port: int = 8080
    n_action_steps: int | None = None
    unnorm_key: str | None = None
    device: str = "auto"
    control: ControlConfig = ControlConfig()
    adapter: AdapterConfig = AdapterConfig()


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
        policy: "nano", a run folder or a checkpoint folder.
        host, port: where to listen; only this machine can connect unless told otherwise ("0.0.0.0").
        keys: what clients call things, where it cannot be told from their requests.
        max_batch: observations of different clients that are decoded together.
        max_queue: requests that may wait; more are refused.
        max_request_mb: largest request.
        patience_s: time that a client has to send a request once it has begun.
        certificate, private_key: files in PEM format; both: TLS.
        tracebacks: send them to clients, as openpi's own server does; they show paths and code.
    """

    __pydantic_config__ = STRICT
    policy: str = "nano"
    host: str = "127.0.0.1"
    port: int = 8000
    unnorm_key: str | None = None
    n_action_steps: int | None = None
    device: str = "auto"
    decoding: DecodingConfig = GREEDY
    keys: KeysConfig = KeysConfig()
    max_batch: int = 32
    max_queue: int = 256
    max_request_mb: float = 32.0
    patience_s: float = 10.0
    certificate: Path | None = None
    private_key: Path | None = None
    tracebacks: bool = False


@dataclasses.dataclass(frozen=True)
class ExposureConfig:
    """`vla analyze exposure`: what a policy loses by reading its own tokens instead of the demonstrator's.

    Attributes:
        policy: "nano", a run folder or a checkpoint folder.
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
    frames: int = 2000
    batch_size: int = 32
    unnorm_key: str | None = None
    device: str = "auto"


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
    demonstrations: int = 150
    minutes: float = 5.0
    min_steps: int = 300
    episodes: int = 20
    out: Path = Path("runs/quickstart")
    fresh: bool = False


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
        episodes: roll-ins per round; they are kept, solved or not.
        labels: no round begins once the expert has labelled so many frames; None: no such limit.
        target: share of successes, 0 to 1, at which it ends.
        beta: in round k the expert drives with probability beta ** k; 0: never after round 0; 1: always.
        mixture: when it is decided who drives: at every "decision" of the policy (for the actions of a chunk that are
            executed), at every "step", or once per "episode".
        seed: first environment seed of round 0; the roll-ins of round k begin at seed + 10000 * k.
        n_envs: environments stepped side by side.
        eval_episodes, eval_seed: closed-loop evaluation after each round, per environment.
        finetune_steps: optimizer steps of each round after round 0; None: `train.steps`.
        compare_bc: at the end also train on demonstrations alone, with as many labels and optimizer steps, and compare.
        train: how each round trains; its data, folders and names of statistics are this job's.
        resume: continue what is in `out`; it may be given more rounds, labels, another target, or `compare_bc`.
    """

    __pydantic_config__ = STRICT
    env: tuple[str, ...] = ("envs:vla/OpenDrawer-v0",)
    out: Path = Path("runs/dagger")
    data: tuple[Path, ...] = ()
    demonstrations: int = 50
    noise: float = 0.0
    noise_share: float = 0.5
    rounds: int = 4
    episodes: int = 50
    labels: int | None = None
    target: float = 0.95
    beta: float = 0.5
    mixture: Literal["decision", "step", "episode"] = "decision"
    seed: int = 0
    n_envs: int = 10
    eval_episodes: int = 50
    eval_seed: int = 100_000
    finetune_steps: int | None = None
    compare_bc: bool = False
    train: TrainConfig = TrainConfig()
    device: str = "auto"
    resume: bool = False
    adapter: AdapterConfig = AdapterConfig()


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


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "configuration") -> Config:
    """Build `cls` from plain values, strictly: unknown keys and wrong types are ConfigErrors that name the key."""
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, problem, where) for problem in error.errors())) from None


def load(cls: type[Config], path: str | Path) -> Config:
    """Read a YAML file into `cls`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(values).__name__}.")
    return from_dict(cls, values, str(path))


def dump(config: Any, path: str | Path) -> None:
    """Write a configuration as YAML that `load` reads back to an equal object; a reader sees all of it or none."""
    scratch = Path(path).with_suffix(".partial")
    scratch.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    scratch.replace(path)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values (paths as text, tuples as lists)."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def _explain(cls: Any, problem: Any, where: str) -> str:
    *parents, key = [str(part) for part in problem["loc"]] or [""]
    name = ".".join([*parents, key])
    if problem["type"] == "unexpected_keyword_argument":
        for parent in parents:
            cls = get_type_hints(cls)[parent]
        return f"{where}: {unknown('key', name, [f.name for f in dataclasses.fields(cls)])}"
    return f"{where}: {name}: {problem['msg']}, got {problem['input']!r}."
