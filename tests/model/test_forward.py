"""The network's arguments: documented arguments work, and all others are rejected."""

import pytest
import torch
from transformers import DynamicCache

from tests.decoders import reference
from vla.config import LoraConfig
from vla.model import lora


@pytest.fixture
def batch(nano, observations):
    return nano[1].observe(observations(2), ["reach", "pick up the red cube"])


@pytest.mark.parametrize("name", ["unknown", "past_key_values", "inputs_embeds", "output_attentions", "cache_position"])
def test_other_keywords_are_rejected(nano, batch, name):
    network, _ = nano
    with pytest.raises(TypeError, match=name):
        network(**batch, **{name: None})
    with pytest.raises(TypeError, match=name):
        network.prepare_inputs_for_generation(batch["input_ids"], **{name: None})
    with pytest.raises(TypeError, match=name):
        lora.attach(network, LoraConfig(rank=2))(**batch, **{name: None})


def test_generate_rejects_other_keywords(nano, batch):
    with pytest.raises(ValueError, match="colour"):
        reference(nano[0], batch, colour=1)


def test_towers_reject_other_keywords(nano):
    with pytest.raises(TypeError, match="unknown"):
        nano[0].vision_towers[0](torch.zeros(1, 3, 96, 96), torch.zeros(1, 256), unknown=1)


@torch.inference_mode()
def test_cache(nano, batch):
    """The logits of the last token are the same with a cache of the others and in one pass."""
    network, _ = nano
    whole = network(**batch).logits[:, -1:]
    front = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}
    first = network(**(batch | front), use_cache=True)
    assert isinstance(first.cache, DynamicCache) and first.cache.get_seq_length() == front["input_ids"].shape[1]
    last = network(batch["input_ids"][:, -1:], batch["attention_mask"], state=batch["state"], cache=first.cache)
    torch.testing.assert_close(last.logits, whole, rtol=1e-4, atol=1e-4)
    assert network(**batch).cache is None


@torch.inference_mode()
def test_logits_to_keep_and_return_dict(nano, batch):
    network, _ = nano
    whole = network(**batch).logits
    for kept, expected in ((3, whole[:, -3:]), (torch.tensor([2, 5]), whole[:, [2, 5]]), (0, whole)):
        torch.testing.assert_close(network(**batch, logits_to_keep=kept).logits, expected, rtol=1e-4, atol=1e-5)
    (logits,) = network(**batch, return_dict=False)
    torch.testing.assert_close(logits, whole)


@torch.no_grad()
def test_soft_labels_replace_the_targets_of_action_tokens_in_training_only(nano, batch):
    """The loss equals torch's cross-entropy with probabilities as targets; other words keep their one-hot labels."""
    network = nano[0]
    tokenizer, begin = network.action_tokenizer, network.config.action_token_begin
    targets = torch.from_numpy(tokenizer.soft_targets(2.0))
    labels = torch.randint(begin, begin + tokenizer.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    labels[0, 4:], labels[1, 0] = -100, 7  # not learned; a word
    ids = torch.cat([batch["input_ids"], labels.clamp(min=0)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(labels)], 1)
    inputs = batch | {"input_ids": ids, "attention_mask": mask, "labels": labels}
    hard = network(**inputs)
    network.soft_targets = targets
    try:
        assert torch.equal(network(**inputs).loss, hard.loss)  # validation
        network.train()
        soft = network(**inputs)
    finally:
        network.eval()
        network.soft_targets = None
    expected = torch.nn.functional.one_hot(labels.clamp(min=0), network.config.vocab_size).float()
    action = labels >= begin
    expected[action] = torch.nn.functional.pad(
        targets[labels[action] - begin], (begin, network.config.vocab_size - begin - tokenizer.vocab_size)
    )
    each = torch.nn.functional.cross_entropy(soft.logits.mT, expected.mT, reduction="none")
    torch.testing.assert_close(soft.loss, ((each[0, :4].mean() + each[1].mean()) / 2))
    assert "soft_targets" not in network.state_dict()
