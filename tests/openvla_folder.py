"""A tiny random checkpoint in exactly OpenVLA's layout, written without this package's loader.

It has two blocks per tower and two decoder layers. The embedding has OpenVLA's 32064 rows, so that token ids are the
same.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from vla.model.sources.openvla import TIMM

DINO, SIGLIP = "vit_tiny_patch14_reg4_dinov2", "vit_tiny_patch14_siglip_224"
DINO_WIDTH, SIGLIP_WIDTH, SIGLIP_HIDDEN, WIDTH, HIDDEN, HEADS, LAYERS = 32, 48, 80, 32, 48, 4, 2
TIMM[DINO] = TIMM["vit_large_patch14_reg4_dinov2.lvd142m"] | {"hidden_size": DINO_WIDTH, "num_hidden_layers": 2}
TIMM[SIGLIP] = TIMM["vit_so400m_patch14_siglip_224"] | {
    "hidden_size": SIGLIP_WIDTH,
    "intermediate_size": SIGLIP_HIDDEN,
    "num_hidden_layers": 2,
}
# Vocabulary of the text tokenizer. The byte of a line feed and "▁" have the same ids as in Llama 2.
PIECES = {"▁": 29871, "Out": 3744, ":": 29901}


def statistics(low: float, high: float) -> dict[str, Any]:
    """Statistics of a dataset in OpenVLA's form: without a median; the gripper is not normalised."""
    six = {"q01": [low] * 6 + [0.0], "q99": [high] * 6 + [1.0], "min": [2 * low] * 6 + [0.0]}
    six |= {"max": [2 * high] * 6 + [1.0], "mean": [0.0] * 6 + [0.5], "std": [0.1] * 6 + [0.4]}
    return {
        "action": six | {"mask": [True] * 6 + [False]},
        "proprio": {"mean": [0.0] * 7},
        "num_transitions": 100,
        "num_trajectories": 5,
    }


NORM_STATS = {"bridge_orig": statistics(-0.03, 0.05), "fractal": statistics(-1.0, 2.0)}


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of OpenVLA's layout, by key."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for tower, width, hidden in (("featurizer", DINO_WIDTH, 4 * DINO_WIDTH), ("fused_featurizer", SIGLIP_WIDTH, 80)):
        root = f"vision_backbone.{tower}"
        if tower == "featurizer":
            found |= {f"{root}.cls_token": (1, 1, width), f"{root}.reg_token": (1, 4, width)}
        found |= {f"{root}.pos_embed": (1, 256, width)}
        found |= {f"{root}.patch_embed.proj.weight": (width, 3, 14, 14), f"{root}.patch_embed.proj.bias": (width,)}
        for i in range(2):
            block = f"{root}.blocks.{i}"
            norm(f"{block}.norm1", width)
            linear(f"{block}.attn.qkv", 3 * width, width)
            linear(f"{block}.attn.proj", width, width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.mlp.fc1", hidden, width)
            linear(f"{block}.mlp.fc2", width, hidden)
            if tower == "featurizer":
                found |= {f"{block}.ls1.scale_factor": (width,), f"{block}.ls2.scale_factor": (width,)}
        norm(f"{root}.norm", width)
    pool = "vision_backbone.fused_featurizer.attn_pool"
    found[f"{pool}.latent"] = (1, 1, SIGLIP_WIDTH)
    linear(f"{pool}.q", SIGLIP_WIDTH, SIGLIP_WIDTH)
    linear(f"{pool}.kv", 2 * SIGLIP_WIDTH, SIGLIP_WIDTH)
    linear(f"{pool}.proj", SIGLIP_WIDTH, SIGLIP_WIDTH)
    norm(f"{pool}.norm", SIGLIP_WIDTH)
    linear(f"{pool}.mlp.fc1", SIGLIP_HIDDEN, SIGLIP_WIDTH)
    linear(f"{pool}.mlp.fc2", SIGLIP_WIDTH, SIGLIP_HIDDEN)
    vision = DINO_WIDTH + SIGLIP_WIDTH
    linear("projector.fc1", 4 * vision, vision)
    linear("projector.fc2", WIDTH, 4 * vision)
    linear("projector.fc3", WIDTH, WIDTH)
    found["language_model.model.embed_tokens.weight"] = (32064, WIDTH)
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}"
        found |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{layer}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        found |= {f"{layer}.mlp.down_proj.weight": (WIDTH, HIDDEN)}
        found |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    found["language_model.model.norm.weight"] = (WIDTH,)
    found["language_model.lm_head.weight"] = (32064, WIDTH)
    return found


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights, large enough that each of them changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes().items():
        values = torch.randn(shape, generator=generator)
        scale = 1.0 if len(shape) == 1 else (shape[-1] if len(shape) == 2 else 20) ** -0.5
        centre = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
        found[key] = (centre + (0.2 if len(shape) == 1 else scale) * values).to(dtype)
    found["language_model.model.embed_tokens.weight"] *= 8  # so that each token depends on the previous one
    found["projector.fc3.bias"][0] = -0.0  # the sign must be preserved
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with 32000 tokens and a padding token that splits text into single characters, written as in Llama
    2."""
    byte = {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | byte | PIECES
    letters = [letter for letter in map(chr, range(33, 127)) if letter not in vocabulary]
    vocabulary |= {letter: 30000 + i for i, letter in enumerate(letters)}
    vocabulary |= {"Ou": 3000}
    used = set(vocabulary.values())
    vocabulary |= {f"<{i}>": i for i in range(32000) if i not in used}
    merges = [("O", "u"), ("Ou", "t")]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<PAD>"
    )


def config() -> dict[str, Any]:
    text = {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064}
    text |= {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": NORM_STATS,
        "output_projector_states": False,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": text,
        "timm_model_ids": [DINO, SIGLIP],
        "timm_override_act_layers": [None, None],
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write `tensors` in two shards, with an index and the other files of a published folder."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(tensors)
    weight_map = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config()))
    tokenizer().save_pretrained(folder)


def save_adapter(folder: Path, base: Path, seed: int = 9, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter for all linear layers, as OpenVLA's fine-tuning script does. Returns `weights()` with the
    adapter merged."""
    generator = torch.Generator().manual_seed(seed)
    adapter, merged = {}, weights()
    for key, shape in shapes().items():
        if len(shape) != 2 or "embed_tokens" in key or "lm_head" in key:
            continue
        a, b = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator) / 40
        name = f"base_model.model.{key.removesuffix('.weight')}"
        adapter |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        merged[key] = merged[key] + 16 / 4 * b @ a
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": str(base), "bias": "none"}
    values |= {"target_modules": ["q_proj", "qkv", "fc1"], "init_lora_weights": "gaussian", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
    return merged
