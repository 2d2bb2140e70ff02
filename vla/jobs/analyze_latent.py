"""`vla analyze latent`: rollouts of the same seeds under every code of a policy's latent (docs/free_transformer.md).

Owns: the rollouts, the table of success rates, and the figure of the paths by code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vla.config import LatentConfig, check
from vla.errors import ConfigError, unknown
from vla.policy import Policy
from vla.policy.session import LatentDraw, Session
from vla.simulation.adapter import SimulatedRobot, make
from vla.support.palette import INK, LINE
from vla.support.progress import Progress
from vla.support.run_folder import RunFolder
from vla.support.statistics import wilson

FILE, FIGURE = "latent.json", "latent.png"
_PANELS = 4  # seeds in the figure


def latent(config: LatentConfig) -> dict[str, Any]:
    """Roll out every code, print, and write `latent.json` and `latent.png`. Returns the contents of the JSON file.

    Raises:
        VLAError: the policy has no latent, does not have the configured codes, or does not fit the environment; raised
            before anything is written.
    """
    check(config)
    policy = Policy.from_pretrained(config.policy, config.device, config.unnorm_key, config.n_action_steps)
    if policy.network.latent is None:
        raise ConfigError(f"{config.policy} has no latent. Train a policy with `vla train --latent`.")
    codes = config.codes or tuple(range(min(8, 2**policy.network.config.latent_bits)))
    for code in codes:
        policy.check_codes((code,))
    with make(config.env, config.adapter) as env:
        policy.robot.check_fits(env.robot, f"environment {config.env!r}", tolerated=("names", "rate"))
        axes = [_axis(env.robot.state_names, name) for name in config.axes]
        config.out.mkdir(parents=True, exist_ok=True)
        rows, seeds = [], range(config.seed, config.seed + config.episodes)
        with Progress(len(seeds) * len(codes), "episodes") as progress:
            for seed in seeds:
                for code in codes:
                    rows.append({"seed": seed, "code": code, **_roll_out(env, policy, seed, code, axes)})
                    progress.advance(f"{sum(row['success'] for row in rows)} successes")
    info = {"policy": config.policy, "env": config.env, "axes": list(config.axes), "rollouts": rows}
    RunFolder(config.out).write_json(FILE, info)
    _draw(info).savefig(config.out / FIGURE, dpi=150, facecolor="white")
    _print(info)
    return info


def _axis(names: tuple[str, ...], name: str) -> int:
    if name not in names:
        raise ConfigError(unknown("state", name, names, "`axes` must name two entries of the state."))
    return names.index(name)


def _roll_out(env: SimulatedRobot, policy: Policy, seed: int, code: int, axes: list[int]) -> dict[str, Any]:
    """Run one episode. Returns `success` at its end and `path`, two state entries over time, [steps + 1, 2]."""
    observation, info = env.reset(seed=seed)
    session, over = Session(info["instruction"], LatentDraw(codes=(code,))), False
    path = [observation["agent_pos"][axes]]
    while not over:
        observation, _, terminated, truncated, info = env.step(session.act(policy, observation))
        session.instruction, over = info["instruction"], terminated or truncated
        path.append(observation["agent_pos"][axes])
    return {"success": bool(info["is_success"]), "path": np.round(np.stack(path).astype(float), 5).tolist()}


def _draw(info: dict[str, Any]) -> Figure:
    rows = info["rollouts"]
    seeds = list(dict.fromkeys(row["seed"] for row in rows))[:_PANELS]
    codes = sorted({row["code"] for row in rows})
    figure = Figure(figsize=(1 + 3 * len(seeds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(seeds), squeeze=False)[0]
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(codes)))
    for axes, seed in zip(panels, seeds, strict=True):
        for row in rows:
            if row["seed"] == seed:
                x, y = np.array(row["path"]).T
                colour = colours[codes.index(row["code"])]
                axes.plot(x, y, color=colour, label=str(row["code"]), linestyle="-" if row["success"] else ":")
                axes.plot(x[-1], y[-1], "o", color=colour, markersize=4)
        axes.plot(x[0], y[0], "s", color=INK, markersize=5)
        axes.set(title=f"seed {seed}", xlabel=info["axes"][0], ylabel=info["axes"][1])
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(color=LINE)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="code", loc="outside right center", frameon=False)
    return figure


def _print(info: dict[str, Any]) -> None:
    table = Table(title=f"{info['policy']} in {info['env']}, by code")
    for column in ("code", "success", "95 % interval", "steps (median)"):
        table.add_column(column, justify="right")
    for code in sorted({row["code"] for row in info["rollouts"]}):
        chosen = [row for row in info["rollouts"] if row["code"] == code]
        won = sum(row["success"] for row in chosen)
        low, high = wilson(won, len(chosen))
        steps = np.median([len(row["path"]) - 1 for row in chosen])
        table.add_row(str(code), f"{won} of {len(chosen)}", f"{100 * low:.0f} to {100 * high:.0f} %", f"{steps:g}")
    Console().print(table)
