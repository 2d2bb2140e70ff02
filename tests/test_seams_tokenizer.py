"""Properties of all action tokenizers, and two tokenizers defined outside the package.

`hold-last`, the example in docs/tokenizers.md, has sequences of variable length. `coarse-fine` has a fixed length, but
some ids are allowed only at some positions. Decoding is compared with an enumeration of all chunks.
"""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria, StoppingCriteriaList

from tests import random_models
from tests.test_docs import DOCS, block
from vla.config import AugmentConfig, DecodingConfig, ModelConfig, TrainConfig
from vla.data.samples import Sample
from vla.decoding.constraint import most_likely
from vla.decoding.engine import Engine
from vla.decoding.prefix import Prefix
from vla.decoding.strategies import generate, teacher_forced
from vla.errors import CheckpointError, ConfigError
from vla.jobs.analyze import Tokens, _summarise, measure
from vla.jobs.analyze_tokenizers import undecodable
from vla.jobs.train import train
from vla.model.build import DataFacts, build_policy
from vla.policy import Policy
from vla.policy.session import Draft, Session, predict
from vla.training.trainer import Collator
from vla.transforms.normalize import compute_statistics
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer, build

WORDS = ["reach the red cube", "open it", "stop"]
HOLD_LAST = block((DOCS / "tokenizers.md").read_text(), "file: hold_last.py", "python")
exec(HOLD_LAST, types.ModuleType("hold_last").__dict__)


@TOKENIZERS.register("coarse-fine")
class CoarseFine(ActionTokenizer):
    """Two tokens per entry: the coarse one has ids 0 and 1, the fine one ids 2 and 3."""

    vocab_size = 4

    def __init__(self, horizon, action_dim, active=None):
        super().__init__(horizon, action_dim, active)
        self.tokens_per_action = 2 * len(self.active)
        self.max_tokens = horizon * self.tokens_per_action

    @classmethod
    def fit(cls, actions, horizon, n_bins=None, active=None):
        return cls(horizon, actions.shape[-1], active)

    def encode(self, chunks):
        digits = np.minimum((self.entries(chunks) + 1) * 2, 3).astype(np.int64)
        return np.stack([digits // 2, 2 + digits % 2], -1).reshape(*digits.shape[:-2], self.max_tokens)

    def decode(self, ids):
        ids = self.check_ids(ids).reshape(*np.shape(ids)[:-1], -1, len(self.active), 2)
        return self.chunks((2 * (2 * ids[..., 0] + ids[..., 1] - 2) + 1) / 4 - 1)

    def allowed(self, ids):
        fine = np.arange(ids.shape[1] + 1) % 2 == 1
        allowed = (np.arange(4) >= 2) == fine[:, None]
        return np.repeat(allowed[None], len(ids), axis=0)


def fitted(name, rng, horizon, n_bins=None):
    """A tokenizer for three dimensions, of which the second is constant."""
    actions = rng.uniform(-1, 1, (200, 3))
    return TOKENIZERS.get(name).fit(
        actions,
        horizon,
        None if name in ("openvla", "fast", "digits") else (n_bins and n_bins | 1) if name == "pca" else n_bins,
        [0, 2],
    )


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), horizon=st.integers(1, 4), n_bins=st.integers(2, 9))
def test_permitted_sequences_decode_to_chunks(name, seed, horizon, n_bins):
    rng = np.random.default_rng(seed)
    tokenizer = fitted(name, rng, horizon, n_bins)
    ids = np.zeros((20, 0), np.int64)
    for place in range(tokenizer.max_tokens):
        allowed = tokenizer.allowed(ids)
        if allowed is None:
            allowed = np.ones((20, place + 1, tokenizer.vocab_size), bool)
        assert allowed.shape == (20, place + 1, tokenizer.vocab_size) and allowed.any(-1).all()
        if place:  # it may depend only on the ids before it
            np.testing.assert_array_equal(
                allowed[:, :-1], tokenizer.allowed(ids[:, :-1]) if tokenizer.constrained else True
            )
        ended = tokenizer.ended(ids)[:, -1]
        assert (allowed[ended, -1].nonzero()[1] == (-1 if tokenizer.end is None else tokenizer.end)).all()
        ids = np.concatenate(
            [ids, np.where(allowed[:, -1], rng.random(allowed[:, -1].shape), -1).argmax(-1)[:, None]], 1
        )
    chunks = tokenizer.decode(ids)
    assert chunks.shape == (20, horizon, 3) and chunks.dtype == np.float32
    assert np.isfinite(chunks).all() and np.abs(chunks).max() <= 1
    inside = np.abs(chunks).max((1, 2)) < 1  # clipped chunks have other coefficients
    chunks = chunks[inside] if name in ("fast", "spline", "pca") else chunks
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(chunks)), chunks, atol=1e-6)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), horizon=st.integers(1, 4), held=st.integers(1, 4))
def test_encoded_chunks_are_permitted(name, seed, horizon, held):
    rng = np.random.default_rng(seed)
    tokenizer = fitted(name, rng, horizon)
    chunks = rng.uniform(-1.2, 1.2, (2, 5, horizon, 3))
    chunks[:, :, -held:] = chunks[:, :, -1:]
    ids = tokenizer.encode(chunks)
    assert ids.shape == (2, 5, tokenizer.max_tokens) and ids.dtype == np.int64
    error = np.abs(tokenizer.decode(ids) - np.clip(chunks, -1, 1))[
        ..., [0, 2]
    ]  # `decode` raises an error for forbidden sequences
    assert error.max() < 0.35 or name in ("spline", "pca")  # these two cannot reproduce noise
    assert error[..., 0, :].max() < 0.35 or name == "pca"  # a spline interpolates the first action
    again = build(json.loads(json.dumps(tokenizer.to_dict())))
    np.testing.assert_array_equal(again.encode(chunks), ids)
    valid = rng.random((2, 5, horizon)) < 0.5
    learned = tokenizer.token_mask(ids, valid)
    assert learned.shape == ids.shape and not (learned & tokenizer.ended(ids)[..., :-1]).any()
    assert np.array_equal(learned.any(-1), valid.any(-1))


def test_a_malformed_sequence_is_rejected():
    tokenizer = build({"name": "hold-last", "horizon": 2, "action_dim": 2, "n_bins": 3})
    assert tokenizer.decode(np.array([0, 2, 3, 3])).tolist() == [[-1, 1], [-1, 1]]
    for ids, place in (([3, 3, 3, 3], 0), ([0, 3, 3, 3], 1), ([0, 2, 3, 1], 3)):
        with pytest.raises(ValueError, match=rf"is not allowed at position {place} of \["):
            tokenizer.decode(np.array([[0, 2, 1, 1], ids]))
    with pytest.raises(ConfigError, match="Unregistered is not registered"):
        type("Unregistered", (CoarseFine,), {})(2, 3).to_dict()


@pytest.fixture(scope="module")
def two_entries(robot) -> DataFacts:
    """Statistics of actions with two non-constant entries."""
    actions = np.random.default_rng(0).uniform(-1, 1, (500, robot.action_dim)).astype(np.float32)
    actions[:, 2:] = 0
    states = np.random.default_rng(1).normal(size=(500, robot.state_dim))
    statistics = {"demo": {"action": compute_statistics(actions), "state": compute_statistics(states)}}
    return DataFacts(robot, statistics, {"demo": actions})


def tiny(folder: Path, facts: DataFacts, **values):
    random_models.save_llama(folder / "llama")
    random_models.save_siglip(folder / "siglip")
    torch.manual_seed(2)
    model = ModelConfig(backbone=str(folder / "llama"), vision=(str(folder / "siglip"),), n_action_steps=1, **values)
    network, processor = build_policy(model, facts)
    with torch.no_grad():  # so that distributions are neither uniform nor certain
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return network.eval(), processor


@pytest.fixture(scope="module")
def held(two_entries, tmp_path_factory):
    """Network and processor with `hold-last`: three actions with two entries and three bins, 819 chunks."""
    return tiny(tmp_path_factory.mktemp("held"), two_entries, tokenizer="hold-last", horizon=3, bins=3)


@pytest.fixture(scope="module")
def digits(two_entries, tmp_path_factory):
    """Network and processor with `coarse-fine`: two actions with two entries, 256 chunks."""
    return tiny(tmp_path_factory.mktemp("digits"), two_entries, tokenizer="coarse-fine", horizon=2)


def enumerated(tokenizer):
    """All permitted sequences, int64 [n, T]."""
    ids = np.zeros((1, 0), np.int64)
    for _ in range(tokenizer.max_tokens):
        row, token = tokenizer.allowed(ids)[:, -1].nonzero()
        ids = np.concatenate([ids[row], token[:, None]], axis=1)
    return ids


class Table:
    """The network's log-probabilities of all chunks for one observation, by ids."""

    def __init__(self, network, batch):
        self.ids = enumerated(network.action_tokenizer)
        begin = network.config.action_token_begin
        repeated = {name: tensor.expand(len(self.ids), *tensor.shape[1:]) for name, tensor in batch.items()}
        decoded = teacher_forced(network, repeated, torch.from_numpy(self.ids + begin))
        self.log_probs, self.entropy = decoded.log_probs(begin).numpy(), decoded.entropy.numpy()
        self.logits = decoded.logits.numpy()

    def greedy(self):
        rows = np.arange(len(self.ids))
        for place in range(self.ids.shape[1]):
            rows = rows[self.ids[rows, place] == self.logits[rows[0], place].argmax()]
        return self.ids[rows[0]]


@pytest.mark.parametrize("policy", ["held", "digits"])
def test_stepwise_parallel_and_generate_agree(policy, observations, request):
    network, processor = request.getfixturevalue(policy)
    tokenizer, begin, rng = network.action_tokenizer, network.config.action_token_begin, np.random.default_rng(0)
    engine, lengths = Engine(network), set()
    for seed in range(2):
        batch = processor.observe(observations(3, seed=seed), WORDS)
        by_hand = [Table(network, {k: v[row : row + 1] for k, v in batch.items()}).greedy() + begin for row in range(3)]
        expected = torch.from_numpy(np.stack(by_hand))
        real = (~tokenizer.ended(expected.numpy() - begin)[:, :-1]).sum(-1)
        lengths |= set(real.tolist())
        stepwise, reference = engine.stepwise(batch), generate(network, batch)
        assert torch.equal(stepwise.ids, expected) and torch.equal(reference.ids, expected)
        assert stepwise.forwards == reference.forwards == real.max()
        for window in (1, 2, 16):
            engine.window = window
            noise = torch.from_numpy(rng.integers(0, tokenizer.vocab_size, expected.shape)) + begin
            for draft in (
                noise,
                torch.where(torch.from_numpy(rng.random(noise.shape) < 0.6), expected, noise),
                expected,
            ):
                parallel = engine.parallel(batch, draft)
                assert torch.equal(parallel.ids, expected) and parallel.forwards <= real.max()
        assert torch.equal(most_likely(tokenizer, stepwise.logits) + begin, expected)
        for decoded in (stepwise, reference, parallel):
            forced = teacher_forced(network, batch, expected)
            torch.testing.assert_close(decoded.log_probs(begin), forced.log_probs(begin), atol=1e-3, rtol=0)
            torch.testing.assert_close(decoded.entropy, forced.entropy, atol=1e-3, rtol=0)
    assert policy == "digits" or len(lengths) > 1  # also within a batch


@pytest.mark.parametrize("name", ["fast", "spline"])
def test_all_strategies_agree_on_compressed_chunks(name, two_entries, observations, tmp_path):
    network, processor = tiny(tmp_path, two_entries, tokenizer=name, horizon=6)
    tokenizer, engine = processor.action_tokenizer, Engine(network)
    batch = processor.observe(observations(3), WORDS)
    stepwise, reference = engine.stepwise(batch), generate(network, batch)
    assert torch.equal(stepwise.ids, reference.ids)
    draft = torch.full_like(stepwise.ids, network.config.action_token_begin)
    assert torch.equal(engine.parallel(batch, draft).ids, stepwise.ids)
    assert engine.parallel(batch, stepwise.ids).forwards <= stepwise.forwards
    for values in ({"temperature": 2.0}, {"num_beams": 3}, {"top_k": 5, "temperature": 1.0}):
        prediction = Policy(network, processor, decoding=DecodingConfig(**values)).predict(observations(3), WORDS)
        assert prediction.chunks.shape == (3, 6, processor.robot.action_dim) and np.isfinite(prediction.chunks).all()
    assert undecodable(tokenizer, 200) == 0


def test_probabilities_are_over_the_chunks(held, observations):
    """They sum to 1 over all chunks, and tokens after the end are certain."""
    network, processor = held
    table = Table(network, processor.observe(observations(1, seed=5), ["reach the red cube"]))
    assert len(table.ids) == 9 + 81 + 729
    assert np.exp(table.log_probs.sum(-1, dtype=np.float64)).sum() == pytest.approx(1, abs=1e-4)
    behind = network.action_tokenizer.ended(table.ids)[:, :-1]
    assert behind.any() and (table.log_probs[behind] == 0).all() and (table.entropy[behind] == 0).all()
    assert (table.entropy[~behind] > 0).all()


@pytest.mark.parametrize("policy", ["held", "digits"])
@pytest.mark.parametrize(
    "config",
    [
        DecodingConfig(temperature=2.0),
        DecodingConfig(temperature=1.0, top_p=0.8, top_k=3),
        DecodingConfig(num_beams=2),
        DecodingConfig(num_beams=5, repetition_penalty=2.0),
        DecodingConfig(frequency_penalty=5.0, presence_penalty=5.0),
    ],
    ids=["sampling", "nucleus", "2 beams", "5 beams", "penalties"],
)
def test_no_strategy_decodes_malformed_chunks(policy, config, observations, request):
    network, processor = request.getfixturevalue(policy)
    prediction = Policy(network, processor, decoding=config).predict(observations(16), ["reach"] * 16)
    permitted = set(map(tuple, enumerated(network.action_tokenizer)))
    assert set(map(tuple, prediction.ids - network.config.action_token_begin)) <= permitted
    assert np.isfinite(prediction.chunks).all() and np.isfinite(prediction.log_probs).all()


def test_enough_beams_find_the_most_likely_chunk(held, observations):
    network, processor = held
    for words in WORDS:
        batch = processor.observe(observations(1), [words])
        table = Table(network, batch)
        decoded = generate(network, batch, DecodingConfig(num_beams=243))
        best = table.ids[table.log_probs.sum(-1).argmax()] + network.config.action_token_begin
        assert decoded.ids.tolist() == [best.tolist()]


def test_a_policy_with_chunks_of_variable_length(held, observations):
    network, processor = held
    policy, plain = Policy(network, processor), Policy(network, processor)
    words = WORDS * 2
    prediction = policy.predict(observations(6), words)
    assert prediction.chunks.shape == (6, 3, 7)
    real = ~network.action_tokenizer.ended(prediction.ids - network.config.action_token_begin)[:, :-1]
    assert not real.all()
    assert (prediction.entropy[~real] == 0).all() and (prediction.entropy[real] > 0).all()
    scored = policy.score(observations(6), words, prediction.chunks)
    np.testing.assert_allclose(scored.log_likelihood.sum(), scored.log_probs[real].sum(), rtol=1e-5)
    session = Session(words[0])
    for observation in observations(4, seed=3):  # each with the draft from the previous chunk
        (found,) = predict(policy, [session], [observation]).ids
        np.testing.assert_array_equal(found, plain.predict([observation], words[:1]).ids[0])
        session.advance(1)


def test_options_that_need_tokens_for_each_action_are_rejected(held, observations):
    policy, words = Policy(*held), ["reach"]
    assert not policy.streams
    with pytest.raises(ConfigError, match="streaming actions needs a batch of one observation"):
        policy.predict(observations(1), words, on_action=print)
    with pytest.raises(ConfigError, match="cannot be stopped early"):
        policy.predict(observations(1), words, stopping=StoppingCriteriaList([MaxLengthCriteria(50)]))
    (draft,) = policy.predict(observations(1), words).next_draft
    with pytest.raises(ConfigError, match="action prefix cannot be used"):
        policy.predict(observations(1), words, [draft.given(np.zeros((1, 7)))])
    for values in ({"readout": "mean"}, {"ensemble": 0.1}, {"max_actions": 2}):
        with pytest.raises(ConfigError, match="need tokens for each action"):
            Policy(*held, decoding=DecodingConfig(**values))


@pytest.mark.parametrize("decoding", [DecodingConfig(), DecodingConfig(temperature=1.0)], ids=["engine", "generate"])
def test_a_constrained_chunk_continues_a_prefix(digits, observations, decoding):
    """Actions of the prefix are kept and continued, and actions can be streamed."""
    network, processor = digits
    policy, begin = Policy(network, processor, decoding=decoding), network.config.action_token_begin
    drafts = processor.decode_actions(enumerated(network.action_tokenizer)[[17, 100, 250]] + begin)
    conditioned = [Draft(draft).given(draft[:count]) for draft, count in zip(drafts, (1, 1, 0), strict=True)]
    prediction = policy.predict(observations(3), ["reach"] * 3, conditioned)
    encoded, counts = processor.encode_actions(drafts), torch.tensor([4, 4, 0])
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(prediction.ids[row, :count], encoded[row, :count])
    if decoding.greedy:
        batch, given = processor.observe(observations(3), ["reach"] * 3), Prefix(counts, torch.zeros(3))
        told = generate(network, batch, prefix=(torch.from_numpy(encoded), given))
        np.testing.assert_array_equal(told.ids, prediction.ids)
        # A prefix token that is not allowed is rejected, at any threshold.
        malformed = torch.full((3, 8), begin)
        for found in (policy._decoder.engine.parallel(batch, malformed, None, given),
                      generate(network, batch, prefix=(malformed, given))):  # fmt: skip
            processor.decode_actions(found.ids.numpy())
            assert (found.ids[:2, 0] == begin).all()
    seen = []
    chunk = policy.predict(observations(1), ["reach"], on_action=lambda *action: seen.append(action)).chunks[0]
    np.testing.assert_array_equal([action for _, action in seen], chunk)


def test_tokens_after_the_end_are_not_in_the_loss(held):
    network, processor = held
    rng, begin = np.random.default_rng(0), network.config.action_token_begin
    moving, still = processor.decode_actions(np.array([[0, 1, 2, 0, 1, 1], [0, 1, 3, 3, 3, 3]]) + begin)
    image = rng.integers(0, 256, (2, *(processor.config.image_size,) * 2, 3), np.uint8)
    sample = Sample(image, np.zeros(7), still, np.array([True, True, False]), "reach", 0)
    samples = [sample, dataclasses.replace(sample, chunk=moving)]
    batch = Collator(processor, ["demo"])(samples)
    assert (batch["labels"] - begin).tolist() == [[0, 1, 3, *[-100 - begin] * 3], [0, 1, 2, 0, 1, 1]]
    with torch.no_grad():  # the loss is a mean over each sample's learned tokens, then over samples
        logits = network(**batch).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        expected = (each[0, :3].mean() + each[1].mean()) / 2
        assert float(network(**batch).loss) == pytest.approx(float(expected), rel=1e-5)
    measured = measure(Policy(network, processor), samples)
    assert measured.learned.sum(-1).tolist() == [3, 6]
    only = Tokens(*(values[:1] for values in measured))  # no sequence is longer than three tokens
    assert len(_summarise(only, np.array([0]))["free_running_error"]["by_position"]) == 3


def test_a_plugin_is_trained_and_its_checkpoint_names_it(robot, dataset, tmp_path, start_vla, observations):
    (tmp_path / "hold_last.py").write_text(HOLD_LAST)
    demos = dataset("squares", robot, episodes=3)
    flags = ["--data", demos, "--out", "run", "--backbone", "tiny-init", "--steps", 2]
    flags += ["--batch-size", 2, "--tokenizer", "hold-last", "--bins", 15, "--horizon", 3, "--method", "full"]
    process = start_vla(
        "--plugin", "hold_last", "train", *flags, "--val-fraction", 0.4, "--eval-every", 1, cwd=tmp_path
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "up to 21 tokens, vocabulary of 16" in out
    assert "eval_l1/dx" in (tmp_path / "run" / "metrics.jsonl").read_text()
    policy = Policy.from_pretrained(str(tmp_path / "run"))
    assert policy.processor.action_tokenizer.name == "hold-last"
    chunk = policy.predict_chunk(observations(1)[0], "go to square 1")
    assert chunk.shape == (3, 7) and np.isfinite(chunk).all()

    model = ModelConfig(backbone="tiny-init", tokenizer="hold-last")
    with pytest.raises(ConfigError, match=r"augment.prefix .* 'hold-last' span several actions"):
        train(TrainConfig(data=(demos,), out=tmp_path / "other", model=model, augment=AugmentConfig(prefix=0.5)))
    file = tmp_path / "run" / "policy" / "config.json"
    values = json.loads(file.read_text())
    assert values["action_tokenizer"]["name"] == "hold-last"
    values["action_tokenizer"]["name"] = "hold_last"  # a module in the working directory, which must not be imported
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"unknown action tokenizer 'hold_last'.*--plugin MODULE"):
        Policy.from_pretrained(str(tmp_path / "run"))
