"""Colours and shapes of objects, and the split of colour-shape pairs into train and held-out.

Owns the kinds of objects. Does not know positions, tasks or instructions.
"""

from __future__ import annotations

import numpy as np

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.05, 0.05),
    "green": (0.05, 0.65, 0.10),
    "blue": (0.05, 0.20, 0.95),
    "yellow": (1.00, 0.88, 0.00),
    "purple": (0.55, 0.05, 0.75),
    "orange": (1.00, 0.45, 0.00),
}
SHAPES: tuple[str, ...] = ("cube", "cylinder", "ball")

#: Pairs that never occur in the train split. They have four colours, enough for scenes with four held-out objects.
HELDOUT_PAIRS: tuple[tuple[str, str], ...] = (
    ("red", "cylinder"),
    ("blue", "ball"),
    ("yellow", "cube"),
    ("purple", "cylinder"),
)
ALL_PAIRS: tuple[tuple[str, str], ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
TRAIN_PAIRS: tuple[tuple[str, str], ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELDOUT_PAIRS)
PAIRS = {"train": TRAIN_PAIRS, "heldout": HELDOUT_PAIRS, "all": ALL_PAIRS}


def draw_pairs(rng: np.random.Generator, n: int, split: str, max_balls: int | None = None) -> list[tuple[str, str]]:
    """Draw `n` (colour, shape) pairs of different colours from a split, with at most `max_balls` balls."""
    allowed = PAIRS[split]
    colors = sorted({color for color, _ in allowed})
    while True:
        chosen = rng.choice(colors, size=n, replace=False)
        pairs = []
        for color in chosen:
            options = [pair for pair in allowed if pair[0] == color]
            pairs.append(options[rng.integers(len(options))])
        if max_balls is None or sum(shape == "ball" for _, shape in pairs) <= max_balls:
            return pairs


def draw_colors(rng: np.random.Generator, n: int, exclude: list[str]) -> list[str]:
    """Draw `n` different colour names that are not in `exclude`."""
    free = [color for color in COLORS if color not in exclude]
    return [str(color) for color in rng.choice(free, size=n, replace=False)]
