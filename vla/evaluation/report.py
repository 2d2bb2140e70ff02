"""The report of a rollout or benchmark: one self-contained HTML file, and text for the terminal.

Owns: the presentation of results, from the contents of `eval_info.json` and the video files. Pages contain their
styles, charts (SVG) and videos (data URLs). It does not compute results.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from vla.evaluation.results import OUTCOMES, short
from vla.support.pages import templates
from vla.support.run_folder import write_text
from vla.support.statistics import percentiles

FILE = "report.html"
MOST_EMBEDDED = 48 * 2**20  # maximum number of bytes of embedded videos
Row = list[Any]  # a policy's name, and success rates in percent (None: unknown)


def write(info: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` to the report folder of a run."""
    return write_text(folder / FILE, render(info, folder))


def render(info: Mapping[str, Any], folder: Path) -> str:
    """The HTML page."""
    environment = templates()
    environment.filters |= {"number": _number, "short": short}
    episodes = info["per_episode"]
    latency = info["decode_latency"]
    bars = latency.get("histogram")
    benchmark = info.get("benchmark")
    own = own_rates(benchmark) if benchmark else []
    return environment.get_template("report.html").render(
        info=info,
        overall=info["overall"],
        outcomes=OUTCOMES,
        videos=_videos(episodes, folder),
        recordings=[episode for episode in episodes if episode.get("rerun_path")],
        faults=[episode for episode in episodes if episode["fault"]],
        lengths=_lengths(episodes),
        winning_length=percentiles([episode["length"] for episode in episodes if episode["success"]] or [0]),
        latency=latency,
        latency_chart=_histogram(bars["edges_ms"], bars["counts"]) if bars else "",
        comparison=info.get("comparison"),
        benchmark=benchmark,
        own=own,
        published=benchmark is not None and own != [None] * len(own) and benchmark["published"],
        variants=variants(benchmark) if benchmark else [],
    )


def summary(info: Mapping[str, Any], folder: Path) -> str:
    """The results in a few lines of plain text."""
    tasks = info["per_task"]
    rows = [(short(task["env_id"]), task) for task in tasks]
    if len(tasks) != 1:
        rows.append(("all", info["overall"]))
    width = max(len(name) for name, _ in rows)
    lines = []
    for name, row in rows:
        if not row["n_episodes"]:
            lines.append(f"{name:<{width}}  no finished episode")
            continue
        low, high = row["pc_success_ci95"]
        lines.append(
            f"{name:<{width}}  {row['n_successes']:>3}/{row['n_episodes']:<3}  {row['pc_success']:5.1f} %  "
            f"(95 % interval {low:.0f} to {high:.0f}; ever {row['pc_success_ever']:.0f} %)"
        )
    failures = {name: n for name, n in info["overall"]["outcomes"].items() if name != "success"}
    if failures:
        lines.append("not successful: " + ", ".join(f"{n} {OUTCOMES[name]}" for name, n in failures.items()))
    if "ms" in info["decode_latency"]:
        ms = info["decode_latency"]["ms"]
        lines.append(
            f"decode per batch: p50 {ms['p50']:.1f} ms, p95 {ms['p95']:.1f}, p99 {ms['p99']:.1f}, max {ms['max']:.1f}"
        )
    if "comparison" in info:
        lines.append(info["comparison"]["words"])
    if info["interrupted"]:
        lines.append(f"stopped after {info['overall']['n_episodes']} of {info['n_episodes_asked']} episodes")
    return "\n".join([*lines, f"report: {folder / FILE}"])


def tables(summary: Mapping[str, Any], title: str) -> list[Table]:
    """A benchmark's scores for the terminal. If at least one tier is complete, also the published results."""
    policy, average = summary["policy"]["path"], summary["tier_average"]
    scores = Table(title=f"{policy} on {title}, success in %")
    for column in ("", "tasks", "success", "95 % interval", "episodes"):
        scores.add_column(column, justify="right" if column else "left")
    rows = {name.replace("_", " "): tier for name, tier in summary["tiers"].items() if tier["n_episodes"]}
    rows |= {"Avg (mean of the tiers)": average, "all episodes": summary["episode_average"]}
    for name, row in rows.items():
        if row is not None:
            low, high = row["pc_success_ci95"]
            tasks = f"{row['n_tasks']}/{row['n_tasks_of']}" if "n_tasks" in row else ""
            episodes = f"{row['n_successes']}/{row['n_episodes']}" if "n_tasks" in row else ""
            scores.add_row(name, tasks, f"{row['pc_success']:.1f}", f"{low:.1f} to {high:.1f}", episodes)
    found = [scores]
    own, known = own_rates(summary), [entry for entry in summary["published"] if not entry.get("variant")]
    if known and own != [None] * len(own):
        none = [None] * len(summary["tiers"])
        listed: list[Row] = [[entry["policy"], *(entry["tiers"] or none), entry["average"]] for entry in known]
        listed.append([f"{policy} (this)", *own])
        listed.sort(key=lambda row: np.inf if row[-1] is None else row[-1])
        found.append(_table("published results, and this policy", ["policy", *summary["tiers"], "Avg"], listed))
    for tier, columns, changed in variants(summary, f"{policy} (this)"):
        found.append(_table(f"{tier}, and variants of it", ["policy", *columns], changed))
    return found


def own_rates(benchmark: Mapping[str, Any]) -> list[float | None]:
    """This policy's success in percent for each tier, and its average. None if results of a task are missing."""
    tiers = [
        tier["pc_success"] if tier["n_tasks"] == tier["n_tasks_of"] else None for tier in benchmark["tiers"].values()
    ]
    return [*tiers, benchmark["tier_average"] and benchmark["tier_average"]["pc_success"]]


def variants(benchmark: Mapping[str, Any], this: str = "this policy") -> list[tuple[str, list[str], list[Row]]]:
    """A table for each tier with results on a variant: the tier's name, the columns, and rows of success in percent."""
    found = benchmark.get("variants") or {}
    tables = []
    for position, (tier, original) in enumerate(benchmark["tiers"].items()):
        if not any(rates[tier]["n_episodes"] for rates in found.values()):
            continue
        policies: dict[str, dict[str, float]] = {}
        for entry in benchmark["published"]:
            if entry.get("variant") in found and entry["tiers"]:
                policies.setdefault(entry["policy"], {})[entry["variant"]] = entry["tiers"][position]
        rows: list[Row] = [
            [policy, None, *(rates.get(variant) for variant in found)] for policy, rates in policies.items()
        ]
        rows.append([this, original["pc_success"], *(rates[tier]["pc_success"] for rates in found.values())])
        tables.append((tier, ["unchanged", *found], rows))
    return tables


def _table(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == "policy" else "right")
    for name, *rates in rows:
        table.add_row(str(name), *("" if rate is None else f"{rate:.1f}" for rate in rates))
    return table


def _videos(episodes: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The episodes with a video, and each video as a data URL, or as a link beyond `MOST_EMBEDDED` bytes."""
    found, remaining = [], MOST_EMBEDDED
    for episode in episodes:
        path = folder / episode["video_path"] if episode["video_path"] else None
        if path is None or not path.is_file():
            continue
        remaining -= path.stat().st_size
        source = episode["video_path"]
        if remaining >= 0:
            source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
        found.append({"episode": episode, "source": source})
    return found


def _lengths(episodes: Sequence[Mapping[str, Any]]) -> str:
    """Histogram of episode lengths, with unsuccessful episodes stacked on successful ones."""
    lengths = [episode["length"] for episode in episodes]
    if not lengths:
        return ""
    edges = np.histogram_bin_edges(lengths, bins=min(20, max(5, len(lengths) // 3)))
    won = np.histogram([episode["length"] for episode in episodes if episode["success"]], edges)[0]
    lost = np.histogram([episode["length"] for episode in episodes if not episode["success"]], edges)[0]
    return _histogram(edges.tolist(), won.tolist(), lost.tolist())


def _histogram(edges: Sequence[float], counts: Sequence[int], above: Sequence[int] = ()) -> str:
    """Bars [n] between edges [n + 1], with optional bars stacked above, as SVG."""
    width, height, foot, head = 480, 150, 22, 14
    above = list(above) or [0] * len(counts)
    tallest = max(1, *(a + b for a, b in zip(counts, above, strict=True)))
    step = width / len(counts)
    scale = (height - foot - head) / tallest
    parts = []
    for i, (low, high) in enumerate(zip(counts, above, strict=True)):
        x, base = i * step + 1, float(height - foot)
        for count, kind in ((low, "one"), (high, "two")):
            if count:
                base -= count * scale
                parts.append(
                    f'<rect class="{kind}" x="{x:.1f}" y="{base:.1f}" width="{step - 2:.1f}" '
                    f'height="{count * scale:.1f}" rx="2"><title>{count}: {edges[i]:.4g} to {edges[i + 1]:.4g}'
                    "</title></rect>"
                )
        if low + high:
            parts.append(
                f'<text x="{x + step / 2 - 1:.1f}" y="{base - 4:.1f}" text-anchor="middle">{low + high}</text>'
            )
    for i, anchor in ((0, "start"), (len(counts) // 2, "middle"), (len(counts), "end")):
        parts.append(f'<text x="{i * step:.1f}" y="{height - 6}" text-anchor="{anchor}">{_number(edges[i])}</text>')
    line = f'<line x1="0" x2="{width}" y1="{height - foot + 0.5}" y2="{height - foot + 0.5}"/>'
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">{line}{"".join(parts)}</svg>'


def _number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and without an exponent; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
