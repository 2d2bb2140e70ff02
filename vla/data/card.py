"""The dataset card (README.md) of a dataset, as the Hugging Face hub shows it.

Owns: the text. Its front matter has LeRobot's tags, by which the hub finds and shows a dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vla.data.format import BOOKKEEPING, Info

INSTRUCTIONS = 20  # the most frequent ones are listed

_FRONT_MATTER = """---
task_categories: [robotics]
tags: [LeRobot, vla]
configs:
- config_name: default
  data_files: data/*/*.parquet
---
"""


def dataset_card(name: str, info: Info, rows: Sequence[Mapping[str, Any]]) -> str:
    """The card of the dataset `name`.

    Args:
        rows: the rows of meta/episodes.
    """
    robot = info.describe_robot()
    recorded = {
        "episodes": info.total_episodes,
        "frames": f"{info.total_frames}, {info.total_frames / info.fps:.0f} s at {info.fps:g} frames per second",
        "robot": f"{info.robot_type or 'not named'}; actions: {robot.action_space}",
        "environments": ", ".join(sorted({row["env_id"] for row in rows if row.get("env_id")})) or "not named",
        "success": _share([row.get("success") for row in rows]),
    }
    features = {
        key: f"{value['dtype']} | {value['shape']} | {_entries(value)}"
        for key, value in info.features.items()
        if key not in BOOKKEEPING
    }
    counts = Counter(text for row in rows for text in row["tasks"])
    more = f"\n\nand {len(counts) - INSTRUCTIONS} others." if len(counts) > INSTRUCTIONS else ""
    return f"""{_FRONT_MATTER}
# {name}

Demonstrations of a robot, recorded with `vla`, as a LeRobotDataset {info.codebase_version}.

| | |
|---|---|
{_lines(recorded)}

## Features

| | type | shape | entries |
|---|---|---|---|
{_lines(features)}

## Instructions

| instruction | episodes |
|---|---|
{_lines(dict(counts.most_common(INSTRUCTIONS)))}{more}

## Use

```bash
hf download <owner>/{name} --repo-type dataset --local-dir datasets/{name}
vla inspect --data datasets/{name}
vla train --data datasets/{name} --out runs/{name}
```
"""


def _lines(table: Mapping[str, object]) -> str:
    return "\n".join(f"| {_cell(key)} | {value} |" for key, value in table.items())


def _cell(text: str) -> str:
    """Text that is one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")


def _entries(feature: Mapping[str, Any]) -> str:
    names = feature["names"] or ()
    return ", ".join(map(_cell, names))


def _share(flags: Sequence[bool | None]) -> str:
    known = [flag for flag in flags if flag is not None]
    return f"{sum(known)} of {len(known)} episodes" if known else "not recorded"
