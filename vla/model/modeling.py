"""VLAForActionPrediction: vision tower(s) -> projector -> LLaMA-style decoder -> action tokens.

Owns: the network and its loss. A sequence is a prefix x (prompt tokens, image tokens of every camera, one state token,
in the order of `config.layout`) followed by the suffix a_1..a_T, the tokens of an action chunk. The decoder factorises

    p(a_1..a_T | x) = prod_t p(a_t | x, a_<t)

and is trained by teacher forcing on the cross-entropy of the suffix alone,

    L = - (1 / sum_t m_t) sum_t m_t log p(a_t | x, a_<t),    averaged over the samples of a batch,

where m_t is 0 for actions beyond the end of a demonstration. Every sample counts the same, however many of its tokens
are learned: the single answer of a grounding question as much as a whole chunk of actions. It does not know how
observations become tensors (processing) or how chunks are decoded (decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import vla.model.nano_vision  # noqa: F401  (registers the embedded backbone's vision tower)
from vla.errors import ConfigError
from vla.model.configuration import VLAConfig

MAX_CAMERAS = 8


class Projector(nn.Sequential):
    """Vision width -> language width: `layers` linear maps with GELU in between."""

    def __init__(self, vision_width: int, hidden: int, width: int, layers: int) -> None:
        sizes = [vision_width, *[hidden] * (layers - 1), width]
        modules: list[nn.Module] = []
        for i in range(layers):
            modules += ([nn.GELU()] if i else []) + [nn.Linear(sizes[i], sizes[i + 1])]
        super().__init__(*modules)


class VLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """Action-token policy network; use it through `vla.policy.Policy`."""

    config_class = VLAConfig
    base_model_prefix = "vla"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    def __init__(
        self,
        config: VLAConfig,
        vision_towers: Sequence[nn.Module] | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        """Built from `config`; parts that are given (pretrained ones) take the place of random ones."""
        super().__init__(config)
        towers = vision_towers or [AutoModel.from_config(vision) for vision in config.vision_configs]
        self.vision_towers = nn.ModuleList(towers)
        hidden = config.projector_hidden or config.hidden_size
        vision_width = sum(vision.hidden_size for vision in config.vision_configs)
        self.projector = Projector(vision_width, hidden, config.hidden_size, config.projector_layers)
        self.camera_embedding = nn.Embedding(MAX_CAMERAS, config.hidden_size)
        self.state_projector = Projector(config.max_state_dim, config.hidden_size, config.hidden_size, 2)
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.tokens_per_image = count_image_tokens(config)
        self.n_suffix = config.make_action_tokenizer().n_tokens if config.action_tokenizer else 0
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.camera_embedding:
            nn.init.zeros_(module.weight)
        elif isinstance(module, Projector):
            layers = [layer for layer in module if isinstance(layer, nn.Linear)]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            # Image and state tokens start as large as word embeddings: tokens that are fifty times larger drown what
            # attention writes into them, such as the colour that the instruction names.
            scale = self.config.text_config.initializer_range
            nn.init.normal_(layers[-1].weight, std=scale / layers[-1].in_features ** 0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_images(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Image tokens [B, C * tokens_per_image, width] (all cameras in one batch).

        Args:
            pixel_values: uint8 [B, C, 3, S, S].
            condition: [B, width], for towers that are conditioned on the instruction.
        """
        batch, cameras = pixel_values.shape[:2]
        flat = pixel_values.flatten(0, 1)
        dtype = self.dtype
        features = []
        for index, tower in enumerate(self.vision_towers):
            # By channel, with numbers instead of tensors: nothing is copied from the host, so a CUDA graph can hold it.
            normalize = zip(flat.unbind(1), self.config.image_mean[index], self.config.image_std[index], strict=True)
            images = torch.stack([(channel.float() / 255 - mean) / std for channel, mean, std in normalize], 1)
            images = images.to(dtype)
            features.append(self._tower_features(tower, images, condition))
        tokens = self.projector(torch.cat(features, dim=-1))
        which = self.camera_embedding(torch.arange(cameras, device=tokens.device))
        return (tokens.view(batch, cameras, self.tokens_per_image, -1) + which[:, None]).flatten(1, 2)

    def _tower_features(self, tower: nn.Module, images: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        layer, inputs = self.config.vision_feature_layer, {"pixel_values": images}
        if _is_conditioned(tower.config):
            assert condition is not None
            inputs["condition"] = condition.repeat_interleave(len(images) // len(condition), dim=0).to(images.dtype)
        if layer == -1:
            hidden = tower(**inputs).last_hidden_state
        else:
            hidden = tower(**inputs, output_hidden_states=True).hidden_states[layer]
        return hidden[:, -self.tokens_per_image :]  # class and register tokens stand in front

    def _mean_word(self, input_ids: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Mean embedding [B, width] of each prompt's words: neither padding, placeholders nor action tokens."""
        config = self.config
        words = (input_ids < config.action_token_begin) & (input_ids != (config.text_config.pad_token_id or 0))
        words &= (input_ids != config.image_token_id) & (input_ids != config.state_token_id)
        weights = words.to(embeds.dtype).unsqueeze(-1)
        return (embeds * weights).sum(1) / weights.sum(1).clamp(min=1)

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, state: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings [B, L, width] with image and state features in the place of their placeholders."""
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
            conditioned = any(_is_conditioned(vision) for vision in self.config.vision_configs)
            condition = self._mean_word(input_ids, embeds) if conditioned else None
            embeds = embeds.masked_scatter(mask, self.encode_images(pixel_values, condition).to(embeds.dtype))
        if state is not None:
            mask = (input_ids == self.config.state_token_id).unsqueeze(-1)
            projected = self.state_projector(state.to(self.dtype))
            embeds = embeds.masked_scatter(mask, projected.to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when `labels` are given.

        Args:
            input_ids: int64 [B, L], prompts padded on the left.
            pixel_values: uint8 [B, C, 3, S, S].
            state: float [B, max_state_dim], normalised.
            labels: int64 [B, T], the suffix: ids of action tokens, -100 where m_t = 0. `input_ids` must end with the
                suffix; the returned logits are then the T that predict it.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.embed(input_ids, pixel_values, state)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        outputs = self.language_model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) if labels is None else False,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            hidden = hidden[:, -labels.shape[1] - 1 : -1]
        elif isinstance(logits_to_keep, int) and logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.language_model.lm_head(hidden)
        loss = None
        if labels is not None:
            token_loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
            ).view_as(labels)
            learned = (labels != -100).sum(-1)
            loss = (token_loss.sum(-1) / learned.clamp(min=1)).mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, is_first_iteration: bool = False, **kwargs: Any):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and inputs.get("past_key_values") is not None:  # they are in the cache by then
            inputs["pixel_values"] = inputs["state"] = None
        return inputs


def _is_conditioned(vision: Any) -> bool:
    return getattr(vision, "condition_size", None) is not None


def count_image_tokens(config: VLAConfig) -> int:
    """Tokens per camera image; all towers must agree on the patch grid."""
    counts = {(config.image_size // vision.patch_size) ** 2 for vision in config.vision_configs}
    if len(counts) != 1:
        raise ConfigError(f"vision towers must cut an image of {config.image_size} into the same grid; got {counts}.")
    return counts.pop()


AutoConfig.register("vla", VLAConfig)
AutoModel.register(VLAConfig, VLAForActionPrediction)
