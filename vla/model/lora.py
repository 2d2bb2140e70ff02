"""LoRA adapters (Hu et al., arXiv:2106.09685) through peft: attach and merge.

Owns: the choice of trained parts, and the merge. Merging is done in float32, so that the merged network decodes the
same tokens. In embedding and head, only the rows of the action tokens are trained; embeddings are never resized. It
does not know the training loop.
"""

from __future__ import annotations

import peft
import torch

from vla.config import LoraConfig
from vla.errors import ConfigError
from vla.model.modeling import VLAForActionPrediction


def attach(network: VLAForActionPrediction, lora: LoraConfig) -> peft.PeftModel:
    """Freeze `network` and add trainable adapters according to `lora`. ConfigError if a target does not exist."""
    names = {name.rsplit(".", 1)[-1] for name, _ in network.language_model.named_modules()}
    missing = [target for target in lora.targets if target not in names]
    if missing:
        raise ConfigError(f"lora.targets: the decoder has no module named {', '.join(missing)}.")
    rows = None
    if lora.train_action_rows:
        begin = network.config.action_token_begin
        ids = list(range(begin, begin + network.config.make_action_tokenizer().vocab_size))
        # Name both modules: peft's list form silently skips a head that is not tied to the embedding, as here.
        rows = {"embed_tokens": ids, "lm_head": ids}
    saved = ["projector", "state_projector", "camera_embedding"] * lora.train_projector
    saved += ["latent"] * (network.latent is not None)  # it may be untrained, so train all of it
    # One entry per tower, because peft cannot wrap a list of modules.
    saved += [f"vision_towers.{i}" for i in range(len(network.vision_towers))] * lora.train_vision
    targets = "|".join(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf".*language_model\..*\.({targets})",  # vision towers also have q_proj, v_proj, ...
        modules_to_save=saved or None,
        trainable_token_indices=rows,
    )
    return peft.get_peft_model(network, config)


@torch.no_grad()
def merge(model: peft.PeftModel) -> VLAForActionPrediction:
    """Merge the adapters into the network, in float32, and return it. `model` cannot be used afterwards."""
    return model.float().merge_and_unload(safe_merge=True)
