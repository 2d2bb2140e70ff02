"""Small random checkpoints on disk that replace models from the hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}


def save_llama(folder: Path, **changes) -> LlamaForCausalLM:
    """A LLaMA of two layers with a byte-level tokenizer."""
    torch.manual_seed(1)
    values = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**(values | changes)))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return model


def save_siglip(folder: Path):
    """A complete SigLIP (text and vision). Returns its vision tower."""
    torch.manual_seed(2)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text["vocab_size"] = 99
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    model.save_pretrained(folder)
    return model.vision_model


def save_dinov2(folder: Path) -> Dinov2Model:
    torch.manual_seed(3)
    values = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    model = Dinov2Model(Dinov2Config(**values))
    model.save_pretrained(folder)
    return model


def save_clip(folder: Path) -> CLIPVisionModel:
    torch.manual_seed(4)
    model = CLIPVisionModel(CLIPVisionConfig(**VISION))
    model.save_pretrained(folder)
    return model
