"""`vla export`: write a policy in another format.

Owns: the formats, the order of writing and uploading, and the printed summary. Weights keep the data type of the
policy's files, except in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vla.config import ExportConfig, check
from vla.decoding import onnx_export
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction
from vla.model.processing import VLAProcessor
from vla.model.sources import openvla_export
from vla.model.sources.checkpoint import find_checkpoint
from vla.policy import checkpoint, hub

FORMATS: dict[str, Callable[[VLAForActionPrediction, VLAProcessor, Path], None]] = {
    "vla": checkpoint.write,
    "hub": checkpoint.write,
    "openvla": openvla_export.write,
    "onnx": onnx_export.write,
}


def export(config: ExportConfig) -> Path:
    """Export a policy and return its new folder. The folder is written atomically.

    Raises:
        ConfigError, CheckpointError: the policy cannot be loaded or written in this format, or `out` is in use. Nothing
            is written.
        ServerError: the folder is complete, but the hub does not accept it.
    """
    check(config)
    if config.push is not None:
        hub.check_push(config.push)
    _check_output(config)
    network, processor = checkpoint.load(config.policy, dtype=None)
    model = network.config
    if config.unnorm_key is not None:
        key = model.unnorm_key(config.unnorm_key)
        model.statistics = {key: model.statistics[key]}
    model.image_transform = config.image_transform or model.image_transform
    processor = VLAProcessor(model, processor.tokenizer)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with checkpoint.atomic_folder(config.out) as scratch:
        FORMATS[config.format](network, processor, scratch)
        if config.format == "hub":
            training = hub.training_note(find_checkpoint(config.policy))
            card = hub.model_card(model, config.push or config.out.name, parameters, training)
            (scratch / "README.md").write_text(card)
    dtype = str(network.dtype).removeprefix("torch.")
    keys = ", ".join(model.statistics)
    print(f"wrote {config.out}: {parameters / 1e6:.1f} M parameters in {dtype}, unnorm_key {keys}", flush=True)
    if config.push is not None:
        print(f"pushed to {hub.push(config.out, config.push)}", flush=True)
    return config.out


def _check_output(config: ExportConfig) -> None:
    """Raise ConfigError if `out` is in use, unless it is a checkpoint and `overwrite` is set."""
    found = sorted(path.name for path in config.out.iterdir()) if config.out.is_dir() else []
    if config.out.is_file() or (found and "config.json" not in found):
        raise ConfigError(f"{config.out} is not a checkpoint folder. Choose another --out.")
    if found and not config.overwrite:
        raise ConfigError(f"{config.out} already contains a checkpoint. Replace it with --overwrite, or choose --out.")
    if found and Path(config.policy).resolve() == config.out.resolve():
        raise ConfigError(f"{config.out} is the policy itself. Choose another --out.")
