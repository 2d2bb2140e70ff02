"""The grammar: held-out phrasings are new sentences of known words, and held-out pairs are not in training."""

from __future__ import annotations

import gymnasium as gym
import pytest

import envs
from envs.instructions import GRAMMARS, Thing, corpus, phrases, things_of
from envs.objects import ALL_PAIRS, COLORS, HELDOUT_PAIRS, SHAPES, TRAIN_PAIRS


def every(task: str, phrasing: str) -> set[str]:
    return {phrase for things in things_of(task)[:: 1 if len(things_of(task)) < 30 else 11]
            for phrase in phrases(task, things, phrasing)}  # fmt: skip


@pytest.mark.parametrize("task", GRAMMARS)
def test_heldout_phrasings_are_new_but_use_known_words(task: str) -> None:
    train, heldout = every(task, "train"), every(task, "heldout")
    assert len(heldout) >= 12 and not train & heldout
    assert {word for text in heldout for word in text.split()} <= {word for text in train for word in text.split()}


@pytest.mark.parametrize("task", GRAMMARS)
def test_number_of_phrasings(task: str) -> None:
    things = things_of(task)[0]
    train = phrases(task, things, "train")
    assert len(train) >= 72 and len(set(train)) == len(train)
    assert phrases(task, things, "canonical")[0] in train
    assert max(len(text.split()) for text in train) <= 20


def test_tasks_do_not_share_sentences() -> None:
    """Each sentence belongs to one task, except for placing an object on another, which is also stacking."""
    seen: dict[str, str] = {}
    for task in GRAMMARS:
        for text in every(task, "train") | every(task, "heldout"):
            assert seen.setdefault(text, task) == task


def test_corpus_covers_all_words_and_templates() -> None:
    texts = corpus()
    words = {word for text in texts for word in text.split()}
    assert {*COLORS, *SHAPES, "zone", "button", "drawer", "please", "robot"} <= words
    for task in GRAMMARS:
        own = corpus(tasks=(task,))
        assert {word for text in own for word in text.split()} == {
            word for text in every(task, "train") for word in text.split()
        }
    assert texts == corpus() and len(set(texts)) == len(texts) and len(texts) < 20_000
    assert not set(texts) & set(corpus("heldout"))


def test_furniture_is_named_by_colour() -> None:
    assert phrases("open_drawer", (Thing("drawer", "red"),), "canonical") == ["open the drawer with the red handle"]
    assert phrases("stack", (Thing("object", "red", "cube"), Thing("object", "blue", "ball")), "canonical") == [
        "stack the red cube on the blue ball"
    ]


def test_pairs_split() -> None:
    assert set(TRAIN_PAIRS) | set(HELDOUT_PAIRS) == set(ALL_PAIRS) and not set(TRAIN_PAIRS) & set(HELDOUT_PAIRS)
    assert {color for color, _ in TRAIN_PAIRS} == set(COLORS) and {shape for _, shape in TRAIN_PAIRS} == set(SHAPES)


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_heldout_pairs_and_phrasings_stay_out_of_the_train_split(env_id: str) -> None:
    train = gym.make(env_id, cameras=()).unwrapped
    heldout = gym.make(env_id, cameras=(), pairs="heldout", phrasing="heldout").unwrapped
    for seed in range(15):
        train.reset(seed=seed)
        colors = [thing["color"] for key in ("objects", "zones", "buttons") for thing in train.scene.get(key, [])]
        colors += train.scene.get("handles", [])
        assert len(set(colors)) == len(colors)
        assert not {(thing["color"], thing["shape"]) for thing in train.scene["objects"]} & set(HELDOUT_PAIRS)
        assert train.task_description in phrases(train.task, train.named(train.scene, train.target), "train")
        heldout.reset(seed=seed)
        assert {(thing["color"], thing["shape"]) for thing in heldout.scene["objects"]} <= set(HELDOUT_PAIRS)
        named = heldout.named(heldout.scene, heldout.target)
        assert heldout.task_description not in phrases(heldout.task, named, "train")
