"""VLAForActionPrediction: vision tower(s) -> projector -> LLaMA-style decoder -> action tokens.

The architecture follows OpenVLA (Kim et al., arXiv:2406.09246).

Owns: the network and its loss. A sequence is a prefix x (prompt tokens, image tokens of every camera and one state
token, in the order of `config.layout`) followed by the suffix a_1..a_T, the tokens of an action chunk. The decoder
factorises

    p(a_1..a_T | x) = prod_t p(a_t | x, a_<t)

and is trained by teacher forcing on the cross-entropy of the suffix,

    L = - (1 / sum_t m_t) sum_t m_t log p(a_t | x, a_<t),    averaged over the samples of a batch,

where m_t is 0 for tokens that are not learned, such as actions past the end of a demonstration. All samples have the
same weight: a one-token answer to a question about the image counts as much as an action chunk. With a latent, the loss
is that of `vla.model.free_transformer`. This module does not know how observations become tensors (processing) or how
chunks are decoded (decoding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

import vla.model.efficientnet
import vla.model.nano_vision  # noqa: F401  (both register their tower)
from vla.errors import ConfigError
from vla.model import free_transformer, vision
from vla.model.configuration import VLAConfig
from vla.model.free_transformer import Latent


class Projector(nn.Sequential):
    """Linear layers with GELU in between, from `vision_width` to `width`.

    Args:
        hidden: width between consecutive layers, or a list of these widths.
    """

    def __init__(self, vision_width: int, hidden: int | Sequence[int], width: int, layers: int) -> None:
        between = [hidden] * (layers - 1) if isinstance(hidden, int) else hidden
        sizes = [vision_width, *between, width]
        modules: list[nn.Module] = []
        for i in range(layers):
            modules += ([nn.GELU()] if i else []) + [nn.Linear(sizes[i], sizes[i + 1])]
        super().__init__(*modules)


@dataclasses.dataclass
class VLAOutput(CausalLMOutputWithPast):
    """The output of `VLAForActionPrediction`.

    Attributes:
        losses: terms of the loss by name; None without labels or latent. "cross_entropy" and "elbo" are in nats per
            token, "kl" in bits per latent. The posterior sees the labels, so the cross-entropy cannot be compared with
            that of other networks; compare the evidence lower bound "elbo" with their log-likelihood.
    """

    losses: dict[str, torch.Tensor] | None = None


class VLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """The policy network, which predicts action tokens. Use it through `vla.policy.Policy`."""

    config_class = VLAConfig
    base_model_prefix = "vla"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: VLAConfig,
        vision_towers: Sequence[nn.Module] | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        """Build the network from `config`. Pretrained parts, if passed, replace randomly initialised ones."""
        super().__init__(config)
        towers = vision_towers or [AutoModel.from_config(tower) for tower in config.vision_configs]
        self.vision_towers = nn.ModuleList(towers)
        hidden = config.projector_hidden or config.hidden_size
        vision_width = sum(vision.adapter(tower).width(tower) for tower in config.vision_configs)
        self.projector = Projector(vision_width, hidden, config.hidden_size, config.projector_layers)
        self.camera_embedding = nn.Embedding(config.max_cameras, config.hidden_size)
        self.state_projector = Projector(config.max_state_dim, config.hidden_size, config.hidden_size, 2)
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.tokens_per_image = vision.tokens_per_image(config.vision_configs, config.image_size)
        self.action_tokenizer: Any = config.make_action_tokenizer() if config.action_tokenizer else None
        self.latent: Any = self._make_latent() if config.latent != "none" else None
        #: Target distribution of each action token during training, [n, n] for n action tokens; None: one-hot.
        self.soft_targets: torch.Tensor | None
        self.register_buffer("soft_targets", None, persistent=False)
        #: Share of training samples for which vision towers do not see the order of the words.
        self.order_dropout = 0.0
        self.post_init()

    def _make_latent(self) -> Latent:
        return Latent(self.language_model.config, self.config.latent_bits, self.config.latent_form)

    def add_latent(self, latent: str, bits: int, form: str, kappa: float) -> None:
        """Add an untrained latent, which does not change predictions. The arguments are those of `VLAConfig`.

        Raises:
            ConfigError: the decoder does not support this latent.
        """
        free_transformer.check(self.language_model.config, bits, form)
        self.config.latent, self.config.latent_bits, self.config.latent_form = latent, bits, form
        self.config.latent_kappa = kappa
        self.latent = self._make_latent().to(self.device, self.dtype)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.camera_embedding:
            nn.init.zeros_(module.weight)
        elif isinstance(module, Projector):
            layers = [layer for layer in module if isinstance(layer, nn.Linear)]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            # Image and state tokens start at the scale of word embeddings. The default scale is fifty times larger, and
            # attention, which adds the instruction to them, would start with a negligible effect.
            scale = self.config.text_config.initializer_range
            nn.init.normal_(layers[-1].weight, std=scale / layers[-1].in_features ** 0.5)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Alias of `is_activation_checkpointing`, because peft uses this deprecated name."""
        return self.is_activation_checkpointing

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_images(self, pixel_values: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Image tokens [B, C * tokens_per_image, width]. All cameras are encoded in one batch.

        Args:
            pixel_values: uint8 [B, C, 3, S, S].
            condition: [B, width], needed by towers that are conditioned on the instruction.
        """
        batch, cameras = pixel_values.shape[:2]
        flat = pixel_values.flatten(0, 1)
        dtype = self.dtype
        features = []
        for index, tower in enumerate(self.vision_towers):
            # Python numbers per channel, because a CUDA graph must not copy a tensor of means from the host.
            normalize = zip(flat.unbind(1), self.config.image_mean[index], self.config.image_std[index], strict=True)
            images = torch.stack([(channel.float() / 255 - mean) / std for channel, mean, std in normalize], 1)
            images = images.to(dtype)
            features.append(self._tower_features(tower, images, condition))
        tokens = self.projector(torch.cat(features, dim=-1))
        which = self.camera_embedding(torch.arange(cameras, device=tokens.device))
        return (tokens.view(batch, cameras, self.tokens_per_image, -1) + which[:, None]).flatten(1, 2)

    def _tower_features(self, tower: nn.Module, images: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        if _is_conditioned(tower.config):
            assert condition is not None
            condition = condition.repeat_interleave(len(images) // len(condition), dim=0).to(images.dtype)
            return tower(pixel_values=images, condition=condition, return_dict=True).last_hidden_state
        features = vision.adapter(tower.config).features(tower, images, self.config.vision_feature_layer)
        return features[:, -self.tokens_per_image :]  # class and register tokens come first

    def words_condition(self, input_ids: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The vector that conditions vision towers on the text tokens of each prompt: their mean embedding, [B, width].

        If a tower sees the order of the words, the mean embedding weighted by position (from -1, the first, to 1, the
        last) is appended: [B, 2 * width].
        """
        config = self.config
        words = (input_ids < config.action_token_begin) & (input_ids != (config.text_config.pad_token_id or 0))
        words &= (input_ids != config.image_token_id) & (input_ids != config.state_token_id)
        weights = words.to(embeds.dtype)
        count = weights.sum(1, keepdim=True).clamp(min=1)
        mean = (embeds * weights.unsqueeze(-1)).sum(1) / count
        if not self.sees_word_order:
            return mean
        position = 2 * (weights.cumsum(1) - 1) / (count - 1).clamp(min=1) - 1
        order = (embeds * (weights * position).unsqueeze(-1)).sum(1) / count
        if self.training and self.order_dropout:
            order = order * (torch.rand(len(order), 1, device=order.device) >= self.order_dropout)
        return torch.cat([mean, order], dim=-1)

    @property
    def sees_word_order(self) -> bool:
        """Whether a vision tower is conditioned on the order of the words."""
        return any(getattr(tower, "order_size", None) for tower in self.config.vision_configs)

    def add_word_order(self) -> None:
        """Condition the vision towers on the order of the words, too. Until they are trained, this changes nothing.

        Raises:
            ConfigError: no tower is conditioned on the instruction.
        """
        conditioned = [i for i, tower in enumerate(self.config.vision_configs) if _is_conditioned(tower)]
        if not conditioned:
            raise ConfigError("word_order needs the vision tower of 'nano', 'nano-init' or 'small-init'.")
        for index in conditioned:
            tower: Any = self.vision_towers[index]
            tower.add_order()
            self.config.vision_configs[index].order_size = tower.config.order_size

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, state: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings [B, L, width], with placeholders replaced by image and state features."""
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
            conditioned = any(map(_is_conditioned, self.config.vision_configs))
            condition = self.words_condition(input_ids, embeds) if conditioned else None
            embeds = embeds.masked_scatter(mask, self.encode_images(pixel_values, condition).to(embeds.dtype))
        if state is not None:
            mask = (input_ids == self.config.state_token_id).unsqueeze(-1)
            projected = self.state_projector(state.to(self.dtype))
            embeds = embeds.masked_scatter(mask, projected.to(embeds.dtype))
        return embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent: torch.Tensor | None = None,
    ) -> VLAOutput:
        """Compute the logits, and the loss if `labels` are given.

        Unknown keywords raise TypeError, so that an argument renamed by a dependency is never silently ignored.

        Args:
            input_ids: int64 [B, L], prompts padded on the left.
            attention_mask: int64 [B, cached + L], 0 for padding.
            pixel_values: uint8 [B, C, 3, S, S].
            state: float [B, max_state_dim], normalised.
            position_ids: int64 [B, L]; by default, positions start at 0 at each row's first token that is not padding.
            cache: keys and values of the tokens that precede `input_ids`, as in `generate`.
            labels: int64 [B, T], ids of the suffix, -100 where m_t = 0. `input_ids` must end with the suffix. With
                labels, only the T logits of the suffix are returned.
            use_cache: whether to return a cache.
            logits_to_keep: the number of last positions to compute logits for (0 for all), or indices of positions.
            latent: int64 [B, cached + L], code of the latent at each position, -1 for none (`align`). If it is
                shorter, later positions have none. None: sampled from the posterior, which needs `labels`.
            return_dict: False returns a tuple instead of an output object.
        """
        embeds = self.embed(input_ids, pixel_values, state)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        posterior: list[torch.Tensor] = []  # logits of the bits, [B, n_latents, bits]
        with contextlib.ExitStack() as context:
            if self.latent is not None and latent is None and labels is not None:
                shift = self._posterior_shift(attention_mask, position_ids, labels.shape[1], posterior)
                context.enter_context(free_transformer.injected(self.language_model.model, shift))
            elif self.latent is not None or latent is not None:
                past = 0 if cache is None else cache.get_seq_length()
                added = self._shift(latent, past, embeds)
                context.enter_context(free_transformer.injected(self.language_model.model, lambda x: added))
            outputs = self.language_model.model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=bool(use_cache),
                return_dict=True,  # overrides the decoder's own config.json
            )
        hidden = outputs.last_hidden_state
        if labels is not None:
            hidden = hidden[:, -labels.shape[1] - 1 : -1]
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        logits = self.language_model.lm_head(hidden)
        loss = losses = None
        if labels is not None:
            token_loss = self._token_loss(logits.float(), labels)
            learned = (labels != -100).sum(-1)
            loss = (token_loss.sum(-1) / learned.clamp(min=1)).mean()
            if posterior:
                loss, losses = self._free_loss(loss, posterior[0], learned)
        return VLAOutput(loss=loss, logits=logits, cache=outputs.cache, losses=losses)

    def _token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [B, T] in nats, 0 for labels of -100. In training mode, the targets of action tokens are the
        rows of `soft_targets`."""
        loss = F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none")
        if self.soft_targets is None or not self.training:
            return loss
        begin, count = self.config.action_token_begin, len(self.soft_targets)
        ids = labels - begin
        targets = self.soft_targets[ids.clamp(0, count - 1)]
        soft = -(targets * logits.log_softmax(-1)[..., begin : begin + count]).sum(-1)
        return torch.where((ids >= 0) & (ids < count), soft, loss)

    def _shift(self, latent: torch.Tensor | None, past: int, embeds: torch.Tensor) -> torch.Tensor:
        """R for the positions of `embeds` [B, L, width], which follow `past` cached positions."""
        if self.latent is None or latent is None:
            reason = "has no latent, but codes were" if self.latent is None else "has a latent, but no codes were"
            raise ConfigError(f"this network {reason} given (argument `latent`).")
        here = latent[:, past : past + embeds.shape[1]]
        here = F.pad(here, (0, embeds.shape[1] - here.shape[1]), value=-1)
        return self.latent.shift(here).to(embeds.dtype)

    def _posterior_shift(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        n_tokens: int,
        posterior: list[torch.Tensor],
    ) -> Any:
        """A function from X [B, L, width] to R. It samples Z from the posterior and appends the logits to
        `posterior`."""
        if self.is_activation_checkpointing:
            raise ConfigError("a network with a latent cannot be trained with gradient checkpointing.")

        def shift(x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[1], device=x.device)[None] if position_ids is None else position_ids
            rotary = self.language_model.model.rotary_emb(x, positions)
            logits = self.latent.posterior(x, attention_mask, rotary)
            # Position -T - 1 predicts the first token, and position -2 the last one.
            first = -n_tokens - 1
            posterior.append(logits[:, first:-1] if self.config.latent == "token" else logits[:, first:-n_tokens])
            added = self.latent.sample(posterior[0])[1].expand(-1, n_tokens, -1)
            return F.pad(added, (0, 0, x.shape[1] - n_tokens - 1, 1))

        return shift

    def _free_loss(
        self, cross_entropy: torch.Tensor, logits: torch.Tensor, learned: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a Free Transformer and its terms."""
        kl, per_token = free_transformer.kl_from_uniform(logits), 1 / learned.clamp(min=1)
        penalty = F.relu(kl - self.config.latent_kappa * math.log(2)).sum(-1) * per_token
        losses = {
            "cross_entropy": cross_entropy,
            "kl": kl.mean() / math.log(2),
            "elbo": -(cross_entropy + (kl.sum(-1) * per_token).mean()),
        }
        return cross_entropy + penalty.mean(), {name: value.detach() for name, value in losses.items()}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        latent: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments of `forward` for one step of `generate`. Unknown keywords raise TypeError."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            cache=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        if is_first_iteration or cache is None:  # afterwards, images and state are in the cache
            inputs |= {"pixel_values": pixel_values, "state": state}
        return inputs | ({} if latent is None else {"latent": latent})


def _is_conditioned(tower_config: Any) -> bool:
    return getattr(tower_config, "condition_size", None) is not None


AutoConfig.register("vla", VLAConfig)
AutoModel.register(VLAConfig, VLAForActionPrediction)
