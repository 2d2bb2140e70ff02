"""Instructions for the Meta-World tasks: a short sentence per task, and paraphrases.

Owns the list of the 50 tasks and their sentences. Does not import Meta-World.

The first training phrase of a task is canonical. The held-out phrase never occurs in training. No two tasks share a
phrase. Most phrases of tasks with the same scene name the difference (open or close, push or pull, from above or from
the front); a few short ones fit several of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Phrases(NamedTuple):
    """The sentences of one task; `train[0]` is canonical."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


PHRASES: dict[str, Phrases] = {
    "assembly-v3": Phrases(
        ("put the nut on the peg", "assemble the nut onto the peg", "pick up the nut and place it onto the peg",
         "place the nut over the peg"),
        ("pick up the nut and put it on the peg",),
    ),
    "basketball-v3": Phrases(
        ("put the ball in the basket", "dunk the ball into the basket", "drop the ball through the hoop",
         "pick up the ball and place it in the basket"),
        ("pick up the ball and drop it into the basket",),
    ),
    "bin-picking-v3": Phrases(
        ("move the object to the other bin", "pick the object from one bin and place it in the other",
         "put the object in the other bin", "take the object out of its bin and drop it into the other one"),
        ("pick up the object and put it in the other bin",),
    ),
    "box-close-v3": Phrases(
        ("close the box", "put the lid on the box", "pick up the lid and cover the box", "cover the box with its lid"),
        ("pick up the lid and put it on the box",),
    ),
    "button-press-topdown-v3": Phrases(
        ("press the button from the top", "push the button down from above", "press the button from above",
         "push the top button down"),
        ("push the button down from the top",),
    ),
    "button-press-topdown-wall-v3": Phrases(
        ("press the button behind the wall from the top", "reach over the wall and press the button from above",
         "push the button down from above, past the wall", "go over the wall and push the button down"),
        ("reach over the wall and push the button down from the top",),
    ),
    "button-press-v3": Phrases(
        ("press the button from the front", "push the button in", "press the button on the box",
         "push the front button"),
        ("push the button in from the front",),
    ),
    "button-press-wall-v3": Phrases(
        ("press the button behind the wall", "go around the wall and push the button in",
         "reach past the wall and press the button from the front", "push in the button behind the wall"),
        ("go around the wall and press the button from the front",),
    ),
    "coffee-button-v3": Phrases(
        ("press the button of the coffee machine", "start the coffee machine", "push the coffee button",
         "press the button on the coffee maker"),
        ("push the button of the coffee machine",),
    ),
    "coffee-pull-v3": Phrases(
        ("pull the mug away from the coffee machine", "take the mug from the coffee machine",
         "pull the cup out from under the coffee maker", "move the mug away from the coffee machine"),
        ("take the cup away from the coffee maker",),
    ),
    "coffee-push-v3": Phrases(
        ("push the mug under the coffee machine", "put the mug under the coffee machine",
         "push the cup to the coffee maker", "slide the mug under the coffee machine"),
        ("slide the cup under the coffee maker",),
    ),
    "dial-turn-v3": Phrases(
        ("turn the dial", "rotate the dial", "turn the knob around", "rotate the dial by half a turn"),
        ("rotate the knob",),
    ),
    "disassemble-v3": Phrases(
        ("take the nut off the peg", "disassemble the nut from the peg", "remove the nut from the peg",
         "pick up the nut and lift it off the peg"),
        ("lift the nut off the peg",),
    ),
    "door-close-v3": Phrases(
        ("close the door", "push the door shut", "shut the door", "push the door closed"),
        ("shut the open door",),
    ),
    "door-lock-v3": Phrases(
        ("lock the door", "turn the lock of the door down", "rotate the lock until the door is locked",
         "turn the lock to lock the door"),
        ("rotate the lock down to lock the door",),
    ),
    "door-open-v3": Phrases(
        ("open the door", "pull the door open", "grab the handle and open the door", "swing the door open"),
        ("pull the handle and swing the door open",),
    ),
    "door-unlock-v3": Phrases(
        ("unlock the door", "turn the lock of the door to the side", "rotate the lock until the door is unlocked",
         "turn the lock to unlock the door"),
        ("rotate the lock to the side to unlock the door",),
    ),
    "hand-insert-v3": Phrases(
        ("put the object into the hole", "insert the hand into the hole",
         "pick up the object and lower it into the hole", "place the object in the hole in the table"),
        ("lower the object into the hole in the table",),
    ),
    "drawer-close-v3": Phrases(
        ("close the drawer", "push the drawer shut", "shut the drawer", "push the drawer in"),
        ("push the drawer closed",),
    ),
    "drawer-open-v3": Phrases(
        ("open the drawer", "pull the drawer open", "pull out the drawer", "slide the drawer open"),
        ("pull the drawer out",),
    ),
    "faucet-open-v3": Phrases(
        ("turn on the faucet", "open the faucet", "turn the faucet on", "rotate the handle to open the faucet"),
        ("rotate the handle to turn on the faucet",),
    ),
    "faucet-close-v3": Phrases(
        ("turn off the faucet", "close the faucet", "turn the faucet off", "rotate the handle to close the faucet"),
        ("rotate the handle to turn off the faucet",),
    ),
    "hammer-v3": Phrases(
        ("hammer the screw into the wall", "hit the screw with the hammer", "pick up the hammer and hit the screw",
         "use the hammer to drive the screw in"),
        ("pick up the hammer and drive the screw into the wall",),
    ),
    "handle-press-side-v3": Phrases(
        ("press the handle down from the side", "push the handle at the side down", "press down the side handle",
         "press the handle that points sideways down"),
        ("push the handle down from the side",),
    ),
    "handle-press-v3": Phrases(
        ("press the handle down", "push the handle down", "press down on the handle", "push down the handle in front"),
        ("push down on the handle",),
    ),
    "handle-pull-side-v3": Phrases(
        ("pull the handle up from the side", "lift the handle at the side", "pull up the side handle",
         "lift the handle that points sideways"),
        ("lift the handle up from the side",),
    ),
    "handle-pull-v3": Phrases(
        ("pull the handle up", "lift the handle", "pull up on the handle", "lift up the handle in front"),
        ("lift up the handle",),
    ),
    "lever-pull-v3": Phrases(
        ("pull the lever up", "lift the lever", "raise the lever", "move the lever up"),
        ("lift the lever up",),
    ),
    "pick-place-wall-v3": Phrases(
        ("pick up the puck and place it behind the wall", "lift the puck over the wall to the goal",
         "carry the puck over the wall and place it at the goal", "bring the puck to the goal over the wall"),
        ("pick up the puck and carry it over the wall to the goal",),
    ),
    "pick-out-of-hole-v3": Phrases(
        ("pick the puck out of the hole", "take the puck out of the hole", "lift the puck from the hole to the goal",
         "grab the puck in the hole and lift it out"),
        ("lift the puck out of the hole",),
    ),
    "pick-place-v3": Phrases(
        ("pick up the puck and place it at the goal", "lift the puck to the goal", "carry the puck to the goal",
         "grab the puck and bring it to the goal"),
        ("grab the puck and carry it to the goal",),
    ),
    "plate-slide-v3": Phrases(
        ("slide the plate into the goal", "push the plate forward into the goal", "slide the puck into the net",
         "push the plate into the net"),
        ("slide the plate forward into the net",),
    ),
    "plate-slide-side-v3": Phrases(
        ("slide the plate sideways into the goal", "push the plate to the side into the goal",
         "slide the puck sideways into the net", "push the plate sideways into the net"),
        ("slide the plate to the side into the net",),
    ),
    "plate-slide-back-v3": Phrases(
        ("slide the plate back out of the goal", "pull the plate back from the goal",
         "slide the puck back out of the net", "pull the plate out of the net"),
        ("pull the plate back out of the net",),
    ),
    "plate-slide-back-side-v3": Phrases(
        ("slide the plate sideways out of the goal", "pull the plate to the side, out of the goal",
         "slide the puck sideways out of the net", "pull the plate sideways out of the net"),
        ("slide the plate to the side, out of the net",),
    ),
    "peg-insert-side-v3": Phrases(
        ("insert the peg into the hole from the side", "put the peg sideways into the hole",
         "pick up the peg and insert it into the box", "push the peg into the hole in the side"),
        ("pick up the peg and put it into the hole in the side",),
    ),
    "peg-unplug-side-v3": Phrases(
        ("unplug the peg", "pull the peg out of the side", "pull the plug out sideways", "grab the peg and unplug it"),
        ("grab the peg and pull it out sideways",),
    ),
    "soccer-v3": Phrases(
        ("kick the ball into the goal", "push the ball into the goal", "score a goal with the ball",
         "move the ball into the soccer goal"),
        ("kick the ball into the soccer goal",),
    ),
    "stick-push-v3": Phrases(
        ("push the bottle with the stick", "use the stick to push the bottle", "pick up the stick and push the bottle",
         "grab the stick and push the bottle forward"),
        ("use the stick to push the bottle forward",),
    ),
    "stick-pull-v3": Phrases(
        ("pull the bottle with the stick", "use the stick to pull the bottle", "pick up the stick and pull the bottle",
         "grab the stick and pull the bottle back"),
        ("use the stick to pull the bottle back",),
    ),
    "push-v3": Phrases(
        ("push the puck to the goal", "slide the puck to the goal", "move the puck along the table to the goal",
         "shove the puck to the goal"),
        ("slide the puck along the table to the goal",),
    ),
    "push-wall-v3": Phrases(
        ("push the puck around the wall to the goal", "slide the puck around the wall",
         "move the puck along the table past the wall", "shove the puck around the wall to the goal"),
        ("slide the puck past the wall to the goal",),
    ),
    "push-back-v3": Phrases(
        ("pull the puck back to the goal", "push the puck backwards to the goal", "slide the puck back to the goal",
         "drag the puck back to the goal"),
        ("drag the puck backwards to the goal",),
    ),
    "reach-v3": Phrases(
        ("reach the goal", "move the hand to the goal", "go to the goal", "reach for the goal position"),
        ("move the hand to the goal position",),
    ),
    "reach-wall-v3": Phrases(
        ("reach the goal behind the wall", "move the hand over the wall to the goal", "go past the wall to the goal",
         "reach over the wall for the goal"),
        ("move the hand past the wall to the goal",),
    ),
    "shelf-place-v3": Phrases(
        ("put the block on the shelf", "place the block on the shelf", "pick up the block and place it on the shelf",
         "lift the block onto the shelf"),
        ("pick up the block and put it on the shelf",),
    ),
    "sweep-into-v3": Phrases(
        ("sweep the block into the hole", "push the block into the hole",
         "sweep the block across the table into the hole", "slide the block into the hole"),
        ("push the block across the table into the hole",),
    ),
    "sweep-v3": Phrases(
        ("sweep the block off the table", "push the block off the table", "sweep the block over the edge of the table",
         "slide the block off the table"),
        ("push the block over the edge of the table",),
    ),
    "window-open-v3": Phrases(
        ("open the window", "slide the window open", "push the window open", "push the handle to open the window"),
        ("push the handle to slide the window open",),
    ),
    "window-close-v3": Phrases(
        ("close the window", "slide the window shut", "push the window shut", "push the handle to close the window"),
        ("push the handle to slide the window shut",),
    ),
}  # fmt: skip
TASKS: tuple[str, ...] = tuple(PHRASES)


def phrases(task: str, phrasing: str) -> tuple[str, ...]:
    """All sentences for `task`; `phrasing` is "train", "heldout" or "canonical"."""
    own = PHRASES[task]
    return {"train": own.train, "heldout": own.heldout, "canonical": own.train[:1]}[phrasing]


def sample(task: str, phrasing: str, rng: np.random.Generator) -> str:
    """A sentence drawn uniformly from `phrases(...)`."""
    options = phrases(task, phrasing)
    return options[int(rng.integers(len(options)))]
