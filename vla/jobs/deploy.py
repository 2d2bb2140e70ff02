"""`vla deploy`: run a policy in real time on a simulated robot, on recorded demonstrations or on your own robot.

Owns: the episodes of a deployment and their record. The control loop is in `vla.control`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import statistics
import sys
import threading
import time
import webbrowser
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from vla import config as configuration
from vla.config import AdapterConfig, DeployConfig
from vla.control.black_box import BlackBox
from vla.control.console import OperatorConsole
from vla.control.controller import Controller
from vla.control.page import page, serve_in_thread
from vla.control.robot import EpisodicRobot, Robot, is_episodic
from vla.control.robots import custom
from vla.control.robots.recorded import ReplayRobot
from vla.control.robots.sim import SimRobot
from vla.errors import ConfigError
from vla.policy import ChunkPolicy
from vla.serving import client
from vla.spec import RobotSpec
from vla.support import machine
from vla.support.run_folder import RunFolder
from vla.support.statistics import percentiles, wilson

FILE = "deploy.json"
_NO_LIMIT = 2**31  # steps
_MAX_RECORDS = 10_000  # records of earlier episodes are dropped, because a deployment may last for weeks


def deploy(config: DeployConfig) -> dict[str, Any]:
    """Run the episodes in real time; print and write their records.

    Raises:
        VLAError: policy, robot and configuration are incompatible; raised before the first episode.
        KeyboardInterrupt: the deployment was stopped. The robot holds, and the finished episodes are written.
    """
    configuration.check(config)
    policy = client.load(
        config.policy,
        config.device,
        config.unnorm_key,
        config.n_action_steps,
        config.decoding,
        dtype=config.dtype,
        connect_s=config.connect_s,
    )
    records: deque[dict[str, Any]] = deque(maxlen=_MAX_RECORDS)
    sys.setswitchinterval(0.0005)  # limits the time that a thread waits for the GIL
    robot = _robot(config)
    with (
        _controller(config, robot, policy) as controller,
        _black_box(config, controller),
        _held_by_signals(controller) as check,
        _live_page(config, controller, robot.spec, policy) as console,
    ):
        folder = RunFolder(config.out, config)
        folder.begin()
        interrupted = True
        try:
            listed = robot.episodes if is_episodic(robot) else None
            seeds = itertools.count(config.seed) if listed is None else listed
            for seed in itertools.islice(seeds, config.episodes):
                if is_episodic(robot):
                    robot.reset(seed)
                    controller.safety.forget()
                instruction = _instruction(config, robot)
                if console is not None:
                    console.begin(seed, instruction)
                record = controller.run(instruction, config.seconds)
                check()
                if isinstance(robot, ReplayRobot):
                    record["agreement"] = robot.agreement()
                if console is not None:
                    record["orders"] = console.end(record["success"])
                records.append({"seed": seed, "instruction": instruction} | record)
                print(_line(records[-1]), flush=True)
                while console is not None and console.waiting():
                    check()
                    time.sleep(0.02)
            interrupted = False
        finally:
            info = _summarise(records) | {
                "interrupted": interrupted,
                "machine": machine.describe(),
                "episodes": list(records),
            }
            folder.write_json(FILE, info)
    _print(info)
    return info


def _robot(config: DeployConfig) -> Robot | EpisodicRobot:
    if config.robot is not None:
        return custom.make(config.robot, config.robot_kwargs)
    if config.replay is not None:
        return ReplayRobot(config.replay, config.control.hz)
    return SimRobot(config.env, _adapter(config), config.control.hz)


def _controller(config: DeployConfig, robot: Robot, policy: ChunkPolicy) -> Controller:
    """Create the controller, and close the robot if that fails. Otherwise, the controller closes the robot."""
    try:
        if not is_episodic(robot) and not config.adapter.instruction:
            raise ConfigError(f"robot {config.robot!r} has no instruction. Set the task with --instruction.")
        return Controller(robot, policy, config.control)
    except BaseException:
        robot.close()
        raise


def _instruction(config: DeployConfig, robot: Robot) -> str:
    own = robot.instruction if is_episodic(robot) else ""
    return own if config.adapter.instruction is None else config.adapter.instruction


def _adapter(config: DeployConfig) -> AdapterConfig:
    """The adapter. If an operator is expected (live page, unlimited episodes), it has no step limit, so that only
    `config.seconds` limits an episode."""
    if config.ui and config.episodes is None and config.adapter.max_steps is None:
        return dataclasses.replace(config.adapter, max_steps=_NO_LIMIT)
    return config.adapter


@contextlib.contextmanager
def _black_box(config: DeployConfig, controller: Controller) -> Iterator[None]:
    if not config.control.black_box_s:
        yield
        return
    box = BlackBox(config.out / "blackbox", config.control.black_box_s, controller.hz)
    controller.listeners.append(box.add)
    try:
        yield
    finally:
        box.close()
        if box.problem is not None:
            print(f"the black box recording is incomplete: {box.problem}", flush=True)
        if box.files:
            print(f"black box recordings: {', '.join(map(str, box.files))}", flush=True)


@contextlib.contextmanager
def _live_page(
    config: DeployConfig, controller: Controller, spec: RobotSpec, policy: ChunkPolicy
) -> Iterator[OperatorConsole | None]:
    """Serve the operator console if `config.ui` is set."""
    if not config.ui:
        yield None
        return
    driven = config.robot or config.replay or config.env.partition(":")[2] or config.env
    console = OperatorConsole(controller, spec, policy, f"{config.policy} on {driven}")
    with serve_in_thread(page(console, config.host), config.host, config.port) as address:
        print(f"live page: {address}", flush=True)
        if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(address)
        controller.listeners.append(console.listen)
        yield console


@contextlib.contextmanager
def _held_by_signals(controller: Controller) -> Iterator[Callable[[], None]]:
    """On Ctrl-C or SIGTERM, end the episode at its next control step with the hold command. The signal is raised again
    when the yielded function is called, or at once on a second signal.

    Ignored signals stay ignored: shells ignore SIGINT for background jobs of scripts (`vla deploy &`)."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def stop(signum: int, frame: FrameType | None) -> None:
        controller.stop()
        if caught:
            restore()
            signal.raise_signal(signum)
        caught.append(signum)

    def check() -> None:
        if caught:
            restore()
            signal.raise_signal(caught[0])

    heard = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
    if signal.SIGINT not in heard:
        print(f"SIGINT is ignored (background job). To stop, run `kill {os.getpid()}`.", flush=True)
    before = {signum: signal.signal(signum, stop) for signum in heard}
    try:
        yield check
    finally:
        restore()


def _line(record: dict[str, Any]) -> str:
    what = "success" if record["success"] else "no success"
    if record.get("orders"):
        what += f" (operator: {', '.join(record['orders'])})"
    if "agreement" in record:
        what = "differs from the demonstration by " + ", ".join(f"{k} {v:.2g}" for k, v in record["agreement"].items())
    decode = record["decode_ms"]
    decoding = f"decoding {statistics.median(decode):.0f} ms" if decode else "no chunk"
    notes = "".join(f", {count} x {reason}" for reason, count in record["interventions"].items())
    return f"{record['instruction']!r}: {what} after {record['commands']} commands, {decoding}{notes}"


def _summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # Episodes in which the operator intervened do not count for the success rate.
    alone = [record for record in records if not record.get("orders")]
    successes, total = sum(record["success"] for record in alone), len(alone)
    ticks = sum(record["commands"] + record["skipped"] for record in records)
    interventions: Counter[str] = Counter()
    for record in records:
        interventions.update(record["interventions"])
    timings = {
        name: [ms for record in records for ms in record[name]]
        for name in ("lateness_ms", "first_action_ms", "decode_ms")
    }
    return {
        "successes": successes,
        "n_episodes": total,
        "n_guided": len(records) - total,
        "interval": wilson(successes, total),
        "ticks": ticks,
        "missed": sum(record["missed"] for record in records) / max(ticks, 1),
        **{name: percentiles(values) if values else None for name, values in timings.items()},
        "jerk": sum(record["jerk"] for record in records) / max(len(records), 1),
        "interventions": dict(interventions),
        "errors": sum(len(record["errors"]) for record in records),
    }


def _print(info: dict[str, Any]) -> None:
    table = Table(show_header=False)
    low, high = (100 * limit for limit in info["interval"])
    guided = f"; without {info['n_guided']} episodes guided by the operator" if info["n_guided"] else ""
    rows = {
        "success": f"{info['successes']}/{info['n_episodes']} (95 % interval {low:.0f} to {high:.0f}){guided}",
        "control steps": f"{info['ticks']}, {100 * info['missed']:.2f} % of the deadlines missed",
        "command lateness": _spread(info["lateness_ms"]),
        "time to the first action": _spread(info["first_action_ms"]),
        "time to the whole chunk": _spread(info["decode_ms"]),
        "interventions": ", ".join(f"{count} x {reason}" for reason, count in info["interventions"].items()) or "none",
        "mean jerk of the commands": f"{info['jerk']:.3f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _spread(ms: dict[str, float] | None) -> str:
    return "none" if ms is None else f"p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms, max {ms['max']:.1f} ms"
