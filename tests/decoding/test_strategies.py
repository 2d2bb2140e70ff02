"""Decoding strategies, compared with their definitions by enumerating all chunks.

The policy `small` encodes one action with four entries and five bins, so there are 625 chunks. `Table` computes the
logits after every prefix. The expected distributions, nuclei, beams and penalties are computed from this table.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria, StoppingCriteriaList

from tests import random_models
from vla.config import DecodingConfig, ModelConfig
from vla.decoding.engine import Engine
from vla.decoding.prefix import Prefix
from vla.decoding.strategies import generate, teacher_forced
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.policy import Policy
from vla.policy.session import Draft, Session, predict
from vla.transforms.chunks import ensemble_chunks

BINS, ENTRIES = 5, 4


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Table:
    """table(prefix) -> logits [BINS] of the next token; a prefix is a tuple of tokens."""

    def __init__(self, network, batch):
        self.chunks = list(itertools.product(range(BINS), repeat=ENTRIES))
        ids = torch.tensor(self.chunks) + network.config.action_token_begin
        repeated = {name: tensor.expand(len(ids), *tensor.shape[1:]) for name, tensor in batch.items()}
        logits = teacher_forced(network, repeated, ids).logits.double().numpy()
        self.logits = {
            chunk[:length]: logits[row, length] for row, chunk in enumerate(self.chunks) for length in range(ENTRIES)
        }

    def __call__(self, beginning):
        return self.logits[tuple(beginning)]

    def log_likelihood(self, chunk):
        return sum(np.log(softmax(self(chunk[:t]))[token]) for t, token in enumerate(chunk))


@pytest.fixture(scope="module")
def small(facts, observations, tmp_path_factory):
    """Network, processor, one batch, and its table. The network is tiny, because thousands of chunks are sampled, and
    the strategies do not depend on the network."""
    folder = tmp_path_factory.mktemp("tiny")
    random_models.save_llama(folder / "llama")
    random_models.save_siglip(folder / "siglip")
    torch.manual_seed(2)
    values = {"backbone": str(folder / "llama"), "vision": (str(folder / "siglip"),)}
    network, processor = build_policy(ModelConfig(**values, horizon=1, n_action_steps=1, bins=BINS), facts)
    with torch.no_grad():  # so that distributions are neither uniform nor certain
        for parameter in network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    network.eval()
    batch = processor.observe(observations(1, seed=5), ["reach the red cube"])
    return network, processor, batch, Table(network, batch)


def rows(network, decoded):
    return (decoded.ids - network.config.action_token_begin).tolist()


def frequencies(network, batch, config, draws=2000):
    """Relative frequency, [BINS, BINS], of the first two tokens in chunks sampled for one observation."""
    repeated = {name: tensor.expand(draws // 2, *tensor.shape[1:]) for name, tensor in batch.items()}
    counts = np.zeros((BINS, BINS))
    for seed in range(2):
        for chunk in rows(network, generate(network, repeated, config, seed)):
            counts[chunk[0], chunk[1]] += 1
    return counts / counts.sum()


def expected(table, choose):
    """Joint distribution of the first two tokens, each drawn from `choose(logits)`."""
    first = choose(table(()))
    return np.stack([first[k] * choose(table((k,))) for k in range(BINS)])


def cut(probabilities, allowed):
    kept = np.where(allowed, probabilities, 0)
    return kept / kept.sum()


def nucleus(probabilities, top_p):
    """The most likely tokens, added one by one until their probability reaches top_p."""
    allowed, total = np.zeros(BINS, bool), 0.0
    for token in np.argsort(-probabilities):
        if total >= top_p:
            break
        allowed[token], total = True, total + probabilities[token]
    return allowed


def most_likely(probabilities, k):
    return probabilities >= np.sort(probabilities)[-k]


@pytest.mark.parametrize(
    ("config", "choose"),
    [
        (DecodingConfig(temperature=1.0), softmax),
        (DecodingConfig(temperature=0.5), lambda z: softmax(z / 0.5)),
        (DecodingConfig(temperature=2.0), lambda z: softmax(z / 2)),
        (DecodingConfig(temperature=1.0, top_k=2), lambda z: cut(softmax(z), most_likely(softmax(z), 2))),
        (DecodingConfig(temperature=1.0, top_p=0.6), lambda z: cut(softmax(z), nucleus(softmax(z), 0.6))),
        (
            DecodingConfig(temperature=1.5, top_k=3, top_p=0.8),
            lambda z: cut(
                p := cut(softmax(z / 1.5), most_likely(softmax(z), 3)),
                nucleus(p, 0.8),
            ),
        ),
    ],
    ids=["T=1", "T=0.5", "T=2", "top-k", "top-p", "all three"],
)
def test_samples_follow_the_distribution(small, config, choose):
    network, _, batch, table = small
    share, target = frequencies(network, batch, config), expected(table, choose)
    assert (target > 0.02).sum() > 2  # several pairs are possible
    assert (share[target < 1e-12] == 0).all()  # never outside the truncated distribution
    assert np.abs(share - target).sum() / 2 < 0.06  # 25 cells, 2000 draws: a typical distance is 0.03


def test_temperature_0_and_the_engine_are_greedy(small):
    network, _, batch, table = small
    chunk = []
    while len(chunk) < ENTRIES:
        chunk.append(int(table(chunk).argmax()))
    assert rows(network, generate(network, batch)) == [chunk]
    assert rows(network, generate(network, batch, DecodingConfig(temperature=1.0, top_k=1))) == [chunk]


@pytest.mark.parametrize("beams", [2, 3, 4])
def test_beams_equal_an_explicit_beam_search(small, beams):
    network, _, batch, table = small
    alive = [((), 0.0)]
    for _ in range(ENTRIES):
        grown = [((*chunk, k), score + np.log(softmax(table(chunk))[k])) for chunk, score in alive for k in range(BINS)]
        alive = sorted(grown, key=lambda item: -item[1])[:beams]
    decoded = generate(network, batch, DecodingConfig(num_beams=beams))
    assert rows(network, decoded) == [list(alive[0][0])]
    assert float(decoded.log_probs(network.config.action_token_begin).sum()) == pytest.approx(alive[0][1], abs=1e-4)


def test_enough_beams_find_the_most_likely_chunk(small):
    network, _, batch, table = small
    best = max(table.chunks, key=table.log_likelihood)
    assert rows(network, generate(network, batch, DecodingConfig(num_beams=125))) == [list(best)]


@pytest.mark.parametrize(
    ("config", "penalise"),
    [
        (DecodingConfig(repetition_penalty=3.0), lambda z, n: np.where(n > 0, np.where(z > 0, z / 3, z * 3), z)),
        (DecodingConfig(frequency_penalty=1.5), lambda z, n: z - 1.5 * n),
        (DecodingConfig(presence_penalty=4.0), lambda z, n: z - 4.0 * (n > 0)),
        (DecodingConfig(frequency_penalty=0.5, presence_penalty=2.0), lambda z, n: z - 0.5 * n - 2.0 * (n > 0)),
    ],
    ids=["repetition", "frequency", "presence", "both"],
)
def test_penalties(small, config, penalise):
    network, _, batch, table = small
    chunk, plain = [], rows(network, generate(network, batch))[0]
    while len(chunk) < ENTRIES:
        chunk.append(int(penalise(table(chunk), np.bincount(chunk, minlength=BINS).astype(float)).argmax()))
    assert rows(network, generate(network, batch, config)) == [chunk]
    assert chunk != plain or len(set(plain)) == ENTRIES


def test_seeds_are_reproducible_and_keep_the_callers_random_state(small, observations):
    network, processor, _, _ = small
    observation, words = observations(8, seed=1), ["reach"] * 8

    def chunks(seed):
        policy = Policy(network, processor, decoding=DecodingConfig(temperature=1.0, sampling_seed=seed))
        return np.stack([policy.predict(observation, words).chunks for _ in range(2)])

    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = chunks(0)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, chunks(0))
    assert (first != chunks(100)).any() and (first[0] != first[1]).any()
    # `for_key` shares the random state: the two policies together draw what one policy draws in two calls.
    policy = Policy(network, processor, decoding=DecodingConfig(temperature=1.0))
    drawn = [one.predict(observation, words).chunks for one in (policy, policy.for_key("demo"))]
    np.testing.assert_array_equal(np.stack(drawn), first)


def test_sampling_seeds_only_its_device(small, observations, monkeypatch):
    """`torch.manual_seed` would seed all devices, and their generators could not be restored."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: 1 / 0)
    network, processor, _, _ = small
    Policy(network, processor, decoding=DecodingConfig(temperature=1.0)).predict(observations(1), ["reach"])


def test_log_probs_and_entropy(small, observations):
    network, processor, _, table = small
    policy = Policy(network, processor)
    observation, words = observations(1, seed=5), ["reach the red cube"]
    prediction = policy.predict(observation, words)
    chunk = tuple((prediction.ids[0] - network.config.action_token_begin).tolist())
    assert prediction.log_likelihood[0] == pytest.approx(table.log_likelihood(chunk), abs=1e-4)
    for t in range(ENTRIES):
        p = softmax(table(chunk[:t]))
        assert prediction.log_probs[0, t] == pytest.approx(np.log(p[chunk[t]]), abs=1e-4)
        assert prediction.entropy[0, t] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
    scored = policy.score(observation, words, prediction.chunks)
    np.testing.assert_array_equal(scored.ids, prediction.ids)
    np.testing.assert_allclose(scored.log_probs, prediction.log_probs, atol=1e-4)
    other = processor.decode_actions(np.array([[(k + 1) % BINS for k in chunk]]) + network.config.action_token_begin)
    assert policy.score(observation, words, other).log_likelihood[0] == pytest.approx(
        table.log_likelihood(tuple((k + 1) % BINS for k in chunk)), abs=1e-4
    )


def test_expected_value_is_the_mean_of_the_bin_centres(small, observations):
    network, processor, _, table = small
    observation, words = observations(1, seed=5), ["reach the red cube"]
    greedy = Policy(network, processor).predict(observation, words)
    chunk = tuple((greedy.ids[0] - network.config.action_token_begin).tolist())
    mean = Policy(network, processor, decoding=DecodingConfig(readout="mean")).predict(observation, words)
    np.testing.assert_array_equal(mean.ids, greedy.ids)
    centres = np.array([-0.8, -0.4, 0.0, 0.4, 0.8])
    normalized = np.zeros(7)
    normalized[processor.action_tokenizer.active] = [softmax(table(chunk[:t])) @ centres for t in range(ENTRIES)]
    target = network.config.action_normalizer().unnormalize(normalized)
    np.testing.assert_allclose(mean.chunks[0, 0], target, atol=1e-4)
    assert (np.abs(mean.chunks - greedy.chunks) > 1e-3).any()


def test_ensembles_average_predictions_for_the_same_step():
    """Chunks of five actions, of which between one and all are executed, compared with the definition at each step."""
    rng, coefficient, draft, now = np.random.default_rng(0), 0.3, Draft(np.zeros((5, 3))), 0
    said: dict[int, list[np.ndarray]] = {}  # step -> distributions, oldest first
    for executed in (2, 1, 3, 2, 5, 1):
        new = rng.dirichlet(np.ones(7), size=(5, 3))
        for h in range(5):
            said.setdefault(now + h, []).append(new[h])
        draft = dataclasses.replace(draft, past=(*draft.past, new))
        averaged = ensemble_chunks(draft.past, coefficient)
        for h in range(5):
            weights = [np.exp(-coefficient * i) for i in range(len(said[now + h]))]
            target = sum(w * p for w, p in zip(weights, said[now + h], strict=True)) / sum(weights)
            np.testing.assert_allclose(averaged[h], target)
        draft = draft.after(executed)
        now += executed
    assert max(map(len, said.values())) >= 3


@pytest.mark.parametrize("value", ["mode", "mean"])
def test_ensembling_in_a_policy(nano, observations, value):
    """Where the chunks overlap, the second is decoded from the average of both distributions."""
    network, processor = nano
    policy = Policy(network, processor, decoding=DecodingConfig(ensemble=0.0, readout=value))
    first, second = observations(2)
    plain = [Policy(network, processor).score([o], ["reach"], Policy(network, processor).predict([o], ["reach"]).chunks)
             for o in (first, second)]  # fmt: skip
    session = Session("reach")
    predict(policy, [session], [first])
    session.advance(1)
    together = predict(policy, [session], [second])
    np.testing.assert_array_equal(together.ids, plain[1].ids)

    def distribution(prediction, observation):
        batch = processor.observe([observation], ["reach"])
        told = teacher_forced(network, batch, torch.from_numpy(prediction.ids))
        return told.distribution.exp().numpy()[0].reshape(4, 4, -1)

    old, new = (distribution(p, o) for p, o in zip(plain, (first, second), strict=True))
    average = np.concatenate([(old[1:] + new[:3]) / 2, new[3:]]).reshape(1, 16, -1)
    if value == "mean":
        target = processor.expected_actions(average)
    else:
        target = processor.decode_actions(average.argmax(-1) + network.config.action_token_begin)
    np.testing.assert_allclose(together.chunks, target, atol=1e-4)


@pytest.mark.parametrize("decoding", [DecodingConfig(), DecodingConfig(temperature=1.0)], ids=["engine", "generate"])
def test_actions_are_streamed_before_the_chunk_is_decoded(nano, observations, decoding):
    network, processor = nano
    seen = []
    policy = Policy(network, processor, decoding=decoding)

    class Stop(Exception):
        pass

    def take(index, action):
        seen.append((index, action))

    chunk = policy.predict(observations(1), ["reach"], on_action=take).chunks[0]
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    np.testing.assert_array_equal([action for _, action in seen], chunk)

    def refuse(index, action):
        raise Stop

    passes, forward = [], Engine._forward
    hook = network.language_model.model.register_forward_hook(lambda *_: passes.append(1))
    Engine._forward = lambda *arguments: (passes.append(1), forward(*arguments))[1]
    try:
        whole = policy.predict(observations(1), ["reach"]).forwards
        assert len(passes) == whole > 4
        passes.clear()
        with pytest.raises(Stop):
            policy.predict(observations(1), ["reach"], on_action=refuse)
    finally:
        hook.remove()
        Engine._forward = forward
    assert 1 <= len(passes) <= 4  # at most the four tokens of the first action
    again = Policy(network, processor, decoding=decoding).predict(observations(1), ["reach"]).chunks[0]
    np.testing.assert_array_equal(again, chunk)


@pytest.mark.parametrize("decoding", [DecodingConfig(), DecodingConfig(temperature=1.0)], ids=["engine", "generate"])
def test_stopping_ends_with_the_last_complete_action(nano, observations, decoding):
    network, processor = nano
    prompt = processor.observe(observations(1), ["reach"])["input_ids"].shape[1]
    whole = Policy(network, processor, decoding=decoding).predict(observations(1), ["reach"])
    criteria = StoppingCriteriaList([MaxLengthCriteria(prompt + 10)])  # ten tokens: two and a half actions
    part = Policy(network, processor, decoding=decoding).predict(observations(1), ["reach"], stopping=criteria)
    assert part.chunks.shape == (1, 2, 7)
    np.testing.assert_array_equal(part.chunks, whole.chunks[:, :2])


def test_max_actions_decodes_only_the_first_actions(nano, observations):
    network, processor = nano
    whole = Policy(network, processor).predict(observations(3), ["reach"] * 3)
    for config in (DecodingConfig(max_actions=2), DecodingConfig(max_actions=2, num_beams=1, readout="mode")):
        part = Policy(network, processor, n_action_steps=2, decoding=config).predict(observations(3), ["reach"] * 3)
        np.testing.assert_array_equal(part.chunks, whole.chunks[:, :2])
    policy = Policy(network, processor, n_action_steps=2, decoding=DecodingConfig(max_actions=2))
    session, whole = Session("reach"), Policy(network, processor)
    for observation in observations(3):  # each with the draft from the previous chunk
        (found,) = predict(policy, [session], [observation]).ids
        np.testing.assert_array_equal(found, whole.predict([observation], ["reach"]).ids[0, : len(found)])
        session.advance(1)
    with pytest.raises(ConfigError, match="4 actions are executed, but max_actions is 2"):
        Policy(network, processor, n_action_steps=4, decoding=DecodingConfig(max_actions=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_k": 5}, "set temperature"),
        ({"temperature": 1.0, "num_beams": 2}, "not both"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"max_actions": 0}, "max_actions must be at least 1"),
    ],
)
def test_invalid_values_are_rejected_by_name(nano, values, message):
    with pytest.raises(ConfigError, match=message):
        Policy(*nano, decoding=DecodingConfig(**values))


def test_streaming_that_is_not_possible_is_rejected(nano, observations):
    for config in (DecodingConfig(num_beams=2), DecodingConfig(readout="mean"), DecodingConfig(ensemble=0.1)):
        policy = Policy(*nano, decoding=config)
        assert not policy.streams
        with pytest.raises(ConfigError, match="streaming actions needs a batch of one observation"):
            policy.predict(observations(1), ["reach"], on_action=print)
    assert Policy(*nano, device="cpu").streams


def test_predicting_changes_neither_its_drafts_nor_the_policy(nano, observations):
    """The same call twice gives the same prediction. A prefix is not repeated in the next draft."""
    network, processor = nano
    policy = Policy(network, processor, decoding=DecodingConfig(ensemble=0.1))
    first = policy.predict(observations(1), ["reach"])
    draft = first.next_draft[0].after(1)
    draft = draft.given(first.chunks[0][1:3])
    steps, past = draft.steps.copy(), [chunk.copy() for chunk in draft.past]
    again = [policy.predict(observations(1, seed=3), ["reach"], [draft]) for _ in range(2)]
    for name in ("chunks", "ids", "log_probs", "entropy"):
        np.testing.assert_array_equal(*(getattr(prediction, name) for prediction in again))
    np.testing.assert_array_equal(draft.steps, steps)
    np.testing.assert_array_equal(draft.past, past)
    assert len(again[0].next_draft[0].past) == 2 and again[0].next_draft[0].prefix is None
    assert draft.after(0).prefix is None


def test_a_draft_in_tokens_is_the_draft_in_actions(nano, observations):
    network, processor = nano
    policy = Policy(network, processor)
    prediction = policy.predict(observations(1), ["reach"])
    for executed in range(6):
        tokens, actions = (d.after(executed) for d in (prediction.next_draft[0], Draft(prediction.chunks[0])))
        assert torch.equal(policy.draft_ids([tokens]), policy.draft_ids([actions]))


@pytest.mark.parametrize(
    "decoding",
    [DecodingConfig(), DecodingConfig(temperature=1.0), DecodingConfig(num_beams=3)],
    ids=["engine", "sampling", "beams"],
)
def test_a_chunk_continues_the_action_prefix(nano, observations, decoding):
    """Action prefixes of two, one and no actions are kept, and the following tokens depend on them."""
    network, processor = nano
    policy, begin = Policy(network, processor, decoding=decoding), network.config.action_token_begin
    drafts = processor.decode_actions(np.random.default_rng(0).integers(0, 31, (3, 16)) + begin)
    conditioned = [Draft(draft).given(draft[:count]) for draft, count in zip(drafts, (2, 1, 0), strict=True)]
    batch = processor.observe(observations(3), ["reach"] * 3)
    ids = policy.predict(observations(3), ["reach"] * 3, conditioned).ids
    given = processor.encode_actions(drafts)
    for row, count in enumerate((8, 4, 0)):
        np.testing.assert_array_equal(ids[row, :count], given[row, :count])
    if decoding.greedy:
        best = teacher_forced(network, batch, torch.from_numpy(ids)).logits.argmax(-1).numpy() + begin
        for row, count in enumerate((8, 4, 0)):
            np.testing.assert_array_equal(ids[row, count:], best[row, count:])
        told = generate(
            network, batch, prefix=(torch.from_numpy(given), Prefix(torch.tensor([8, 4, 0]), torch.zeros(3)))
        )
        np.testing.assert_array_equal(told.ids.numpy(), ids)


@pytest.mark.parametrize("trust", [0.0, 0.3, 0.7, 1.0])
def test_an_action_prefix_ends_at_the_first_implausible_token(nano, observations, trust):
    """Compared token by token: from the first implausible token on, the chunk is decoded greedily."""
    network, processor = nano
    policy, begin = Policy(network, processor), network.config.action_token_begin
    batch = processor.observe(observations(4), ["reach"] * 4)
    # Mixtures of greedy and random tokens, so that some prefixes are accepted in part.
    greedy, rng = policy.decode(batch).ids.numpy(), np.random.default_rng(1)
    drafts = np.where(rng.random(greedy.shape) < 0.7, greedy, rng.integers(0, 31, greedy.shape) + begin)
    counts = torch.tensor([12, 8, 16, 0])
    wanted, refused = drafts.copy(), np.array([False, False, False, False])
    for place in range(16):
        logits = teacher_forced(network, batch, torch.from_numpy(wanted)).logits[:, place].numpy()
        own = logits[np.arange(4), wanted[:, place] - begin]
        refused |= (place >= counts.numpy()) | (own < logits.max(-1) + np.log(max(trust, 1e-30)))
        wanted[:, place] = np.where(refused, logits.argmax(-1) + begin, wanted[:, place])
    committed = Prefix(counts, torch.full((4,), trust))
    found = policy._decoder.engine.parallel(batch, torch.from_numpy(drafts), None, committed)
    np.testing.assert_array_equal(found.ids.numpy(), wanted)
    told = generate(network, batch, prefix=(torch.from_numpy(drafts), committed))
    np.testing.assert_array_equal(told.ids.numpy(), wanted)
    if trust == 1.0:
        np.testing.assert_array_equal(wanted, greedy)


@given(seed=st.integers(0, 10_000), window=st.integers(1, 8))
@settings(max_examples=40)
def test_the_prefix_of_one_row_does_not_change_other_rows(tiny, observations, seed, window):
    """The actions for one client must not depend on other clients in the same batch."""
    network, processor = tiny
    policy, rng = Policy(network, processor), np.random.default_rng(seed)
    policy._decoder.engine.window = window
    batch = processor.observe(observations(3), ["reach"] * 3)
    begin, greedy = network.config.action_token_begin, policy.decode(batch).ids
    guessed = torch.from_numpy(rng.integers(0, 31, greedy.shape) + begin)
    drafts = torch.where(torch.from_numpy(rng.random(greedy.shape) < 0.7), greedy, guessed)
    counts, trust = torch.from_numpy(rng.integers(0, 16, 3)), torch.full((3,), 0.9)
    together = policy._decoder.engine.parallel(batch, drafts, None, Prefix(counts, trust)).ids
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        committed = Prefix(counts[row : row + 1], trust[row : row + 1])
        found = policy._decoder.engine.parallel(alone, drafts[row : row + 1], None, committed).ids
        np.testing.assert_array_equal(together[row], found[0])
