"""Tensors of a checkpoint folder, read and written one at a time.

Owns: the safetensors files of a folder and their index, LoRA adapters that are merged while tensors are read, and the
comparison of keys. A checkpoint of 15 GB loads with little more than 15 GB of memory. It does not know which tensors a
model has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vla.errors import CheckpointError
from vla.model.sources.hub import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHARD_BYTES = 4 * 2**30

# Fields of peft's adapter_config.json that change the meaning of an adapter -> supported values.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
}


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a checkpoint, compared with those of a model.

    Attributes:
        used: keys of both.
        unused: keys of the checkpoint only.
        missing: keys of the model only.
    """

    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def compare(cls, present: Iterable[str], expected: Iterable[str]) -> Keys:
        there, wanted = set(present), set(expected)
        return cls(tuple(sorted(there & wanted)), tuple(sorted(there - wanted)), tuple(sorted(wanted - there)))

    def check(self, folder: Path) -> None:
        """Raise CheckpointError if keys are unused or missing."""
        problems = [
            f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for what, keys in (("missing", self.missing), ("not part of the model", self.unused))
            if keys
        ]
        if problems:
            raise CheckpointError(
                f"the weights in {folder} do not fit its config.json: of {len(self.used) + len(self.missing)} expected "
                f"keys, {'; '.join(problems)}. Copy the folder again, or correct its config.json."
            )


class Shards:
    """The tensors of the safetensors files in `folder`: key -> tensor.

    Attributes:
        shapes: key -> shape.
        dtypes: key -> the file's name of the data type ("BF16", ...).

    Raises:
        CheckpointError: a file is missing or truncated.
    """

    def __init__(self, folder: Path, names: Iterable[str] | None = None) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for name in self._names() if names is None else names:
            self._scan(folder / name)

    def _names(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if not (self.folder / INDEX).is_file():
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            remedy = "Its weights are pickle files, which are not read because they can run code. " if pickled else ""
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}. {remedy}Copy the folder again, with its safetensors "
                "files."
            )
        listed = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{self.folder}/{INDEX} has no weight_map of keys and files. Copy the folder again.")
        names = sorted(set(listed.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{self.folder}/{INDEX} names a file outside its folder: {outside[0]!r}.")
        if absent := [name for name in names if not (self.folder / name).is_file()]:
            raise CheckpointError(
                f"{self.folder} lacks {', '.join(absent)}, {len(absent)} of the {len(names)} files that {INDEX} "
                "names. Copy the folder again."
            )
        return names

    def _scan(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    part = file.get_slice(key)
                    self._files[key], self.shapes[key] = path, tuple(part.get_shape())
                    self.dtypes[key] = part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}). Copy it again.") from None

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key`. It is a view of the mapped file; copy it to release the file's memory."""
        with safe_open(self._files[key], framework="pt") as file:
            return file.get_tensor(key)


class Adapter:
    """A LoRA adapter saved by peft, merged into the weights of its base model while they are read.

    The update of a weight is `lora_alpha / r * B @ A`; it is added in float32.

    Raises:
        CheckpointError: files are damaged, or the adapter is not plain LoRA.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, config = folder, read_json(folder / ADAPTER_CONFIG)
        for field, supported in _PLAIN.items():
            if field in config and config[field] not in supported:
                raise CheckpointError(
                    f"{folder}/{ADAPTER_CONFIG} has {field}: {config[field]!r}; only plain LoRA adapters ({field}: "
                    f"{supported[0]!r}) can be merged. Merge it with peft, and load the merged checkpoint."
                )
        rank, alpha, base = (config.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
        if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or not isinstance(base, str) or rank < 1:
            raise CheckpointError(
                f"{folder}/{ADAPTER_CONFIG} must have r, lora_alpha and base_model_name_or_path, got {rank!r}, "
                f"{alpha!r} and {base!r}."
            )
        if not (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder} has an {ADAPTER_CONFIG}, but no {ADAPTER}. Copy the folder again.")
        self.base, self._rank, self._scale = base, rank, alpha / rank
        self._shards = Shards(folder, [ADAPTER])

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if a key does not update a matrix of the base model, which has these shapes."""
        for key, shape in self._shards.shapes.items():
            weight, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
            target = shapes.get(f"{weight}.weight")
            if target is None or len(target) != 2 or kind not in ("A.weight", "B.weight"):
                raise CheckpointError(
                    f"the adapter in {self.folder} was made for another model: its base {self.base!r} has no matrix "
                    f"for the key {key}."
                )
            expected = [self._rank, target[1]] if kind.startswith("A") else [target[0], self._rank]
            if list(shape) != expected:
                raise CheckpointError(
                    f"the adapter in {self.folder} was made for another model: {key} has the shape {list(shape)}, "
                    f"expected {expected} for its base {self.base!r} and r {self._rank}."
                )
            other = key.replace(".lora_A.", ".lora_B.") if kind.startswith("A") else key.replace(".lora_B.", ".lora_A.")
            if other not in self._shards.shapes:
                raise CheckpointError(f"{self.folder}/{ADAPTER} is incomplete: it has {key}, but no {other}.")

    def merge(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight `key` with its update, in float32; the weight itself if it has none."""
        first = f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight"
        if first not in self._shards.shapes:
            return weight
        a, b = (self._shards.read(first.replace("lora_A", name)).float() for name in ("lora_A", "lora_B"))
        return torch.addmm(weight.float(), b, a, alpha=self._scale)


def write(folder: Path, shapes: Mapping[str, torch.Size], make: Callable[[str], torch.Tensor], size: int) -> None:
    """Write tensors to safetensors files of at most 4 GiB: one file, or numbered files with an index. Only the tensors
    of one file are in memory at a time.

    Args:
        shapes: key -> shape, in the order of writing.
        make: key -> tensor.
        size: bytes per element.
    """
    split = split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: shape.numel() * size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: make(key).contiguous() for key in keys}, folder / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
