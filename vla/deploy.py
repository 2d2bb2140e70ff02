"""`vla deploy`: a policy on a simulated robot in real time.

Owns: the episodes of a deployment and their record. The loop is `vla.control`'s.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from vla import config as configuration
from vla import machine
from vla.config import DeployConfig
from vla.control.controller import Controller
from vla.control.sim import SimRobot
from vla.errors import ConfigError
from vla.policy import Policy
from vla.statistics import wilson

FILE = "deploy.json"


def deploy(config: DeployConfig) -> dict[str, Any]:
    """Play the episodes in real time, print and write what happened.

    Raises:
        VLAError: before the first episode, when policy, robot and configuration do not fit.
        KeyboardInterrupt: stopped; the robot holds, and finished episodes are written.
    """
    if config.episodes < 1 or config.seconds <= 0:
        raise ConfigError(f"episodes and seconds must be positive, got {config.episodes} and {config.seconds}.")
    policy = Policy.from_pretrained(config.policy, config.device, config.unnorm_key, config.n_action_steps)
    records: list[dict[str, Any]] = []
    # A thread that wants to run may have to wait this long for Python's lock: less than the jitter that matters.
    sys.setswitchinterval(0.0005)
    with (
        SimRobot(config.env, config.adapter, config.control.hz) as robot,
        Controller(robot, policy, config.control) as controller,
    ):
        config.out.mkdir(parents=True, exist_ok=True)
        configuration.dump(config, config.out / "config.yaml")
        try:
            for seed in range(config.seed, config.seed + config.episodes):
                robot.reset(seed)
                record = controller.run(robot.instruction, config.seconds)
                records.append({"seed": seed, "instruction": robot.instruction} | record)
                print(_line(records[-1]), flush=True)
        finally:
            info = _summarise(records) | {"machine": machine.describe(), "episodes": records}
            (config.out / FILE).write_text(json.dumps(info, indent=1))
    _print(info)
    return info


def _line(record: dict[str, Any]) -> str:
    what = "success" if record["success"] else "no success"
    decode = record["decode_ms"].get("p50")
    thinking = "no chunk" if decode is None else f"decoding {decode:.0f} ms"
    notes = "".join(f", {count} x {reason}" for reason, count in record["interventions"].items())
    return f"{record['instruction']!r}: {what} after {record['commands']} commands, {thinking}{notes}"


def _summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    successes, total = sum(record["success"] for record in records), len(records)
    commands = sum(record["commands"] + record["skipped"] for record in records)
    missed = sum(record["missed"] * (record["commands"] + record["skipped"]) for record in records)
    reasons: dict[str, int] = {}
    for record in records:
        for reason, count in record["interventions"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "successes": successes,
        "n_episodes": total,
        "interval": wilson(successes, total) if total else None,
        "commands": commands,
        "missed": missed / max(commands, 1),
        "lateness_ms_p99": max((record.get("lateness_ms_p99", 0.0) for record in records), default=0.0),
        "decode_ms_p99": max((record["decode_ms"].get("p99", 0.0) for record in records), default=0.0),
        "jerk": sum(record["jerk"] for record in records) / max(total, 1),
        "interventions": reasons,
        "errors": sum(len(record["errors"]) for record in records),
    }


def _print(info: dict[str, Any]) -> None:
    table = Table(show_header=False)
    low, high = (100 * limit for limit in info["interval"])
    rows = {
        "success": f"{info['successes']}/{info['n_episodes']} (95 % interval {low:.0f} to {high:.0f})",
        "commands": f"{info['commands']}, {100 * info['missed']:.2f} % of the deadlines missed",
        "lateness of a command": f"p99 at most {info['lateness_ms_p99']:.1f} ms in any episode",
        "decoding": f"p99 at most {info['decode_ms_p99']:.0f} ms in any episode",
        "interventions": ", ".join(f"{count} x {reason}" for reason, count in info["interventions"].items()) or "none",
        "mean jerk of the commands": f"{info['jerk']:.3f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
