"""The latent variable of a Free Transformer (Fleuret, arXiv:2510.17558).

If several actions are good, a plain decoder decides between them token by token. Here, a random latent Z of `bits` bits
makes the decision in advance. It enters the keys and values of the middle block:

    X = blocks 1..L/2 of the input,    block L/2 + 1 has queries X, and keys and values X + R,    R = W y(Z).

In training, Z is sampled from a posterior Q(Z | X). Its logits are computed by a block without causal mask; the queries
are one learned vector, the keys and values are X. In decoding, Z is uniform and the posterior is not computed. W starts
at zero, so adding a latent to a trained network does not change its predictions. The loss is

    cross-entropy + (1 / T) sum_n max(0, KL(Q(Z_n | X) || U) - kappa),    T: number of learned tokens.

Owns: the posterior, the mapping from bits to R and its gradient, the KL divergence, and replacing the input of a
block's keys and values. It does not know the sequence of images and actions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from vla.errors import ConfigError

FORMS = ("one_hot", "factored")
MAX_BITS = {"one_hot": 16, "factored": 32}  # W of the one-hot form has 2^bits rows


class Latent(nn.Module):
    """The latent of a LLaMA decoder: posterior and injection.

    Args:
        config: configuration of the decoder.
        bits: number of bits of a latent, H.
        form: "one_hot": y(Z) is the one-hot vector of the code, and W has a row for each of 2^H codes (as in the
            paper); "factored": y(Z) is the H bits as -1 and 1, and W has a row for each bit.
    Raises:
        ConfigError: the decoder or `bits` is not supported.
    """

    def __init__(self, config: Any, bits: int, form: str = "one_hot") -> None:
        super().__init__()
        check(config, bits, form)
        self.bits, self.form, width = bits, form, config.hidden_size
        self.query = nn.Parameter(torch.randn(width) * config.initializer_range)
        self.encoder = LlamaDecoderLayer(config, layer_idx=0)
        self.encoder.self_attn.is_causal = False
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.readout = nn.Linear(width, bits)
        self.injection = nn.Parameter(torch.zeros(2**bits if form == "one_hot" else bits, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.zeros_(self.readout.bias)

    def posterior(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Logits of the bits of Q(Z | X) at every position, [B, L, bits].

        Args:
            x: the sequence between the two halves of the decoder, [B, L, width].
            attention_mask: int64 [B, L], 0 for padding.
            rotary: the decoder's rotary embeddings of the positions, cos and sin.
        """
        queries, block = self.query.to(x.dtype).expand_as(x), self.encoder
        mask = create_bidirectional_mask(block.self_attn.config, x, attention_mask)
        with keys_and_values(block, block.input_layernorm(x)):
            hidden = block(queries, attention_mask=mask, position_embeddings=rotary)
        return self.readout(self.norm(hidden))

    def sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample Z from the posterior `logits` [..., bits]. Returns its codes, int64 [...], and R [..., width].

        The gradient of R with respect to the logits is that of W E[y(Z)], independent of the sample (straight-through).
        In the one-hot form, E[y(Z)] is the probability of every code; in the factored form, the mean of every bit.
        """
        with torch.autocast(logits.device.type, enabled=False):
            codes = to_codes(torch.rand_like(logits, dtype=torch.float32) < logits.float().sigmoid())
            soft = probabilities(logits) if self.form == "one_hot" else 2 * logits.float().sigmoid()
            shift = self.shift(codes) + (soft - soft.detach()) @ self.injection.float()
        return codes, shift.to(logits.dtype)

    def shift(self, codes: torch.Tensor) -> torch.Tensor:
        """R [..., width] for codes, int64 [...]. The code -1 means no latent (R = 0)."""
        if self.form == "one_hot":
            found = F.embedding(codes.clamp(min=0), self.injection)
        else:
            found = (2.0 * to_bits(codes, self.bits).to(self.injection.dtype) - 1) @ self.injection
        return torch.where((codes >= 0).unsqueeze(-1), found, 0)


def check(config: Any, bits: int, form: str) -> None:
    """Raise ConfigError if a decoder cannot have a latent of this size and form."""
    if config.model_type != "llama":
        raise ConfigError(f"a latent needs a decoder of type 'llama', got {config.model_type!r}.")
    if config.num_hidden_layers % 2:
        raise ConfigError(
            "a latent enters in the middle of the decoder, so the number of layers must be even; this decoder has "
            f"{config.num_hidden_layers}."
        )
    if form not in FORMS:
        raise ConfigError(f"the form of a latent is one of {', '.join(FORMS)}; got {form!r}.")
    if not 1 <= bits <= MAX_BITS[form]:
        hint = " (its matrix has 2^bits rows); use 'factored'" if 16 < bits <= MAX_BITS["factored"] else ""
        raise ConfigError(f"a latent of the form {form!r} has 1 to {MAX_BITS[form]} bits, got {bits}{hint}.")


def align(codes: torch.Tensor, prefix: int, n_tokens: int) -> torch.Tensor:
    """Codes by position, int64 [B, prefix - 1 + n_tokens], as input of the network and the engine. A position has the
    code of the token that it predicts, or -1 if that token is part of the prompt prefix.

    Args:
        codes: int64 [B, n_tokens], or [B, 1] for one code for all tokens.
        prefix: length of the prompt prefix, whose last position predicts the first token.
    """
    return F.pad(codes.expand(-1, n_tokens), (prefix - 1, 0), value=-1)


def to_codes(bits: torch.Tensor) -> torch.Tensor:
    """Bits [..., H], the lowest first, -> codes, int64 [...]."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def to_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, int64 [...], -> their bits, int64 [..., H], the lowest first."""
    return codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Probability of every code, float32 [..., 2^H], from the logits of its independent bits [..., H]."""
    codes = torch.arange(2 ** logits.shape[-1], device=logits.device)
    ones = to_bits(codes, logits.shape[-1]).float()
    return (logits.float() @ ones.T + F.logsigmoid(-logits.float()).sum(-1, keepdim=True)).exp()


def kl_from_uniform(logits: torch.Tensor) -> torch.Tensor:
    """KL(Q || U) in nats, float32 [...], for independent bits with logits [..., H] and uniform bits U."""
    logits = logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
    return (math.log(2) - entropy).sum(-1)


@contextlib.contextmanager
def keys_and_values(block: Any, source: torch.Tensor) -> Iterator[None]:
    """Within the context, a decoder block computes keys and values from `source`, normalised [B, L, width], instead of
    its input."""
    projections = (block.self_attn.k_proj, block.self_attn.v_proj)
    handles = [projection.register_forward_pre_hook(lambda module, args: (source,)) for projection in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def injected(decoder: Any, shift: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the context, the middle block of `decoder` (a LlamaModel) computes keys and values from X + shift(X),
    where X [B, L, width] is its input."""
    block = decoder.layers[len(decoder.layers) // 2]
    with contextlib.ExitStack() as leave:

        def enter(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            source = module.input_layernorm(args[0] + shift(args[0]))
            leave.enter_context(keys_and_values(module, source))

        leave.callback(block.register_forward_pre_hook(enter).remove)
        yield
