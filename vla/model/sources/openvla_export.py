"""Writing a policy in OpenVLA's published layout (Kim et al., arXiv:2406.09246), for OpenVLA's own code.

Owns: the JSON files, and the check that the format can express the policy. Robot, chunk length and image transform are
written to the field `vla` of config.json, which OpenVLA's code ignores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vla.errors import ConfigError
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.model.sources import openvla_layout
from vla.model.sources.openvla import (
    ARCHITECTURE,
    FILE,
    IMAGE_SIZE,
    LLAMA,
    PREPROCESSOR,
    PROMPT,
    SPACE,
    STATISTICS,
    TIMM,
    TOWER,
)


def write(network: VLAForActionPrediction, processor: VLAProcessor, folder: Path) -> None:
    """Write a policy to an existing folder. config.json is written last, so that an incomplete folder does not load.

    If a chunk has several actions, OpenVLA's own code decodes only the first one.

    Raises:
        ConfigError: OpenVLA's code does not support a property of this policy.
    """
    config = network.config
    _check_expressible(config)
    openvla_layout.save(network, folder)
    _save_tokenizer(processor.tokenizer, folder)
    end, pad = config.action_token_begin + config.n_action_rows, processor.tokenizer.pad_token_id
    preprocessor = {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": ARCHITECTURE["image_resize_strategy"],
        "input_sizes": [[3, IMAGE_SIZE, IMAGE_SIZE]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": config.image_mean,
        "stds": config.image_std,
    }
    statistics = {key: _their_statistics(config, key) for key in config.statistics}
    text, rope = config.text_config.to_dict(), config.text_config.rope_parameters
    values = ARCHITECTURE | {
        "architectures": ["OpenVLAForActionPrediction"],
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_sizes": [IMAGE_SIZE] * 2,
        "llm_max_length": 2048,
        "norm_stats": statistics,
        "output_projector_states": False,
        "pad_to_multiple_of": config.vocab_size - end,
        "pad_token_id": pad,
        "text_config": {name: text[name] for name in LLAMA if name in text} | {"rope_theta": rope["rope_theta"]},
        "timm_model_ids": [_timm_name(tower) for tower in config.vision_configs],
        "timm_override_act_layers": [None, None],
        "torch_dtype": str(network.dtype).removeprefix("torch."),
        "use_fused_vision_backbone": True,
        "vla": {
            "robot": config.robot,
            "horizon": config.horizon,
            "n_action_steps": config.n_action_steps,
            "image_transform": config.image_transform,
        },
    }
    for name, content in ((PREPROCESSOR, preprocessor), (STATISTICS, statistics), (FILE, values)):
        (folder / name).write_text(json.dumps(content, indent=2))


def _check_expressible(config: VLAConfig) -> None:
    """Raise ConfigError if the policy has properties that OpenVLA's code does not support."""
    robot, tokenizer = config.robot_spec, config.make_action_tokenizer()
    needed = {
        "a LLaMA decoder without rope scaling": config.text_config.model_type == "llama"
        and config.text_config.rope_parameters["rope_type"] == "default",
        "the towers DINOv2 with registers and SigLIP": all(map(_timm_name, config.vision_configs))
        and [tower.model_type for tower in config.vision_configs] == ["dinov2_with_registers", "siglip_vision_model"],
        "OpenVLA's projector": isinstance(config.projector_hidden, list) and config.vision_feature_layer == -2,
        "images before the prompt": config.layout == "image_first",
        "one camera": len(robot.cameras) == 1,
        "no state": not config.use_state,
        "no latent": config.latent == "none",
        "the tokenizer 'openvla'": tokenizer.name == "openvla",
        "a token for every action entry": tokenizer.active == list(range(robot.action_dim)),
        f"the prompt {PROMPT!r}, ended by id {SPACE}": config.prompt == PROMPT and config.prompt_end == [SPACE],
    }
    if lacking := [what for what, given in needed.items() if not given]:
        raise ConfigError(
            f"OpenVLA's format needs {'; '.join(lacking)}, but this policy differs. Only policies trained from an "
            "OpenVLA checkpoint can be written in it."
        )


def _timm_name(tower: Any) -> str | None:
    """timm's name of a tower; None if OpenVLA has no such tower."""
    values = tower.to_dict()
    wanted = ((name, known | TOWER) for name, known in TIMM.items())
    return next((name for name, known in wanted if all(values.get(k) == v for k, v in known.items())), None)


def _their_statistics(config: VLAConfig, key: str) -> dict[str, Any]:
    """The statistics of a dataset for OpenVLA's code, which un-normalises x to (x + 1) / 2 (q99 - q01) + q01.

    This package has more normalisation methods, and special rules for entries that hardly move. In its own statistics,
    q01 and q99 are therefore replaced by the values that -1 and 1 un-normalise to.
    """
    stored = config.statistics[key]
    if "moving" not in stored["action"]:
        return stored
    normalizer = config.action_normalizer(key)
    bounds = {"q01": normalizer.offset - normalizer.scale, "q99": normalizer.offset + normalizer.scale}
    kept = {name: stored["action"][name] for name in ("mean", "std", "min", "max")}
    action = kept | {name: values.tolist() for name, values in bounds.items()} | {"mask": normalizer.mask.tolist()}
    counts = {"num_transitions": stored.get("num_frames"), "num_trajectories": stored.get("num_episodes")}
    return {"action": action} | {name: count for name, count in counts.items() if count is not None}


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer for the older transformers version that OpenVLA's code needs."""
    tokenizer.save_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    values = special | {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "PrismaticProcessor",
        "model_max_length": 2048,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
