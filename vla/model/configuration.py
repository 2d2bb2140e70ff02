"""VLAConfig: the complete description of a checkpoint, stored in one config.json.

Owns: the fields, and the errors for missing or inconsistent ones. A checkpoint whose actions are ambiguous does not
load. It does not build networks or read data.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from vla.errors import CheckpointError, ConfigError, SpecError, unknown
from vla.spec import RobotSpec
from vla.transforms.images import TRANSFORMS
from vla.transforms.normalize import Normalizer
from vla.transforms.prompt import check_template
from vla.transforms.tokenizers.base import ActionTokenizer, build

STATE_LIMIT = 3.0  # normalised states are clipped at 3, not 1, because they may leave the range of the data
LAYOUTS = ("instruction_first", "image_first")
LATENTS = ("none", "token", "chunk", "episode")
N_ACTION_ROWS = 256  # number of ids that a new policy reserves for action tokens, at least


@strict
class VLAConfig(PreTrainedConfig):
    """Configuration of `VLAForActionPrediction`.

    Network:
        text_config: the decoder, a LLaMA-architecture causal language model.
        vision_configs: the vision towers. Features of several towers are concatenated per patch.
        vision_feature_layer: which hidden states of a tower are its features, as in `vla.model.vision.Tower.features`.
        image_mean, image_std: per tower, three values each, for images scaled to [0, 1].
        projector_layers: number of linear layers from vision to language width, with GELU in between.
        projector_hidden: width between consecutive layers, or a list of these widths; None: the decoder's width.
        max_state_dim: width of the state input; shorter states are padded with zeros.
        max_cameras: number of camera embeddings.

    Sequence:
        layout: "instruction_first" ([BOS] prompt, images, state) or "image_first" ([BOS] images, state, prompt).
        image_token_id, state_token_id: placeholder ids in `input_ids`, replaced by image and state features.
        action_token_begin: id of the first action token; the tokenizer's id k becomes `action_token_begin + k`.
        n_action_rows: number of ids reserved for action tokens.

    Latent of a Free Transformer:
        latent: "none", or one latent per "token", "chunk" or "episode".
        latent_bits, latent_form: size and form, see `vla.model.free_transformer.Latent`.
        latent_kappa: bits per latent that are free in the loss.

    Policy (the meaning of an action):
        robot: RobotSpec as a dict: cameras in order, state and action names, gripper polarity, control rate, hold.
        image_size: side length of the square input images in pixels.
        image_transform: how images are resized, a key of `vla.transforms.images.TRANSFORMS`.
        prompt_end: ids that the tokenised prompt must end with; appended if it does not.
        use_state, horizon, n_action_steps, prompt, normalization: as in `vla.config.ModelConfig`.
        action_tokenizer: `ActionTokenizer.to_dict()`.
        statistics: unnorm_key -> {"action": {...}, "state": {...}}, see `vla.transforms.normalize`.
    """

    model_type = "vla"
    sub_configs: ClassVar = {"text_config": AutoConfig}

    text_config: Any = None
    vision_configs: Any = None
    vision_feature_layer: int = -1
    image_mean: list | None = None
    image_std: list | None = None
    projector_layers: int = 2
    projector_hidden: int | list[int] | None = None
    max_state_dim: int = 32
    max_cameras: int = 8
    layout: str = "instruction_first"
    image_token_id: int = 3
    state_token_id: int = 4
    action_token_begin: int = 0
    n_action_rows: int = 256
    latent: str = "none"
    latent_bits: int = 6
    latent_form: str = "one_hot"
    latent_kappa: float = 1.0
    robot: dict | None = None
    image_size: int = 224
    image_transform: str = "area"
    use_state: bool = True
    horizon: int = 8
    n_action_steps: int = 8
    prompt: str = "plain"
    prompt_end: Any = None
    normalization: str = "q01_q99"
    action_tokenizer: dict | None = None
    statistics: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _as_config(self.text_config or {"model_type": "llama"})
        self.vision_configs = [_as_config(values) for values in self.vision_configs or []]
        self.prompt_end = list(self.prompt_end or [])
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["vision_configs"] = [config.to_dict() for config in self.vision_configs]
        return values

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def robot_spec(self) -> RobotSpec:
        try:
            return RobotSpec.from_dict(self._needed("robot"))
        except SpecError as error:
            raise CheckpointError(f"config.json: robot: {error}") from None

    @property
    def n_latents(self) -> int:
        """Number of latents of a chunk."""
        return {"none": 0, "token": self.make_action_tokenizer().max_tokens}.get(self.latent, 1)

    def make_action_tokenizer(self) -> ActionTokenizer:
        values = self._needed("action_tokenizer")
        try:
            return build(values)
        except ConfigError as error:  # an unknown name, or wrong values
            raise CheckpointError(
                f"config.json: {error} If it is registered in your own module, import the module first."
            ) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: the action tokenizer {values} is not valid: {error}") from None

    def unnorm_key(self, key: str | None = None) -> str:
        """Validate `key`; None selects the only key. CheckpointError if the key is unknown, or None is ambiguous."""
        statistics = self._needed("statistics")
        if key is None:
            if len(statistics) != 1:
                raise CheckpointError(
                    f"this checkpoint has statistics of {len(statistics)} datasets; set unnorm_key to the one that "
                    f"un-normalises the actions: {', '.join(statistics)}."
                )
            return next(iter(statistics))
        if key not in statistics:
            raise CheckpointError(unknown("unnorm_key", key, statistics))
        return key

    def action_normalizer(self, key: str | None = None) -> Normalizer:
        statistics = self._needed("statistics")[self.unnorm_key(key)]
        action = statistics["action"]
        return Normalizer.from_statistics(action, self.normalization, action.get("mask"))

    def state_normalizer(self, key: str | None = None) -> Normalizer | None:
        statistics = self._needed("statistics")[self.unnorm_key(key)].get("state")
        if not self.use_state or not statistics:
            return None
        return Normalizer.from_statistics(statistics, self.normalization, limit=STATE_LIMIT)

    def check_policy(self) -> None:
        """Raise CheckpointError if a field that defines the meaning of an action is missing or inconsistent."""
        tokenizer, robot = self.make_action_tokenizer(), self.robot_spec
        check_template(self.prompt)
        if self.image_transform not in TRANSFORMS:
            raise CheckpointError(unknown("image transform", self.image_transform, TRANSFORMS))
        self._check_inputs(robot)
        if self.latent not in LATENTS:
            raise CheckpointError(unknown("latent", self.latent, LATENTS))
        if not 0 < self.latent_kappa < math.inf:
            raise CheckpointError(f"latent_kappa must be a positive number of bits, got {self.latent_kappa}.")
        if not 1 <= self.n_action_steps <= self.horizon:
            raise CheckpointError(
                f"n_action_steps {self.n_action_steps} is not between 1 and the horizon {self.horizon}."
            )
        for key in self._needed("statistics"):
            width = len(self.action_normalizer(key).scale)
            if width != robot.action_dim:
                raise CheckpointError(
                    f"statistics of {key!r} have {width} action entries, but the robot has {robot.action_dim}."
                )
        if (tokenizer.horizon, tokenizer.action_dim) != (self.horizon, robot.action_dim):
            raise CheckpointError(
                f"the action tokenizer has chunks [{tokenizer.horizon}, {tokenizer.action_dim}], but the policy needs "
                f"[{self.horizon}, {robot.action_dim}]. Restore the checkpoint's original config.json."
            )
        end = self.action_token_begin + tokenizer.vocab_size
        if tokenizer.vocab_size > self.n_action_rows or end > self.vocab_size:
            raise CheckpointError(
                f"the action tokens have the ids {self.action_token_begin} to {end - 1}, but {self.n_action_rows} ids "
                f"are reserved for them and the vocabulary has {self.vocab_size} ids."
            )

    def _check_inputs(self, robot: RobotSpec) -> None:
        """Raise CheckpointError if the fields of prefix, images and state are inconsistent."""
        if self.layout not in LAYOUTS:
            raise CheckpointError(unknown("layout", self.layout, LAYOUTS))
        if self.vision_feature_layer >= 0:
            raise CheckpointError(
                f"vision_feature_layer counts from the end: -1, -2, ...; got {self.vision_feature_layer}."
            )
        rows = range(self.action_token_begin, self.action_token_begin + self.n_action_rows)
        placeholders = (self.image_token_id, self.state_token_id)
        if len(set(placeholders)) < 2 or any(i in rows or not 0 <= i < self.vocab_size for i in placeholders):
            raise CheckpointError(
                f"image_token_id {self.image_token_id} and state_token_id {self.state_token_id} must be different, "
                f"below the vocabulary size {self.vocab_size}, and not reserved for action tokens."
            )
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if [len(tower) for tower in values or ()] != [3] * len(self.vision_configs):
                raise CheckpointError(f"{name} must be three values for each of {len(self.vision_configs)} towers.")

    def _needed(self, field: str) -> Any:
        value = getattr(self, field)
        if not value:
            raise CheckpointError(
                f"config.json has no `{field}`, which is needed to interpret the actions. Train or save the checkpoint "
                "with this package, or add the value of the original training run."
            )
        return value


def _as_config(values: dict | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(values, PreTrainedConfig):
        return values
    # A checkpoint's attention implementation is ignored: it depends on the machine and could download code.
    arguments = {name: value for name, value in values.items() if name != "attn_implementation"}
    return AutoConfig.for_model(arguments.pop("model_type"), **arguments)
