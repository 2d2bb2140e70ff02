"""The weights of OpenVLA's published layout (Kim et al., arXiv:2406.09246) as weights of `VLAForActionPrediction`.

Owns: the keys of both layouts, and loading and writing them. OpenVLA's towers are timm's ViT-L/14 with registers
(DINOv2) and SO400M/14 (SigLIP). Here they are transformers' `Dinov2WithRegistersModel` and `SiglipVisionModel`, with
these differences:

* timm fuses queries, keys and values into one matrix; transformers does not.
* timm's DINOv2 adds no position to the class token; in transformers' model, the class position is zero.
* OpenVLA calls LayerScale's `gamma` `scale_factor`; transformers calls it `lambda1`.

It does not know config.json, tokenizers or robots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla.errors import CheckpointError
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.shards import Adapter, Keys, Shards, write

_DINO, _SIGLIP = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
_CLASS_TOKEN, _POSITIONS = f"{_DINO}.cls_token", f"{_DINO}.pos_embed"
_OUR_CLASS_POSITION = "vision_towers.0.embeddings.position_embeddings"
_LAST_BIAS = "projector.fc3.bias"

# In `blocks.{i}`: timm's name of a module -> transformers' names of its parts.
_DINO_BLOCK = {
    "norm1": ["norm1"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": ["attention.o_proj"],
    "norm2": ["norm2"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
_SIGLIP_BLOCK = {
    "norm1": ["layer_norm1"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": ["self_attn.out_proj"],
    "norm2": ["layer_norm2"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
_SIGLIP_POOL = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Tensors with the same values in both layouts, after concatenation along the first axis and reshaping.

    Attributes:
        theirs: OpenVLA's keys.
        ours: parameters of `VLAForActionPrediction`.
        shape: the shape of `theirs`, if it is a single tensor and differs from `ours`.
        rows: proportion of rows of each tensor in `theirs`.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    rows: tuple[int, ...] = (1,)

    def shapes(self, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Size]:
        """The shape of each tensor in `theirs`."""
        first, *rest = (parameters[name].shape for name in self.ours)
        total = first[0] + sum(shape[0] for shape in rest)
        whole = torch.Size(self.shape or (total, *first[1:]))
        counts = [whole[0] * share // sum(self.rows) for share in self.rows]
        return {key: torch.Size((count, *whole[1:])) for key, count in zip(self.theirs, counts, strict=True)}


def pairs(config: VLAConfig) -> Iterator[Pair]:
    """All weights of OpenVLA's layout, in the order of its network."""
    dino, siglip = config.vision_configs
    patches = (config.image_size // dino.patch_size) ** 2
    ours = "vision_towers.0"
    for theirs, name in (("cls_token", "cls_token"), ("reg_token", "register_tokens")):
        yield Pair((f"{_DINO}.{theirs}",), (f"{ours}.embeddings.{name}",))
    yield Pair((_POSITIONS,), (_OUR_CLASS_POSITION,), (1, patches, dino.hidden_size))
    yield from _modules(_DINO, ours, {"patch_embed.proj": ["embeddings.patch_embeddings.projection"]})
    for i in range(dino.num_hidden_layers):
        block, layer = f"{_DINO}.blocks.{i}", f"{ours}.encoder.layer.{i}"
        yield from _modules(block, layer, _DINO_BLOCK)
        for scale in ("1", "2"):
            yield Pair((f"{block}.ls{scale}.scale_factor",), (f"{layer}.layer_scale{scale}.lambda1",))
    yield from _modules(_DINO, ours, {"norm": ["layernorm"]})

    ours = "vision_towers.1"
    position = f"{ours}.embeddings.position_embedding.weight"
    yield Pair((f"{_SIGLIP}.pos_embed",), (position,), (1, patches, siglip.hidden_size))
    yield from _modules(_SIGLIP, ours, {"patch_embed.proj": ["embeddings.patch_embedding"]})
    for i in range(siglip.num_hidden_layers):
        yield from _modules(f"{_SIGLIP}.blocks.{i}", f"{ours}.encoder.layers.{i}", _SIGLIP_BLOCK)
    yield from _modules(_SIGLIP, ours, {"norm": ["post_layernorm"]})
    pool, head = f"{_SIGLIP}.attn_pool", f"{ours}.head"  # stored in every checkpoint, but not used
    yield Pair((f"{pool}.latent",), (f"{head}.probe",))
    for kind in ("weight", "bias"):
        yield Pair((f"{pool}.q.{kind}", f"{pool}.kv.{kind}"), (f"{head}.attention.in_proj_{kind}",), rows=(1, 2))
    yield from _modules(pool, head, {theirs: [name] for theirs, name in _SIGLIP_POOL.items()})

    for i in range(3):
        yield from _modules("projector", "projector", {f"fc{i + 1}": [str(2 * i)]})
    yield from (Pair((name,), (name,)) for name in _language_model(config))


def _modules(theirs: str, ours: str, names: dict[str, list[str]]) -> Iterator[Pair]:
    for fused, parts in names.items():
        for kind in ("weight", "bias"):
            yield Pair((f"{theirs}.{fused}.{kind}",), tuple(f"{ours}.{part}.{kind}" for part in parts))


def _language_model(config: VLAConfig) -> Iterator[str]:
    yield "language_model.model.embed_tokens.weight"
    for i in range(config.text_config.num_hidden_layers):
        layer = f"language_model.model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{layer}.self_attn.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{layer}.mlp.{name}.weight"
        yield f"{layer}.input_layernorm.weight"
        yield f"{layer}.post_attention_layernorm.weight"
    yield "language_model.model.norm.weight"
    yield "language_model.lm_head.weight"


def load(network: VLAForActionPrediction, shards: Shards, adapter: Adapter | None, dtype: torch.dtype | None) -> Keys:
    """Replace the parameters of `network` (on the meta device) by the tensors of a checkpoint, one by one.

    Args:
        adapter: merged into the weights in float32, before they are converted to `dtype`.
        dtype: type of the weights; None: as stored.
    Raises:
        CheckpointError: keys or shapes do not fit, or the adapter was made for another model.
    """
    parameters = dict(network.named_parameters())
    layout = list(pairs(network.config))
    expected = {key: shape for pair in layout for key, shape in pair.shapes(parameters).items()}
    keys = Keys.compare(shards.shapes, expected)
    keys.check(shards.folder)
    for key, shape in expected.items():
        if shards.shapes[key] != tuple(shape):
            raise CheckpointError(
                f"{shards.folder}: {key} has the shape {list(shards.shapes[key])}, expected {list(shape)}. The weights "
                "belong to another model than config.json."
            )
    if adapter is not None:
        adapter.check(shards.shapes)
    for pair in layout:
        _assign(network, pair, shards, adapter, dtype)
    return keys


def _assign(network: Any, pair: Pair, shards: Shards, adapter: Adapter | None, dtype: torch.dtype | None) -> None:
    parts = []
    for key in pair.theirs:
        tensor = stored = shards.read(key)
        if adapter is not None:
            tensor = adapter.merge(key, stored)
        parts.append(tensor.to(dtype or stored.dtype))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if pair.theirs == (_POSITIONS,):
        whole = torch.cat([whole.new_zeros(1, 1, whole.shape[2]), whole], dim=1)
    start = 0
    for name in pair.ours:
        module, _, leaf = name.rpartition(".")
        owner = network.get_submodule(module)
        shape = getattr(owner, leaf).shape
        rows = shape[0] if len(pair.ours) > 1 else whole.shape[0]
        # Copy, because a view would keep the file in memory.
        copy = whole[start : start + rows].reshape(shape).clone(memory_format=torch.contiguous_format)
        setattr(owner, leaf, nn.Parameter(copy))
        start += rows


@torch.no_grad()
def save(network: VLAForActionPrediction, folder: Path) -> None:
    """Write the weights of `network` in OpenVLA's layout."""
    parameters = dict(network.named_parameters())
    layout = {key: pair for pair in pairs(network.config) for key in pair.theirs}
    shapes = {key: pair.shapes(parameters)[key] for key, pair in layout.items()}
    # Parameters that OpenVLA does not have are added to others. Zeros are skipped, because adding 0 would change -0.
    added = {
        _CLASS_TOKEN: parameters[_OUR_CLASS_POSITION][:, :1],
        _LAST_BIAS: parameters["camera_embedding.weight"][0],
    }

    def make(key: str) -> torch.Tensor:
        pair = layout[key]
        whole = torch.cat([parameters[name] for name in pair.ours]) if len(pair.ours) > 1 else parameters[pair.ours[0]]
        if key == _POSITIONS:
            whole = whole[:, 1:]
        if len(pair.theirs) > 1:
            counts = [shapes[name][0] for name in pair.theirs]
            whole = whole.split(counts)[pair.theirs.index(key)]
        if key in added and added[key].any():
            whole = (whole.float() + added[key].float()).to(whole.dtype)
        return whole.detach().reshape(shapes[key])

    write(folder, shapes, make, network.dtype.itemsize)
