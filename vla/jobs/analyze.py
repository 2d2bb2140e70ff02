"""`vla analyze exposure`: exposure bias, the error due to conditioning on the policy's own tokens (Ranzato et al.,
2016).

Owns: the measurement, its table and its figure. In training, a token is predicted from the demonstrator's earlier
tokens (teacher forcing); at run time, from the policy's own earlier tokens (free running). The difference of the two
error rates shows how errors propagate within a chunk. The probability of tokens that are not actions is also measured.
All measurements are on demonstrations; `vla rollout` measures closed-loop errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vla.config import ExposureConfig, check
from vla.data.reader import Demonstrations
from vla.data.samples import ChunkSamples, Sample
from vla.decoding import strategies
from vla.decoding.constraint import constrain
from vla.policy import Policy
from vla.support.palette import ACCENT, INK, LINE, SOFT, WARN, dress
from vla.support.progress import Progress
from vla.support.run_folder import RunFolder

FILE, FIGURE = "exposure.json", "exposure.png"
_STEPS = 12  # number of bins on the figure's axis of episode steps


def exposure(config: ExposureConfig) -> dict[str, Any]:
    """Measure, print, and write `exposure.json` and `exposure.png`. Returns the contents of the JSON file.

    Raises:
        ConfigError, DataError, SpecError: the configuration, dataset or policy is invalid; raised before anything is
            written.
    """
    check(config)
    demos = Demonstrations(config.data)
    policy = Policy.from_pretrained(config.policy, config.device, config.unnorm_key)
    policy.robot.check_fits(demos.robot, str(config.data), tolerated=("rate",))
    config.out.mkdir(parents=True, exist_ok=True)
    model = policy.network.config
    samples = ChunkSamples(demos, policy.robot.cameras, model.image_size, policy.horizon, 0, model.image_transform)
    chosen = np.linspace(0, demos.num_frames - 1, min(config.frames, demos.num_frames)).round().astype(int)
    steps = np.concatenate([np.arange(episode.length) for episode in demos.episodes])[chosen]
    batches = np.array_split(chosen, -(-len(chosen) // config.batch_size))
    found = []
    with Progress(len(batches), "batches") as progress:
        for batch in batches:
            found.append(measure(policy, [samples[int(frame)] for frame in batch]))
            progress.advance(f"{config.batch_size} frames each")
    info = _summarise(Tokens(*(np.concatenate(parts) for parts in zip(*found, strict=True))), steps) | {
        "tokens_per_action": policy.processor.action_tokenizer.tokens_per_action,
        "policy": config.policy,
        "data": str(config.data),
        "frames": len(chosen),
    }
    RunFolder(config.out).write_json(FILE, info)
    _draw(info).savefig(config.out / FIGURE, dpi=150, facecolor="white")
    _print(info, config.out)
    return info


class Tokens(NamedTuple):
    """Measurements of every token of every sample, each [B, T].

    Attributes:
        forced: whether the token is wrong under teacher forcing.
        free: whether the token is wrong under free running.
        outside: total probability of tokens that are not actions.
        learned: False for tokens beyond the end of a demonstration, which do not count.
    """

    forced: np.ndarray
    free: np.ndarray
    outside: np.ndarray
    learned: np.ndarray


def measure(policy: Policy, samples: list[Sample]) -> Tokens:
    """Compare a policy's tokens with those of the demonstrations."""
    network, processor = policy.network, policy.processor
    tokenizer, begin = processor.action_tokenizer, network.config.action_token_begin
    instructions = [sample.instruction for sample in samples]
    states = None
    if network.config.use_state:
        states = processor.state(np.stack([sample.state for sample in samples]), policy.unnorm_key)
    batch = policy.with_latent(processor([sample.images for sample in samples], instructions, states))
    truth = processor.encode_actions(np.stack([sample.chunk for sample in samples]), policy.unnorm_key)
    logits = strategies.teacher_forced_logits(network, batch, torch.from_numpy(truth)).float()
    rows = logits[..., begin : begin + tokenizer.vocab_size]
    outside = 1 - (rows.logsumexp(-1) - logits.logsumexp(-1)).exp()
    own = policy.decode(batch).ids.cpu().numpy()
    likeliest = constrain(tokenizer, rows, torch.from_numpy(truth[:, :-1] - begin)).argmax(-1)
    forced = likeliest.cpu().numpy() + begin != truth
    learned = processor.token_mask(truth, np.stack([sample.valid for sample in samples]))
    return Tokens(forced, own != truth, outside.cpu().numpy(), learned)


def _summarise(tokens: Tokens, steps: np.ndarray) -> dict[str, Any]:
    """Means over all tokens, by position in the chunk, and by step in the episode (`steps`, one per sample)."""
    last = np.flatnonzero(tokens.learned.any(axis=0))[-1]  # last position that occurs in the data
    tokens = Tokens(*(values[:, : last + 1] for values in tokens))
    edges = np.unique(np.linspace(0, steps.max() + 1, _STEPS + 1).round().astype(int))
    group = np.searchsorted(edges, steps, side="right") - 1
    filled = [g for g in range(len(edges) - 1) if tokens.learned[group == g].any()]

    def describe(values: np.ndarray) -> dict[str, Any]:
        counted = np.where(tokens.learned, values, np.nan)
        return {
            "mean": float(np.nanmean(counted)),
            "by_position": np.nanmean(counted, axis=0).tolist(),
            "by_step": [float(np.nanmean(counted[group == g])) for g in filled],
        }

    return {
        "tokens": int(tokens.learned.sum()),
        "teacher_forced_error": describe(tokens.forced),
        "free_running_error": describe(tokens.free),
        "outside_action_rows": describe(tokens.outside) | {"max": float(tokens.outside[tokens.learned].max())},
        "steps": edges[filled].tolist(),
    }


def _print(info: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{info['policy']} on {info['data']}: {info['frames']} frames, {info['tokens']} tokens")
    for column in ("token error", "all", "first token", "last token"):
        table.add_column(column, justify="left" if column == "token error" else "right")
    for name, key in (("teacher-forced", "teacher_forced_error"), ("free-running", "free_running_error")):
        positions = info[key]["by_position"]
        table.add_row(name, *(f"{100 * value:.1f} %" for value in (info[key]["mean"], positions[0], positions[-1])))
    Console().print(table)
    outside = info["outside_action_rows"]
    print(f"probability of tokens that are not actions: mean {outside['mean']:.2e}, max {outside['max']:.2e}")
    print(f"figure: {out / FIGURE}")


def _draw(info: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12.4, 3.4), layout="constrained")
    position, step, outside = figure.subplots(1, 3)
    places = np.arange(1, len(info["free_running_error"]["by_position"]) + 1)
    for axis, key, x in ((position, "by_position", places), (step, "by_step", info["steps"])):
        for name, label, colour in (
            ("teacher_forced_error", "after the demonstrator's tokens", ACCENT),
            ("free_running_error", "after its own tokens", WARN),
        ):
            axis.plot(x, 100 * np.array(info[name][key]), color=colour, label=label, lw=1.6, marker="o", ms=2.5)
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])  # room for the legend
    dress(position, "wrong tokens by position in the chunk", "token", "%")
    dress(step, "wrong tokens by step in the episode", "step", "%")
    outside.semilogy(places, np.maximum(info["outside_action_rows"]["by_position"], 1e-12), color=INK, lw=1.4)
    dress(outside, "probability of tokens that are not actions", "token", "")
    for axis in (position, outside):
        for boundary in np.arange(1, len(places), info["tokens_per_action"] or len(places)) - 0.5:
            axis.axvline(boundary, color=LINE, lw=0.8, zorder=0)
    position.legend(frameon=False, fontsize=8, labelcolor=SOFT)
    return figure
