"""Loading pretrained parts from folders and from the Hugging Face Hub: configurations, text tokenizers, weights and
image normalisation.

Owns: strict loading. Parts that are missing, damaged, quantised, pickled or of the wrong kind raise an error before
training starts. It does not know how parts become a policy.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from vla.errors import CheckpointError, ConfigError, VLAError
from vla.model.vision import adapter
from vla.support.locations import missing_folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. CheckpointError if it cannot be read, is truncated or is not an object."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. The file is damaged or incomplete; copy it again."
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must contain a JSON object, got {type(values).__name__}.")
    return values


@contextlib.contextmanager
def errors_as(kind: type[VLAError], what: str) -> Iterator[None]:
    """Convert errors to a `kind` whose message begins with `what`. Errors of this package stay as they are."""
    try:
        yield
    except VLAError:
        raise
    except Exception as error:  # damaged files, and values of any type, raise various errors
        raise kind(f"{what}: {error}") from error


def model_type(name: str) -> str | None:
    """The `model_type` in the config.json of a folder or hub id; None if there is none or the hub cannot be reached."""
    if missing_folder(name):
        return None
    if Path(name).is_dir():
        path = Path(name) / "config.json"
    elif name.count("/") == 1:
        optional = ("missing_entries", "gated_repo", "connection_errors")
        path = cached_file(name, "config.json", **{f"_raise_exceptions_for_{what}": False for what in optional})
    else:
        return None
    return read_json(Path(path)).get("model_type") if path and Path(path).is_file() else None


def load_config(name: str, what: str) -> PreTrainedConfig:
    """Load the configuration of a model. ConfigError if that fails or the model is quantised."""
    config = _load(AutoConfig, name, what)
    if method := getattr(config, "quantization_config", None):
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else type(method).__name__
        raise ConfigError(
            f"{what} {name!r} is quantised ({method}); training needs unquantised weights. Name the original model."
        )
    # The attention implementation depends on this machine; one named in a checkpoint could download code.
    config._attn_implementation = None
    return config


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load the text tokenizer of a language model, with a padding token. ConfigError on failure."""
    return with_padding(_load(AutoTokenizer, name, "text tokenizer"), vocab_size)


def with_padding(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    """Set the padding token of a tokenizer if it has none within the vocabulary."""
    if tokenizer.pad_token_id is None or not 0 <= tokenizer.pad_token_id < vocab_size:
        # Padding is masked, so any token is suitable.
        others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0)
        known = next(token for token in others if token is not None and 0 <= token < vocab_size)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    return tokenizer


def load_model(auto: Any, name: str, what: str, config: PreTrainedConfig, foreign: bool = False) -> Any:
    """Load a model in float32. ConfigError if that fails or the weights do not match `config` exactly.

    Args:
        auto: the transformers auto class.
        name: folder or hub id.
        what: the role of the model, for error messages.
        config: the model's configuration.
        foreign: ignore weights of other models in the folder, such as the text tower of a SigLIP model.
    """
    options = {"dtype": torch.float32, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # `misfit` reports mismatches below
    model, info = _load(auto, name, what, config=config, **options)
    if foreign:
        own = {key.split(".")[0] for key in model.state_dict()} | {"vision_model"}
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if key.split(".")[0] in own]
    if problem := misfit(info):
        raise ConfigError(
            f"{what} {name!r}: its weights do not fit its config.json ({problem}). Check that the folder is complete "
            "and contains only this model."
        )
    return model


def misfit(info: dict[str, Any]) -> str | None:
    """A description of the weights that do not fit, from transformers' loading info; None if all weights fit."""
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := info.get(what):
            some = ", ".join(sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)[:3])
            return f"{what.replace('_', ' ')}: {some}{', ...' if len(keys) > 3 else ''}"
    return None


def check_tower(name: str, vision: PreTrainedConfig, image_size: int, layer: int) -> None:
    """Raise ConfigError if a tower does not accept images of this size or returns features of an unexpected shape. The
    check runs on the meta device, without weights."""
    if getattr(vision, "num_channels", 3) != 3:
        raise ConfigError(f"vision tower {name!r} needs images with {vision.num_channels} channels, not RGB.")
    try:
        with torch.device("meta"), torch.no_grad():
            images = torch.zeros(2, 3, image_size, image_size)
            shape = tuple(adapter(vision).features(AutoModel.from_config(vision).eval(), images, layer).shape)
    except Exception as error:  # the forward of an arbitrary model can raise any error
        raise ConfigError(
            f"vision tower {name!r} ({vision.model_type}) rejects images of {image_size} pixels: {_first_line(error)}"
        ) from error
    tokens = adapter(vision).tokens_per_image(vision, image_size)
    if len(shape) != 3 or shape[0] != 2 or shape[1] < tokens or shape[2] != adapter(vision).width(vision):
        raise ConfigError(
            f"vision tower {name!r} ({vision.model_type}) returns features {list(shape)} for two images, expected [2, "
            f"{tokens}, {adapter(vision).width(vision)}]. Use a SigLIP, DINOv2 or CLIP tower."
        )


def image_statistics(name: str, vision: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """Mean and std of the tower's image processor, three values each, for images scaled to [0, 1]. If it has none,
    those of the tower's family, with a warning."""
    stored = _image_processor(name)
    if any(stored.get(option) for option in ("offset", "rescale_offset", "do_flip_channel_order")):
        raise ConfigError(
            f"vision tower {name!r}: its image processor shifts values or reorders channels, which is not supported."
        )
    if not stored.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    elif "image_mean" in stored and "image_std" in stored:
        mean, std = _three(stored["image_mean"], name, "image_mean"), _three(stored["image_std"], name, "image_std")
    else:
        family = adapter(vision)
        warnings.warn(
            f"vision tower {name!r} has no image_mean and image_std; using {list(family.mean)} and {list(family.std)}.",
            stacklevel=2,
        )
        mean, std = list(family.mean), list(family.std)
    # (p f - mean) / std = (p / 255 - mean / 255 f) / (std / 255 f) for pixels p and a rescale factor f.
    factor = 255 * stored.get("rescale_factor", 1 / 255) if stored.get("do_rescale", True) else 255.0
    if not factor > 0 or min(std) <= 0:
        raise ConfigError(f"vision tower {name!r}: rescale_factor and image_std must be positive.")
    if abs(factor - 1) < 1e-6:
        return list(mean), list(std)
    return [value / factor for value in mean], [value / factor for value in std]


def _image_processor(name: str) -> dict[str, Any]:
    """Image processor settings from processor_config.json, else from preprocessor_config.json, else empty."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        stored = read_json(Path(path)) if path else {}
        if file == "processor_config.json":
            stored = stored.get("image_processor") or {}
        if stored:
            return stored
    return {}


def _three(values: Any, name: str, field: str) -> list[float]:
    numbers = [values] * 3 if isinstance(values, (int, float)) else values
    if not isinstance(numbers, Iterable) or len(numbers := list(numbers)) != 3:
        raise ConfigError(f"vision tower {name!r}: {field} must be three numbers, got {values!r}.")
    return [float(number) for number in numbers]


def _load(auto: Any, name: str, what: str, **kwargs: Any) -> Any:
    if problem := missing_folder(name):
        raise ConfigError(f"{what} {name!r}: {problem}")
    try:
        return auto.from_pretrained(name, **kwargs)
    except Exception as error:  # loading an arbitrary folder can raise any error
        if not Path(name).exists() and "connect" in str(error):
            raise ConfigError(
                f"{what} {name!r}: there is no such folder, and the Hugging Face hub could not be reached (no "
                "connection, or HF_HUB_OFFLINE is set). Download the model first, or pass a local folder."
            ) from error
        pickled = list(Path(name).glob("*.bin")) and not list(Path(name).glob("*.safetensors"))
        remedy = (
            "Its weights are pickle files, which are not read because they can run code. Save them as safetensors."
            if pickled
            else "Expected the built-in 'nano', a checkpoint folder of this package, or a folder or hub id that "
            "transformers can load."
        )
        raise ConfigError(f"cannot load {what} {name!r}: {_first_line(error)}\n{remedy}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
