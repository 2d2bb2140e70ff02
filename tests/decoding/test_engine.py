"""The engine decodes the same tokens as `generate`, for all shapes, batches and drafts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests import random_models
from tests.decoders import reference
from vla.config import LoraConfig, ModelConfig
from vla.decoding.engine import Engine
from vla.decoding.strategies import teacher_forced
from vla.errors import ConfigError
from vla.model import lora
from vla.model.build import build_policy
from vla.model.free_transformer import align

WORDS = ["pick up the red cube", "open the drawer", "please put the green ball on the blue zone", "reach"]


def save_qwen2(folder) -> None:
    """A Qwen2 with grouped queries, biases and a tied head."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=640, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:  # nonzero, so that ignoring them changes the tokens
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias, std=0.2)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="module", params=["nano", "llama, grouped queries", "llama, tied", "qwen2, biases"])
def policy(request, facts, tmp_path_factory):
    """Networks with random weights, large enough that tokens differ, with their processors."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"horizon": 4, "n_action_steps": 4, "bins": 31}
    if request.param == "nano":
        settings["backbone"] = "nano-init"
    else:
        random_models.save_siglip(folder / "siglip")
        if request.param == "qwen2, biases":
            save_qwen2(folder / "decoder")
        else:
            random_models.save_llama(folder / "decoder", tie_word_embeddings=request.param == "llama, tied")
        settings |= {"backbone": str(folder / "decoder"), "vision": (str(folder / "siglip"),)}
    torch.manual_seed(0)
    network, processor = build_policy(ModelConfig(**settings), facts)
    with torch.no_grad():
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return network.eval(), processor


@pytest.mark.parametrize("size", [1, 16])
def test_tokens_equal_generate(policy, observations, size):
    network, processor = policy
    engine, torch_rng = Engine(network), torch.Generator().manual_seed(size)
    different = set()
    for trial in range(16 // size):
        words = [WORDS[(trial + i) % len(WORDS)] for i in range(size)]
        batch = processor.observe(observations(size, seed=trial), words)
        expected = reference(network, batch)
        assert torch.equal(engine.stepwise(batch).ids, expected)
        begin, rows = network.config.action_token_begin, processor.action_tokenizer.vocab_size
        noise = torch.randint(begin, begin + rows, expected.shape, generator=torch_rng)
        half = torch.where(torch.rand(expected.shape, generator=torch_rng) < 0.5, noise, expected)
        perfect = 1 if size == 1 else 4  # larger batches have a shorter window
        for draft, forwards in ((noise, range(2, 17)), (half, range(1, 17)), (expected, [perfect])):
            decoded = engine.parallel(batch, draft)
            assert torch.equal(decoded.ids, expected) and decoded.forwards in forwards
            told = teacher_forced(network, batch, expected).logits
            assert float((decoded.logits - told).abs().max()) < 0.02  # the networks amplify rounding
        different |= {tuple(row.tolist()) for row in expected}
    assert len(different) > 2  # the tokens depend on the input


@settings(max_examples=25)
@given(window=st.integers(1, 40), wrong=st.lists(st.integers(0, 15), max_size=5), seed=st.integers(0, 3))
def test_drafts_and_windows_do_not_change_tokens(facts, observations, window, wrong, seed):
    torch.manual_seed(0)
    network, processor = build_policy(ModelConfig(backbone="nano-init", horizon=4, n_action_steps=4, bins=31), facts)
    network.eval()
    batch = processor.observe(observations(2, seed=seed), WORDS[:2])
    expected = Engine(network).stepwise(batch).ids
    draft = expected.clone()
    for place in wrong:
        draft[:, place] = network.config.action_token_begin + (draft[:, place] + 7) % 31
    decoded = Engine(network, window=window).parallel(batch, draft)
    assert torch.equal(decoded.ids, expected)
    assert decoded.forwards <= 1 + 16


def test_an_unchanged_prompt_is_not_computed_again(nano, observations):
    network, processor = nano
    engine, prefills = Engine(network), []
    forward = engine._forward
    engine._forward = lambda hidden, *rest: prefills.append(hidden.shape[1]) or forward(hidden, *rest)
    lengths = []
    for trial, words in enumerate((WORDS[:2], WORDS[:2], WORDS[1:3], WORDS[1:3], WORDS[:2])):
        batch = processor.observe(observations(2, seed=trial), words)
        prefills.clear()
        assert torch.equal(engine.stepwise(batch).ids, reference(network, batch))
        lengths.append(prefills[0] - batch["input_ids"].shape[1])
    assert lengths[0] == lengths[2] == lengths[4] == 0
    assert lengths[1] < 0 and lengths[3] < 0


@pytest.mark.parametrize("kind", ["token", "chunk"])
def test_tokens_equal_generate_under_the_same_latent(nano, observations, kind):
    """Stepwise, in parallel and with a cached prompt; rows are padded and have different codes."""
    network, processor = nano
    network.add_latent(kind, bits=3, form="one_hot", kappa=1.0)
    torch.manual_seed(5)
    torch.nn.init.normal_(network.latent.injection, std=100)  # as large as the activations it is added to
    with torch.no_grad():
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    network.latent.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the posterior was computed"))
    engine, batch = Engine(network), processor.observe(observations(3), WORDS[:3])
    length, n_tokens, different = batch["input_ids"].shape[1], network.action_tokenizer.max_tokens, set()
    for _ in range(3):
        codes = torch.randint(8, (3, network.config.n_latents))
        batch["latent"] = align(codes, length, n_tokens)
        expected = reference(network, batch)
        stepwise = engine.stepwise(batch)
        told = teacher_forced(network, batch, expected).logits
        assert torch.equal(stepwise.ids, expected) and float((stepwise.logits - told).abs().max()) < 0.02
        draft = expected.clone()
        draft[:, 5] = network.config.action_token_begin + 3
        assert torch.equal(engine.parallel(batch, draft).ids, expected)
        different.add(tuple(expected.flatten().tolist()))
    assert len(different) == 3  # the latent changes the tokens
    with pytest.raises(ConfigError, match="has a latent, but the batch has no latent codes"):
        engine.stepwise(processor.observe(observations(1), WORDS[:1]))


def test_an_interrupted_prefill_is_not_reused(nano, observations):
    network, processor = nano
    engine, batch = Engine(network), processor.observe(observations(1), WORDS[:1])
    engine.stepwise(processor.observe(observations(1), WORDS[1:2]))
    forward, engine._forward = engine._forward, None
    with pytest.raises(TypeError):
        engine.stepwise(batch)
    engine._forward = forward
    assert torch.equal(engine.stepwise(batch).ids, reference(network, batch))


def test_an_engine_grows_with_its_batches(nano, observations):
    network, processor = nano
    engine = Engine(network)
    for size, words in ((1, "reach"), (5, "please put the green ball on the blue zone " * 6), (2, "reach")):
        batch = processor.observe(observations(size), [words] * size)
        assert torch.equal(engine.stepwise(batch).ids, reference(network, batch))


def test_an_unmerged_adapter_is_used(nano, observations):
    network, processor = nano
    batch = processor.observe(observations(4), WORDS)
    before = reference(network, batch)
    adapted = lora.attach(network, LoraConfig(rank=4, alpha=16)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    network = adapted.get_base_model()
    expected = reference(network, batch)
    assert not torch.equal(before, expected)
    assert torch.equal(Engine(network).stepwise(batch).ids, expected)


def test_an_engine_does_not_change_its_network(nano, observations):
    """Neither values nor storage, because the network may be trained further or saved."""
    network, processor = nano
    network.requires_grad_(False)
    before = {name: (p.data_ptr(), p.stride(), p.clone()) for name, p in network.named_parameters()}
    Engine(network).stepwise(processor.observe(observations(2), WORDS[:2]))
    for name, parameter in network.named_parameters():
        address, stride, value = before[name]
        assert (parameter.data_ptr(), parameter.stride()) == (address, stride) and torch.equal(parameter, value), name


def test_a_disabled_adapter_is_not_used(nano, observations):
    network, processor = nano
    batch = processor.observe(observations(2), WORDS[:2])
    before = reference(network, batch)
    adapted = lora.attach(network, LoraConfig(rank=4, alpha=16, train_action_rows=False)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    with adapted.disable_adapter():
        assert torch.equal(Engine(adapted.get_base_model()).stepwise(batch).ids, before)
    adapted.merge_adapter()
    assert torch.equal(Engine(adapted.get_base_model()).stepwise(batch).ids, reference(network, batch))


def test_another_architecture_is_rejected_by_name(nano):
    network, _ = nano
    network.language_model.config.model_type = "gpt_neox"
    with pytest.raises(ConfigError, match=r"'gpt_neox'.*llama, mistral, qwen2"):
        Engine(network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_runs_on_any_processor(nano, observations, dtype):
    """oneDNN packs such weights on some processors only. Rounding differs from `generate`, so logits are compared."""
    network, processor = nano
    network.to(dtype)
    batch = processor.observe(observations(2), WORDS[:2])
    decoded = Engine(network).stepwise(batch)
    told = teacher_forced(network, batch, decoded.ids).logits
    assert decoded.logits.dtype == dtype and float((decoded.logits - told).abs().max()) < 0.05
