"""`vla analyze tokenizers`: compare action tokenizers on a dataset.

Owns: the measurement of each tokenizer at each horizon, its table and its figure. Tokenizers are fitted to the dataset
and encode its chunks, normalised as in training. To find out how well a policy learns the tokens, train one with each
tokenizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vla.config import TokenizersConfig, check
from vla.data.reader import Demonstrations
from vla.errors import ConfigError
from vla.support.palette import INK, SOFT, dress
from vla.support.progress import Progress
from vla.support.run_folder import RunFolder
from vla.transforms.normalize import Normalizer, compute_statistics
from vla.transforms.tokenizers.base import TOKENIZERS, ActionTokenizer

FILE, FIGURE = "tokenizers.json", "tokenizers.png"
RANDOM = 1000  # number of random sequences to decode


def tokenizers(config: TokenizersConfig) -> dict[str, Any]:
    """Measure, print, and write `tokenizers.json` and `tokenizers.png`. Returns the contents of the JSON file.

    Raises:
        ConfigError, DataError: the configuration or the dataset is invalid; raised before anything is written.
    """
    check(config)
    names = config.tokenizers or tuple(TOKENIZERS)
    kinds = {name: TOKENIZERS.get(name) for name in names}
    demos = Demonstrations(config.data)
    normalizer = Normalizer.from_statistics(compute_statistics(demos.actions), config.normalization)
    normalized = np.clip(normalizer.normalize(demos.actions), -1, 1)
    active = np.flatnonzero(~normalizer.constant).tolist()
    if not active:
        raise ConfigError(f"all actions in {config.data} are constant; there is nothing to encode.")
    config.out.mkdir(parents=True, exist_ok=True)
    rows, skipped = [], []
    with Progress(len(config.horizons) * len(kinds), "tokenizers") as progress:
        for horizon in config.horizons:
            chunks = normalized[_windows(demos, horizon, config.frames)]
            for name, kind in kinds.items():
                try:
                    tokenizer = kind.fit(normalized, horizon, None, active)
                except ConfigError as error:
                    skipped.append(str(error))
                else:
                    rows.append({"tokenizer": name, "horizon": horizon} | measure(tokenizer, chunks, normalizer))
                progress.advance(f"{name} at {horizon} actions")
    info = {
        "data": str(config.data),
        "frames": min(config.frames, demos.num_frames),
        "actions": demos.robot.action_names,
        "rows": rows,
        "skipped": skipped,
    }
    RunFolder(config.out).write_json(FILE, info)
    _draw(rows).savefig(config.out / FIGURE, dpi=150, facecolor="white")
    _print(info)
    print(f"figure: {config.out / FIGURE}")
    return info


def measure(tokenizer: ActionTokenizer, chunks: np.ndarray, normalizer: Normalizer) -> dict[str, Any]:
    """Properties of a tokenizer on normalised chunks [N, H, D].

    Returns:
        A dict with
        vocabulary: number of ids.
        used: share of the ids that occur.
        tokens, max_tokens: mean and maximum number of tokens per chunk, without padding.
        bits: entropy of the distribution of ids, in bits per token.
        mse: mean squared error of the normalised entries, without constant dimensions.
        rmse, max_error: errors per action dimension, in the robot's units.
        worst: index of the dimension with the largest normalised error.
        undecodable: see `undecodable`.
    """
    ids = tokenizer.encode(chunks)
    real = ids[~tokenizer.ended(ids)[..., :-1]]
    lengths = (~tokenizer.ended(ids)[..., :-1]).sum(-1)
    counts = np.bincount(real, minlength=tokenizer.vocab_size)
    shares = counts[counts > 0] / counts.sum()
    decoded = tokenizer.decode(ids)
    errors = (normalizer.unnormalize(decoded) - normalizer.unnormalize(chunks)).astype(np.float64)
    return {
        "vocabulary": tokenizer.vocab_size,
        "used": float((counts > 0).mean()),
        "tokens": float(lengths.mean()),
        "max_tokens": int(lengths.max()),
        "bits": float(-(shares * np.log2(shares)).sum()),
        "mse": float(np.mean((decoded - chunks)[..., tokenizer.active] ** 2)),
        "rmse": np.sqrt(np.mean(errors**2, axis=(0, 1))).tolist(),
        "max_error": np.abs(errors).max(axis=(0, 1)).tolist(),
        "worst": int(np.abs(decoded - chunks).max(axis=(0, 1)).argmax()),
        "undecodable": undecodable(tokenizer, RANDOM),
    }


def undecodable(tokenizer: ActionTokenizer, count: int, seed: int = 0) -> float:
    """The share of `count` random sequences of allowed ids that do not decode to a chunk."""
    rng, ids = np.random.default_rng(seed), np.zeros((count, 0), np.int64)
    for _ in range(tokenizer.max_tokens):
        allowed = tokenizer.allowed(ids)
        scores = rng.random((count, tokenizer.vocab_size))
        chosen = (scores if allowed is None else np.where(allowed[:, -1], scores, -1)).argmax(-1)
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
    failed = 0
    for row in ids:
        try:
            failed += not np.isfinite(tokenizer.decode(row)).all()
        except ValueError:
            failed += 1
    return failed / count


def _windows(demos: Demonstrations, horizon: int, count: int) -> np.ndarray:
    """Frame indices of `count` evenly spaced chunks, [n, horizon]. At the end of an episode, the last frame repeats."""
    starts = np.linspace(0, demos.num_frames - 1, min(count, demos.num_frames)).round().astype(int)
    lasts = np.concatenate([np.full(e.length, e.start + e.length - 1) for e in demos.episodes])
    return np.minimum(starts[:, None] + np.arange(horizon), lasts[starts][:, None])


def _print(info: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{info['data']}: {info['frames']} chunks", title_justify="left", box=None)
    for column in ("horizon", "tokenizer", "tokens", "at most", "ids used", "bits", "RMSE", "largest error"):
        table.add_column(column, justify="left" if column == "tokenizer" else "right")
    for row in info["rows"]:
        table.add_row(
            str(row["horizon"]),
            row["tokenizer"],
            f"{row['tokens']:.1f}",
            str(row["max_tokens"]),
            f"{row['used'] * row['vocabulary']:.0f} of {row['vocabulary']}",
            f"{row['bits']:.1f}",
            f"{row['mse'] ** 0.5:.4f}",
            f"{row['max_error'][row['worst']]:.2g} ({info['actions'][row['worst']]})",
        )
    console.print(table)
    share = max((row["undecodable"] for row in info["rows"]), default=0.0)
    console.print(f"random sequences of allowed tokens that do not decode: {100 * share:g} %", highlight=False)
    for reason in info["skipped"]:
        console.print(f"skipped: {reason}", highlight=False)


def _draw(rows: list[dict[str, Any]]) -> Figure:
    horizons = sorted({row["horizon"] for row in rows})
    figure = Figure(figsize=(4.2 * len(horizons), 3.6), layout="constrained")
    for axis, horizon in zip(figure.subplots(1, len(horizons), squeeze=False)[0], horizons, strict=True):
        names: dict[tuple[float, float], list[str]] = {}
        for row in (row for row in rows if row["horizon"] == horizon):
            names.setdefault((row["tokens"], row["mse"] ** 0.5), []).append(row["tokenizer"])
        for point, same in names.items():
            axis.plot(*point, "o", color=INK, ms=4)
            axis.annotate(", ".join(same), point, (5, 4), textcoords="offset points", fontsize=8, color=SOFT)
        axis.set_xlim(0, 1.3 * axis.get_xlim()[1])
        axis.set_yscale("log")
        dress(axis, f"chunks of {horizon} actions", "tokens per chunk", "RMS error (normalised)")
    return figure
