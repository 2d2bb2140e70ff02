"""Building a policy network and its processor.

Owns: the choice of the source of weights, and the fields of a checkpoint that depend on the data and the `ModelConfig`:
robot, statistics, action tokenizer, horizon and prompt. It does not know training.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vla.config import ModelConfig
from vla.errors import ConfigError, unknown
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.model.sources import checkpoint, gguf, idefics3, llava, openvla, untrained  # noqa: F401  (they register themselves)
from vla.model.sources.base import SOURCES
from vla.model.sources.composed import Composed
from vla.model.sources.fast_files import is_published, load_fast
from vla.spec import RobotSpec
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """Properties of the demonstrations that a policy needs.

    Attributes:
        robot: the RobotSpec, with all cameras of the dataset.
        statistics: unnorm_key -> {"action": ..., "state": ...}, from `compute_statistics`.
        actions: unnorm_key -> float32 [N, D], all actions; the action tokenizer is fitted to them.
    """

    robot: RobotSpec
    statistics: dict[str, dict[str, Any]]
    actions: dict[str, np.ndarray]


def build_policy(model: ModelConfig, facts: DataFacts) -> tuple[VLAForActionPrediction, VLAProcessor]:
    """Build the network to train and its processor.

    Raises:
        ConfigError: `model` is invalid or does not fit the data.
        CheckpointError: a checkpoint is damaged or incomplete.
    """
    robot, name = _choose_cameras(facts.robot, model.cameras), model.backbone or "nano"
    found = (kind for kind in map(SOURCES.get, SOURCES) if kind.probe(name))
    source = next(found, Composed)(name, model)
    config = source.config()
    _check_tower(config, model, name)
    _set_policy(config, model, facts, robot)
    if source.trained:
        check_room(config, name)
    else:
        _make_room(config)
    network, tokenizer = source.load(config)
    _set_latent(network, model)
    _set_word_order(network, model)
    return network, VLAProcessor(network.config, tokenizer)


def _check_tower(config: VLAConfig, model: ModelConfig, backbone: str) -> None:
    """Raise ConfigError if `keypoints` or `grid` in `model` differ from the backbone's vision tower."""
    for option in ("keypoints", "grid"):
        asked, has = getattr(model, option), {getattr(tower, option, None) for tower in config.vision_configs}
        if asked is not None and has != {asked}:
            raise ConfigError(
                f"{option} {asked} does not fit the existing vision tower of {backbone!r}. Omit it, or start from "
                "'nano-init' or 'small-init'."
            )


def _set_latent(network: VLAForActionPrediction, model: ModelConfig) -> None:
    """Give `network` the latent of `model`. The size and form of an existing latent cannot change."""
    config = network.config
    kind, kappa = model.latent or config.latent, model.latent_kappa or config.latent_kappa
    if config.latent == "none":
        if kind != "none":
            bits, form = model.latent_bits or config.latent_bits, model.latent_form or config.latent_form
            network.add_latent(kind, bits, form, kappa)
        return
    for name, trained in (("latent_bits", config.latent_bits), ("latent_form", config.latent_form)):
        if (value := getattr(model, name)) not in (None, trained):
            raise ConfigError(f"{name} of this checkpoint is {trained} and cannot become {value}; omit it.")
    if kind == "none":
        raise ConfigError("this checkpoint was trained with a latent, which cannot be removed; omit `latent`.")
    config.latent, config.latent_kappa = kind, kappa


def _set_word_order(network: VLAForActionPrediction, model: ModelConfig) -> None:
    if model.word_order and not network.sees_word_order:
        network.add_word_order()
    if model.word_order is False and network.sees_word_order:
        raise ConfigError("this checkpoint was trained with word_order, which cannot be removed; omit it.")


def _make_room(config: VLAConfig) -> None:
    """Increase an untrained network's limits to the number of cameras and the state dimension of the data."""
    robot = config.robot_spec
    config.max_cameras = max(config.max_cameras, len(robot.cameras))
    if config.use_state:
        config.max_state_dim = max(config.max_state_dim, robot.state_dim)


def check_room(config: VLAConfig, backbone: str) -> None:
    """Raise ConfigError if the data has more cameras or state dimensions than a trained network supports."""
    robot = config.robot_spec
    if len(robot.cameras) > config.max_cameras:
        raise ConfigError(
            f"the data has {len(robot.cameras)} cameras ({', '.join(robot.cameras)}); {backbone!r} supports at most "
            f"{config.max_cameras}. Select some with `cameras`, or start from 'nano-init', which has no limit."
        )
    if config.use_state and robot.state_dim > config.max_state_dim:
        raise ConfigError(
            f"the state has {robot.state_dim} entries; {backbone!r} supports at most {config.max_state_dim}. Disable "
            "the state (use_state false), or start from 'nano-init', which has no limit."
        )


def _set_policy(config: VLAConfig, model: ModelConfig, facts: DataFacts, robot: RobotSpec) -> None:
    """Write the policy fields into `config`: robot, statistics, tokenizer, horizon, prompt.

    If `config` is that of a trained checkpoint, fields that are unset in `model` keep their values.
    """
    before = config.action_tokenizer or {}
    config.robot, config.statistics = robot.to_dict(), facts.statistics
    config.use_state = config.use_state if model.use_state is None else model.use_state
    config.normalization = model.normalization or config.normalization
    config.prompt = model.prompt or config.prompt
    config.image_transform = model.image_transform or config.image_transform
    config.horizon = model.horizon or config.horizon
    kept = config.n_action_steps if before and model.horizon is None else max(1, config.horizon // 2)
    config.n_action_steps = model.n_action_steps or kept
    if not 1 <= config.n_action_steps <= config.horizon:
        raise ConfigError(f"n_action_steps {config.n_action_steps} must be between 1 and the horizon {config.horizon}.")
    normalizers = {key: config.action_normalizer(key) for key in facts.statistics}
    constant = np.logical_and.reduce([normalizer.constant for normalizer in normalizers.values()])
    if constant.all():
        raise ConfigError("all actions in this data are constant, so a policy cannot be trained on it.")
    active = np.flatnonzero(~constant).tolist()
    normalized = np.concatenate([normalizers[key].normalize(actions) for key, actions in facts.actions.items()])
    name = model.tokenizer or before.get("name", "uniform")
    if model.bins is not None and model.bins > config.n_action_rows:
        raise ConfigError(
            f"bins is {model.bins}, but {model.backbone!r} has {config.n_action_rows} ids for action tokens. Only a "
            "language model as backbone reserves more."
        )
    if name not in TOKENIZERS and is_published(name):
        rows = model.bins or config.n_action_rows
        tokenizer: ActionTokenizer = load_fast(name, config.horizon, robot.action_dim, rows, active)
    else:
        bins = model.bins or (before.get("n_bins") if name == before.get("name") else None)
        tokenizer = TOKENIZERS.get(name).fit(normalized, config.horizon, bins, active)
    config.action_tokenizer = tokenizer.to_dict()
    config.check_policy()


def _choose_cameras(robot: RobotSpec, cameras: tuple[str, ...]) -> RobotSpec:
    for camera in cameras:
        if camera not in robot.cameras:
            raise ConfigError(unknown("camera", camera, robot.cameras, "`cameras` must name cameras of the dataset."))
    if not robot.cameras:
        raise ConfigError("the dataset has no camera; an image policy needs at least one.")
    return dataclasses.replace(robot, cameras=cameras or robot.cameras)
