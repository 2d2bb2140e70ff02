"""Prediction of the demonstrated actions from the robot's state alone.

Owns: a state-only model and its error on held-out episodes. If all demonstrations start in the same state, the hand's
position at a later frame shows in which direction the demonstrator moves. A policy with the state as input may then
learn to continue this motion instead of locating the target in the images (causal confusion; de Haan et al., 2019,
arXiv:1905.11979). The validation loss does not detect this, because held-out demonstrations start in the same state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vla.data.reader import Demonstrations
from vla.errors import DataError

FEATURES = 512  # random ReLU features of state and instruction
INSTRUCTIONS = 200  # number of frequent instructions that are distinguished; all others count as one
FOLDS = 5  # groups of episodes; each is predicted from the others
RIDGE = 0.1  # regularisation per frame
BLOCK = 4096  # number of frames processed at once


@dataclasses.dataclass(frozen=True)
class StateOnly:
    """Errors of the state-only model on held-out episodes.

    Attributes:
        errors: float64 [N], squared error of each frame's action, summed over standardised dimensions.
        explained: 1 - squared error with state and instruction / squared error with the instruction only. At most 1;
            negative if the state increases the error.
    """

    errors: np.ndarray
    explained: float


def of(demos: Demonstrations) -> StateOnly:
    """The errors of the state-only model of a dataset. DataError if the dataset has no state."""
    if demos.states is None:
        raise DataError(f"hard_frames needs a state, but {demos.root} has no observation.state. Set hard_frames to 0.")
    episodes = np.repeat(np.arange(len(demos.episodes)), [episode.length for episode in demos.episodes])
    return state_only(demos.states, demos.actions, demos.task_index, episodes)


def state_only(states: np.ndarray, actions: np.ndarray, instructions: np.ndarray, episodes: np.ndarray) -> StateOnly:
    """Predict actions from state and instruction by ridge regression on random features.

    Args:
        states: float [N, S].
        actions: float [N, D].
        instructions: int [N], index of each frame's instruction.
        episodes: int [N], index of each frame's episode.
    """
    states, actions = _standardized(states), _standardized(actions)
    counts = np.bincount(instructions)
    # All rare instructions share the last column, to limit the number of columns.
    column = np.full(len(counts), INSTRUCTIONS)
    frequent = np.sort(np.argsort(-counts, kind="stable")[:INSTRUCTIONS])
    column[frequent] = np.arange(len(frequent))
    instructions, one_hot = column[instructions], np.eye(min(len(counts), INSTRUCTIONS + 1))
    width = states.shape[1] + len(one_hot) + 1
    weights = np.random.default_rng(0).standard_normal((width, FEATURES)) * (3 / (states.shape[1] + 2)) ** 0.5
    folds = np.unique(episodes, return_inverse=True)[1] % FOLDS

    def known(rows: slice) -> np.ndarray:  # features without the state
        return np.concatenate([np.ones((len(states[rows]), 1)), one_hot[instructions[rows]]], axis=1)

    def features(rows: slice) -> np.ndarray:
        inputs = np.concatenate([states[rows], known(rows)], axis=1)
        return np.concatenate([np.maximum(inputs @ weights, 0), inputs], axis=1)

    errors, without_state = (_held_out_errors(f, actions, folds) for f in (features, known))
    return StateOnly(errors, float(1 - errors.sum() / max(without_state.sum(), 1e-12)))


def _held_out_errors(features: Callable[[slice], np.ndarray], actions: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Squared error [N] of a ridge regression; each fold is predicted from the others."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(actions), BLOCK)]
    squares: Any = 0.0  # X^T X per fold
    products: Any = 0.0  # X^T y per fold
    for rows in blocks:
        x, in_fold = features(rows), folds[rows] == np.arange(FOLDS)[:, None]
        squares += np.stack([x[mask].T @ x[mask] for mask in in_fold])
        products += np.stack([x[mask].T @ actions[rows][mask] for mask in in_fold])
    others = RIDGE * np.maximum(len(folds) - np.bincount(folds, minlength=FOLDS), 1)[:, None, None]
    ridge = np.sum(squares, 0) - squares + others * np.eye(squares.shape[-1])
    weights = np.linalg.solve(ridge, np.sum(products, 0) - products)
    predicted = np.concatenate([features(rows) @ weights for rows in blocks], axis=1)  # [FOLDS, N, D]
    return ((actions - predicted[folds, np.arange(len(folds))]) ** 2).sum(1)


def _standardized(values: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance per column, in float64; constant columns become 0."""
    values = np.asarray(values, np.float64)
    spread = values.std(0)
    return (values - values.mean(0)) / np.where(spread > 1e-9, spread, np.inf)
