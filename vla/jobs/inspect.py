"""`vla inspect`: show the contents of a dataset and its problems.

Owns: the report of a dataset: tables on the terminal, figures, and a self-contained HTML page. The checks are in
`data.checks`, the figures in `data.figures`. The dataset is not modified.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vla.config import InspectConfig
from vla.config import check as check_config
from vla.data.checks import Finding, check, check_images, moves
from vla.data.figures import MOMENTS, action_histograms, camera_strip, length_histogram
from vla.data.reader import Demonstrations, Episode
from vla.evaluation import rerun_sink
from vla.support.pages import templates
from vla.transforms.normalize import Normalizer, compute_statistics

PAGE = "index.html"
ROWS = 6  # episodes on a camera's contact sheet
IMAGE_EPISODES, IMAGE_FRAMES = 60, 4000  # maximum number of episodes and frames to check for bad images, per camera
LISTED = 12  # maximum length of printed lists of instructions and episodes


def inspect(config: InspectConfig) -> Path:
    """Inspect the dataset `config.data` and return the folder of the report.

    Raises:
        DataError: the dataset cannot be read.
    """
    check_config(config)
    if config.rerun:
        rerun_sink.load_rerun()
    bins = embedded_bins() if config.bins is None else config.bins
    demos = Demonstrations(config.data)
    out = config.out or config.data / "inspect"
    out.mkdir(parents=True, exist_ok=True)

    statistics = compute_statistics(demos.actions)
    normalizer = Normalizer.from_statistics(statistics, "q01_q99")
    findings = [*check(demos), *_image_findings(demos)]
    figures = {"actions": action_histograms(demos, normalizer, bins)}
    figures |= {f"camera-{camera}": _strip(demos, camera) for camera in demos.cameras}
    figures["lengths"] = length_histogram(demos)
    images = {}
    for name, figure in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=150, facecolor="white")
        images[name] = base64.b64encode(path.read_bytes()).decode()

    facts = _facts(demos)
    entries = _entries(demos, normalizer, statistics, bins)
    instructions = Counter(episode.instruction for episode in demos.episodes).most_common()
    environment = templates()
    environment.filters["listed"] = _listed
    page = environment.get_template("inspect.html").render(
        name=demos.root.resolve().name,
        facts=facts,
        entries=entries,
        bins=bins,
        instructions=instructions[: 4 * LISTED],
        unlisted=len(instructions) - 4 * LISTED,
        findings=findings,
        images=images,
        cameras=demos.cameras,
    )
    (out / PAGE).write_text(page, encoding="utf-8")
    _print(Console(), bins, demos, facts, entries, instructions, findings)
    console = Console(stderr=True)
    for episode in _spread(demos.episodes, config.rerun):
        path = _record(demos, episode, out)
        console.print(f"recording: {path}", highlight=False, soft_wrap=True)
    console.print(f"report: {out / PAGE}", highlight=False, soft_wrap=True)
    return out


def _record(demos: Demonstrations, episode: Episode, out: Path) -> Path:
    """Write an episode's recording for Rerun."""
    recording = rerun_sink.EpisodeRecording(demos.robot, episode.instruction)
    cameras = [demos.frames(episode.index, camera) for camera in demos.cameras]
    for row in range(episode.start, episode.start + episode.length):
        observation: dict[str, Any] = {"pixels": dict(zip(demos.cameras, map(next, cameras), strict=True))}
        if demos.states is not None:
            observation["agent_pos"] = demos.states[row]
        recording.observe(int(demos.steps[row]), observation)
        recording.act(int(demos.steps[row]), demos.actions[row])
    path = out / rerun_sink.FOLDER / f"episode-{episode.index}{rerun_sink.SUFFIX}"
    recording.save(path, f"{demos.root.resolve().name}, episode {episode.index}")
    return path


def embedded_bins() -> int:
    """Number of bins of the built-in backbone."""
    config = Path(__file__).parent.parent / "pretrained/nano/config.json"
    return int(json.loads(config.read_text())["action_tokenizer"]["n_bins"])


def _facts(demos: Demonstrations) -> dict[str, str]:
    lengths = [episode.length for episode in demos.episodes]
    known = [episode.success for episode in demos.episodes if episode.success is not None]
    sizes = [path.stat().st_size for path in demos.root.rglob("*") if path.suffix in (".mp4", ".parquet")]
    cameras = ", ".join(f"{name} {'x'.join(map(str, demos.info.image_shape(name)))}" for name in demos.cameras)
    noisy = sum(bool(episode.noise) for episode in demos.episodes)
    return {
        "episodes": f"{len(lengths)}" + (f" ({sum(known)} successes)" if known else ""),
        "frames": f"{demos.num_frames} at {demos.fps:g} per second ({demos.num_frames / demos.fps / 60:.1f} minutes)",
        "episode length": f"{min(lengths)} to {max(lengths)}, median {np.median(lengths):.0f} frames",
        "cameras": (cameras or "none")
        + (f" (depth not used: {', '.join(demos.info.depth)})" if demos.info.depth else ""),
        "state": ", ".join(demos.robot.state_names) or "none",
        "action": f"{demos.robot.action_space}: {', '.join(demos.robot.action_names)}",
        "instructions": str(len({episode.instruction for episode in demos.episodes})),
        "environments": ", ".join(sorted({str(e.env_id) for e in demos.episodes if e.env_id})) or "not recorded",
        "noise": f"{noisy} episodes with a noisy expert; the labels are clean" if noisy else "none recorded",
        "size": f"{sum(sizes) / 1e6:.1f} MB ({sum(sizes) / demos.num_frames:.0f} bytes per frame)",
    }


def _entries(
    demos: Demonstrations, normalizer: Normalizer, statistics: dict[str, list[float]], bins: int
) -> list[dict[str, Any]]:
    """For each action dimension: statistics, the share of values that are clipped, and the bin width."""
    low, high = normalizer.unnormalize(np.array([[-1.0], [1.0]]))
    clipped = np.mean((demos.actions < low - 1e-6) | (demos.actions > high + 1e-6), axis=0)
    return [
        {
            "name": name,
            **{key: values[i] for key, values in statistics.items()},
            "constant": bool(normalizer.constant[i]),
            "clipped": float(clipped[i]),
            "bin": float(high[i] - low[i]) / bins,
        }
        for i, name in enumerate(demos.robot.action_names)
    ]


def _spread(episodes: list[Episode], count: int) -> list[Episode]:
    """`count` episodes, evenly spread."""
    places = np.linspace(0, len(episodes) - 1, min(count, len(episodes))).round().astype(int)
    return [episodes[i] for i in places]


def _strip(demos: Demonstrations, camera: str) -> Any:
    images, titles = [], []
    for episode in _spread(demos.episodes, ROWS):
        frames = list(demos.frames(episode.index, camera))
        wanted = np.linspace(0, len(frames) - 1, len(MOMENTS)).round().astype(int)
        images.append([frames[i] for i in wanted])
        titles.append(f"episode {episode.index}\n{episode.instruction}")
    return camera_strip(images, titles)


def _image_findings(demos: Demonstrations) -> list[Finding]:
    """Problems in the images of a selection of episodes, merged by camera and kind."""
    moving = moves(demos)
    merged: dict[tuple[str, str], Finding] = {}
    for camera in demos.cameras:
        remaining = IMAGE_FRAMES
        for episode in _spread(demos.episodes, IMAGE_EPISODES):
            if remaining <= 0:
                break
            images = list(demos.frames(episode.index, camera))
            remaining -= len(images)
            moved = np.concatenate([[True], moving[episode.rows][:-1]])
            for finding in check_images(camera, episode, images, moved):
                before = merged.get((camera, finding.what), Finding(finding.what, finding.detail))
                episodes = (*before.episodes, *finding.episodes)
                merged[camera, finding.what] = Finding(before.what, before.detail, episodes)
    return list(merged.values())


def _listed(episodes: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, episodes[:LISTED]))
    return shown + (f" and {len(episodes) - LISTED} more" if len(episodes) > LISTED else "")


def _print(
    console: Console,
    bins: int,
    demos: Demonstrations,
    facts: dict[str, str],
    entries: list[dict[str, Any]],
    instructions: list[tuple[str, int]],
    findings: list[Finding],
) -> None:
    table = Table(title=str(demos.root), title_justify="left", show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value, style=None)
    console.print(table, "")

    table = Table("action", "q01", "q99", "min", "max", "mean", "std", "clipped", f"bin width ({bins})", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in entries:
        numbers = [f"{entry[key]:.4g}" for key in ("q01", "q99", "min", "max", "mean", "std")]
        last = ["", "never moves"] if entry["constant"] else [f"{entry['clipped']:.1%}", f"{entry['bin']:.2g}"]
        table.add_row(entry["name"], *numbers, *last)
    console.print(table, "")

    table = Table("episodes", "instruction", box=None)
    for instruction, count in instructions[:LISTED]:
        table.add_row(str(count), instruction)
    if len(instructions) > LISTED:
        table.add_row("", f"... and {len(instructions) - LISTED} more")
    console.print(table, "")

    for finding in findings:
        where = f" (episodes {_listed(finding.episodes)})" if finding.episodes else ""
        console.print(f"[bold yellow]{finding.what}[/]{where}: {finding.detail}", highlight=False)
    if not findings:
        console.print("[bold green]no problems found[/]", highlight=False)
