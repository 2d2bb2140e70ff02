"""The instruction grammar, which generates instructions for a task and its objects.

Owns templates, noun phrases, polite forms, and their split into train and held-out. Does not know scenes or positions.

A phrase is `politeness(template(noun phrases))`. Held-out phrasings have their own templates and never occur in
training. They use only words from the training phrasings of the same task, so a language model trained from scratch
knows every word.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from envs.objects import COLORS, SHAPES

PHRASINGS = ("train", "heldout", "canonical")


class Thing(NamedTuple):
    """Something an instruction refers to. `kind` is "object", "zone", "button" or "drawer"; only objects have a
    shape."""

    kind: str
    color: str
    shape: str = ""


@dataclass(frozen=True)
class Grammar:
    """The templates of one task; `{a}` is the target, `{b}` its destination. The first template is canonical."""

    kinds: tuple[str, ...]
    train: tuple[str, ...]
    heldout: tuple[str, ...]


NOUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "object": {
        "train": ("the {color} {shape}", "the {shape} that is {color}", "the {color} one", "the {color} object"),
        "heldout": ("the one that is {color}", "the object that is {color}"),
    },
    "zone": {
        "train": ("the {color} zone", "the zone that is {color}", "the {color} area"),
        "heldout": ("the area that is {color}",),
    },
    "button": {
        "train": ("the {color} button", "the button that is {color}", "the {color} one"),
        "heldout": ("the one that is {color}",),
    },
    "drawer": {
        "train": (
            "the drawer with the {color} handle",
            "the {color} drawer",
            "the drawer that has {a_color} handle",
            "the one with the {color} handle",
        ),
        "heldout": ("the drawer with {a_color} handle", "the one that has {a_color} handle"),
    },
}
POLITENESS = {
    "train": ("{}", "please {}", "can you {}", "{} please", "robot {}", "{} now"),
    "heldout": ("now {}", "robot please {}", "can you please {}", "please {} now"),
}
GRAMMARS: dict[str, Grammar] = {
    "reach": Grammar(
        ("object",),
        ("reach {a}", "move to {a}", "go to {a}", "touch {a}", "move the hand to {a}", "reach for {a}",
         "go over and touch {a}"),
        ("move over to {a}", "go for {a}", "go and touch {a}", "reach over and touch {a}", "touch {a} and move"),
    ),
    "point": Grammar(
        ("object",),
        ("point at {a}", "point to {a}", "where is {a}", "find {a}", "show me {a}", "locate {a}"),
        ("point me to {a}", "show me where {a} is", "find where {a} is"),
    ),
    "push": Grammar(
        ("object", "zone"),
        ("push {a} into {b}", "slide {a} into {b}", "push {a} to {b}", "shove {a} onto {b}", "slide {a} over to {b}",
         "use the hand to push {a} into {b}"),
        ("shove {a} into {b}", "slide {a} onto {b}", "push {a} over to {b}", "use the hand to slide {a} to {b}"),
    ),
    "pick_up": Grammar(
        ("object",),
        ("pick up {a}", "pick {a} up", "lift {a}", "grab {a}", "take {a} and lift it", "raise {a}",
         "lift {a} off the table", "grab {a} and raise it"),
        ("lift {a} up", "grab {a} and lift it up", "take {a} off the table", "raise {a} off the table",
         "take {a} and raise it"),
    ),
    "pick_place": Grammar(
        ("object", "zone"),
        ("put {a} on {b}", "place {a} on {b}", "pick up {a} and place it on {b}", "move {a} onto {b}",
         "take {a} and put it on {b}", "set {a} down on {b}", "bring {a} to {b}"),
        ("pick up {a} and put it on {b}", "place {a} onto {b}", "take {a} to {b}", "bring {a} and set it down on {b}",
         "put {a} down on {b}"),
    ),
    "stack": Grammar(
        ("object", "object"),
        ("stack {a} on {b}", "put {a} on top of {b}", "place {a} on {b}", "stack {a} on top of {b}",
         "pick up {a} and put it on {b}", "set {a} on top of {b}"),
        ("place {a} on top of {b}", "set {a} on {b}", "pick up {a} and stack it on {b}", "put {a} on {b}",
         "pick up {a} and set it on top of {b}"),
    ),
    "press_button": Grammar(
        ("button",),
        ("press {a}", "push {a}", "push {a} down", "hit {a}", "press down on {a}", "move to {a} and press it"),
        ("press {a} down", "push down on {a}", "move to {a} and push it down", "move to {a} and hit it"),
    ),
    "open_drawer": Grammar(
        ("drawer",),
        ("open {a}", "pull {a} open", "pull out {a}", "slide {a} open", "pull {a} out", "pull on {a} and open it"),
        ("slide {a} out", "slide out {a}", "pull {a} and slide it open", "pull on {a} and slide it out"),
    ),
    "close_drawer": Grammar(
        ("drawer",),
        ("close {a}", "shut {a}", "push {a} shut", "push {a} closed", "slide {a} closed", "push {a} in",
         "push in {a}"),
        ("slide {a} shut", "slide {a} in", "slide in {a}"),
    ),
}  # fmt: skip


def phrases(task: str, things: tuple[Thing, ...], phrasing: str = "train") -> list[str]:
    """All phrases for `task` with `things` ((a,) or (a, b)), without duplicates, in a fixed order."""
    grammar = GRAMMARS[task]
    if phrasing == "canonical":
        return [grammar.train[0].format(**_named([_nouns(thing, "train")[0] for thing in things]))]
    nouns = [_nouns(thing, "train") for thing in things]
    polite = POLITENESS["train"]
    if phrasing == "heldout":
        nouns = [own + _nouns(thing, "heldout") for own, thing in zip(nouns, things, strict=True)]
        polite = polite + POLITENESS["heldout"]
    templates = grammar.train if phrasing == "train" else grammar.heldout
    combinations = product(templates, product(*nouns), polite)
    return list(dict.fromkeys(p.format(t.format(**_named(names))) for t, names, p in combinations))


def sample(task: str, things: tuple[Thing, ...], phrasing: str, rng: np.random.Generator) -> str:
    """A phrase drawn uniformly from `phrases(...)`."""
    options = phrases(task, things, phrasing)
    return options[int(rng.integers(len(options)))]


def things_of(task: str) -> list[tuple[Thing, ...]]:
    """All combinations of differently coloured things in instructions for `task`."""
    pools = [
        [Thing(kind, color, shape) for color in COLORS for shape in (SHAPES if kind == "object" else ("",))]
        for kind in GRAMMARS[task].kinds
    ]
    return [combo for combo in product(*pools) if len({thing.color for thing in combo}) == len(combo)]


def corpus(phrasing: str = "train", tasks: tuple[str, ...] | None = None, limit: int = 1500) -> list[str]:
    """Instructions with all colours, shapes, noun phrases, templates and polite forms, for training a tokenizer.

    Contains all phrases of a task, or a fixed random sample of `limit` phrases if a task has more.
    """
    out: list[str] = []
    for task in tasks or tuple(GRAMMARS):
        every = [phrase for things in things_of(task) for phrase in phrases(task, things, phrasing)]
        every = list(dict.fromkeys(every))
        kept = np.sort(np.random.default_rng(0).permutation(len(every))[:limit])
        out += [every[i] for i in kept]
    return list(dict.fromkeys(out))


def _nouns(thing: Thing, split: str) -> tuple[str, ...]:
    a_color = f"{'an' if thing.color[0] in 'aeiou' else 'a'} {thing.color}"
    forms = NOUNS[thing.kind][split]
    return tuple(form.format(color=thing.color, a_color=a_color, shape=thing.shape) for form in forms)


def _named(names: list[str] | tuple[str, ...]) -> dict[str, str]:
    return dict(zip("ab", names, strict=False))
