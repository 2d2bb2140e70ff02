"""The latent of a Free Transformer: its maths, compared with independent computations, and its effect on a network."""

import itertools
import math

import pytest
import torch

from vla.config import LoraConfig, ModelConfig, check
from vla.errors import ConfigError
from vla.model import lora
from vla.model.build import build_policy
from vla.model.free_transformer import Latent, align, kl_from_uniform, to_bits, to_codes
from vla.model.modeling import VLAForActionPrediction
from vla.policy import checkpoint

WORDS = ["pick up the red cube", "reach"]


def with_latent(pair, kind="token", form="one_hot", bits=3, size=1.0):
    """The network and its processor, with a latent whose injection is random, as after training."""
    network, processor = pair
    network.add_latent(kind, bits, form, kappa=0.5)
    torch.manual_seed(5)
    torch.nn.init.normal_(network.latent.injection, std=size)
    return network.eval(), processor


def codes_for(network, batch, seed=0):
    """Random codes by position, for each row."""
    shape = (len(batch["input_ids"]), network.config.n_latents)
    codes = torch.randint(2**network.config.latent_bits, shape, generator=torch.Generator().manual_seed(seed))
    return align(codes, batch["input_ids"].shape[1], network.action_tokenizer.max_tokens)


def labelled(network, processor, observations, n=2):
    """A batch with suffix and labels."""
    batch, tokenizer = processor.observe(observations(n), WORDS[:n]), network.action_tokenizer
    labels = torch.randint(0, tokenizer.vocab_size, (n, tokenizer.max_tokens)) + network.config.action_token_begin
    batch["input_ids"] = torch.cat([batch["input_ids"], labels], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(labels)], dim=1)
    return batch, labels


@pytest.mark.parametrize("form", ["one_hot", "factored"])
def test_gradient_is_that_of_the_exact_expectation(nano, form):
    """The gradient of each sample equals that of E[c . W y(Z)], summed over all codes."""
    latent = with_latent(nano, form=form)[0].latent
    logits = torch.randn(4, 3, requires_grad=True)
    direction = torch.randn(4, 256)
    expectation = torch.zeros(())
    for bits in itertools.product((0.0, 1.0), repeat=3):
        bit = torch.tensor(bits)
        probability = (bit * logits.sigmoid() + (1 - bit) * (1 - logits.sigmoid())).prod(-1)
        code = int(bit[0] + 2 * bit[1] + 4 * bit[2])
        vector = latent.injection[code] if form == "one_hot" else (2 * bit - 1) @ latent.injection
        expectation = expectation + (probability * (direction @ vector)).sum()
    (exact,) = torch.autograd.grad(expectation, logits)
    for _ in range(2):
        codes, shift = latent.sample(logits)
        assert torch.equal(shift, latent.shift(codes))  # the value is that of the sample
        (gradient,) = torch.autograd.grad((shift * direction).sum(), logits)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


def test_samples_follow_the_posterior(nano):
    latent = with_latent(nano)[0].latent
    logits = torch.tensor([0.5, -1.0, 2.0])
    codes, _ = latent.sample(logits.expand(20_000, 3))
    torch.testing.assert_close(to_bits(codes, 3).float().mean(0), logits.sigmoid(), rtol=0, atol=0.02)
    assert torch.equal(to_codes(to_bits(codes, 3)), codes)


def test_kl_equals_the_sum_over_codes():
    logits = torch.randn(5, 4, dtype=torch.float64) * 3
    total = torch.zeros(5, dtype=torch.float64)
    for bits in itertools.product((0, 1), repeat=4):
        q = torch.where(torch.tensor(bits, dtype=torch.bool), logits.sigmoid(), 1 - logits.sigmoid()).prod(-1)
        total += q * (q * 2**4).log()
    torch.testing.assert_close(kl_from_uniform(logits).double(), total, rtol=1e-5, atol=1e-6)
    assert kl_from_uniform(torch.zeros(1, 16)) == 0
    assert kl_from_uniform(torch.full((1, 16), 40.0)).item() == pytest.approx(16 * math.log(2))


@pytest.mark.parametrize("form", ["one_hot", "factored"])
@pytest.mark.parametrize("kind", ["token", "chunk"])
def test_an_untrained_latent_changes_no_logit(nano, observations, kind, form):
    network, processor = nano
    batch, labels = labelled(network, processor, observations)
    before = network(**batch).logits
    loss = network(**batch, labels=labels).loss
    network.add_latent(kind, 3, form, kappa=1e3)
    assert torch.equal(network(**batch, latent=codes_for(network, batch)).logits, before)
    output = network(**batch, labels=labels)
    assert torch.equal(output.loss, loss)  # there is no penalty below kappa
    assert output.losses["elbo"] <= -loss  # KL(Q || U) >= 0
    output.loss.backward()
    assert network.latent.injection.grad.abs().sum() > 0


def test_the_latent_enters_keys_and_values_of_the_middle_block_only(nano, observations):
    """Compared with the block's projections of the normalised X + R, computed from outside."""
    network, processor = with_latent(nano)
    batch = processor.observe(observations(2), WORDS)
    batch["latent"] = codes_for(network, batch)
    seen, layers = {}, network.language_model.model.layers
    layers[2].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(layers[2].self_attn, name)
        projection.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    free = network(**batch).logits
    block, shift = layers[2], network.latent.shift(batch["latent"][:, : seen["x"].shape[1]])
    assert (shift[:, :-1] == 0).all() and (shift[:, -1] != 0).any()
    mixed = block.input_layernorm(seen["x"] + shift)
    assert torch.equal(seen["k_proj"], block.self_attn.k_proj(mixed))
    assert torch.equal(seen["v_proj"], block.self_attn.v_proj(mixed))
    assert torch.equal(seen["q_proj"], block.self_attn.q_proj(block.input_layernorm(seen["x"])))
    assert not torch.equal(network(**batch | {"latent": codes_for(network, batch, seed=1)}).logits, free)
    assert not layers[2].self_attn.k_proj._forward_pre_hooks  # no hooks remain


def test_the_posterior_depends_on_the_whole_chunk_but_not_on_padding(nano, observations):
    network, processor = with_latent(nano, "chunk")
    batch, labels = labelled(network, processor, observations)

    def kl(**changes):
        return network(**batch | changes, labels=labels).losses["kl"]

    reference = kl()
    changed = batch["input_ids"].clone()
    changed[:, -1] = network.config.action_token_begin + (changed[:, -1] + 1) % 31  # not an input of others
    assert not torch.equal(kl(input_ids=changed), reference)
    padded = {name: torch.nn.functional.pad(batch[name], (4, 0)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(kl(**padded), reference, rtol=1e-4, atol=1e-6)


def test_free_bits_penalise_each_latent_above_kappa(nano, observations):
    network, processor = with_latent(nano)
    with torch.no_grad():
        network.latent.readout.bias.copy_(torch.tensor([3.0, 0.0, -2.0]))
        network.latent.readout.weight.zero_()
    batch, labels = labelled(network, processor, observations)
    labels[0, 5:] = -100  # five learned tokens in one row, all tokens in the other
    network.latent.injection.data.zero_()
    bits = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in (1 / (1 + math.exp(-x)) for x in (3.0, 0.0, -2.0))]
    kl, n = 3 - sum(bits), network.action_tokenizer.max_tokens
    output = network(**batch, labels=labels)
    assert output.losses["kl"].item() == pytest.approx(kl, rel=1e-4)
    penalty = (kl - 0.5) * math.log(2) * n * (1 / 5 + 1 / n) / 2
    assert (output.loss - output.losses["cross_entropy"]).item() == pytest.approx(penalty, rel=1e-3)


@pytest.mark.parametrize("kind", ["token", "chunk"])
def test_cached_equals_uncached_and_never_runs_the_posterior(nano, observations, kind):
    network, processor = with_latent(nano, kind)
    network.latent.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the posterior was computed"))
    batch = processor.observe(observations(2), WORDS)
    batch["latent"] = codes_for(network, batch)
    first, begin = batch["input_ids"].shape[1], network.config.action_token_begin
    suffix = torch.randint(begin, begin + 31, (2, 3))
    whole = {
        "input_ids": torch.cat([batch["input_ids"], suffix], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(suffix)], 1),
    }
    uncached = network(**batch | whole).logits[:, first - 1 :]
    output = network(**batch, use_cache=True)
    cached = [output.logits[:, -1:]]
    for t in range(3):
        step = {"input_ids": suffix[:, t : t + 1], "attention_mask": whole["attention_mask"][:, : first + t + 1]}
        output = network(**step, latent=batch["latent"], cache=output.cache, use_cache=True)
        cached.append(output.logits)
    torch.testing.assert_close(torch.cat(cached, 1), uncached, rtol=1e-4, atol=1e-5)


def test_lora_trains_the_latent_and_merges(nano, observations, tmp_path):
    network, processor = with_latent(nano)
    batch, labels = labelled(network, processor, observations)
    adapted = lora.attach(network, LoraConfig(rank=2))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    before = network.latent.injection.clone()
    for _ in range(2):
        adapted(**batch, labels=labels).loss.backward()
        optimizer.step()
    adapted.eval()
    assert not torch.equal(network.latent.injection, before)
    given = batch | {"latent": codes_for(network, batch)}
    unmerged = network(**given).logits
    merged = lora.merge(adapted)
    assert isinstance(merged.latent, Latent)
    torch.testing.assert_close(merged(**given).logits, unmerged, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = VLAForActionPrediction.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**given).logits, merged(**given).logits)
    assert (loaded.config.latent, loaded.config.latent_bits, loaded.config.latent_kappa) == ("token", 3, 0.5)


def test_bad_input(nano, observations, facts):
    network, processor = nano
    batch = processor.observe(observations(1), WORDS[:1])
    with pytest.raises(ConfigError, match="has no latent, but codes were given"):
        network(**batch, latent=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"1 to 16 bits, got 20.*use 'factored'"):
        network.add_latent("token", 20, "one_hot", 1.0)
    assert network.config.latent == "none"
    network.language_model.config.num_hidden_layers = 3
    with pytest.raises(ConfigError, match="must be even; this decoder has 3"):
        network.add_latent("token", 8, "one_hot", 1.0)
    network.language_model.config.num_hidden_layers = 4
    network.add_latent("token", 20, "factored", 1.0)
    with pytest.raises(ConfigError, match="has a latent, but no codes were given"):
        network(**batch)
    with pytest.raises(ConfigError, match="latent_kappa must be positive, got 0"):
        check(ModelConfig(latent="token", latent_kappa=0))
    with pytest.raises(ConfigError, match="latent_bits must be between 1 and 32, got 33"):
        check(ModelConfig(latent="token", latent_bits=33))
    with pytest.raises(ConfigError, match="latent_bits needs a latent"):
        check(ModelConfig(latent="none", latent_bits=3))


def test_a_trained_latent_keeps_its_size(nano, facts, tmp_path):
    network, processor = with_latent(nano, "chunk")
    checkpoint.save(network, processor, tmp_path / "policy")
    settings = {"backbone": str(tmp_path / "policy")}
    with pytest.raises(ConfigError, match="latent_bits of this checkpoint is 3 and cannot become 4"):
        build_policy(ModelConfig(**settings, latent_bits=4), facts)
    with pytest.raises(ConfigError, match="which cannot be removed"):
        build_policy(ModelConfig(**settings, latent="none"), facts)
    again, _ = build_policy(ModelConfig(**settings, latent="episode", latent_kappa=2.0), facts)
    assert (again.config.latent, again.config.latent_kappa, again.config.latent_bits) == ("episode", 2.0, 3)
    assert torch.equal(again.latent.injection, network.latent.injection)
