"""Figures of a dataset: action histograms, camera images and episode lengths.

Owns: the figures of `vla inspect`. It does not know where they are saved.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.markers import TICKDOWN
from matplotlib.ticker import MaxNLocator

from vla.data.reader import Demonstrations
from vla.support.palette import ACCENT, INK, LINE, SOFT, WARN
from vla.transforms.normalize import Normalizer

MOMENTS = ("start", "25 %", "50 %", "75 %", "end")
_BARS = 61
_COLUMNS = 4
_FEW = 40  # bins; with fewer bins, edges are drawn thicker
_COMB = 6  # points; height of the bin-edge ticks below a chart


def action_histograms(demos: Demonstrations, normalizer: Normalizer, bins: int) -> Figure:
    """One histogram per action dimension that moves, with clipped values in colour and the bin edges below."""
    names = demos.robot.action_names
    edges = normalizer.unnormalize(np.linspace(-1, 1, bins + 1)[:, None].repeat(len(names), 1))
    moving = np.flatnonzero(~normalizer.constant)
    if not len(moving):
        moving = np.arange(len(names))
    columns = min(_COLUMNS, len(moving))
    rows = -(-len(moving) // columns)
    figure = Figure(
        figsize=(12.4 / max(columns, 3) * columns, 2.4 * rows + 0.35),
        layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.03),
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(moving) :]:
        axis.set_visible(False)
    for axis, entry in zip(axes, moving, strict=False):
        _histogram(axis, names[entry], demos.actions[:, entry], edges[:, entry])
    handles = [
        axes[0].plot([], [], color=ACCENT, lw=6)[0],
        axes[0].plot([], [], color=WARN, lw=6)[0],
        axes[0].plot([], [], color=INK, lw=1, ls=(0, (4, 3)))[0],
    ]
    labels = ["frames (logarithmic)", "clipped by the bins", "first and last bin edge"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, labelcolor=SOFT)
    return figure


def camera_strip(images: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """A contact sheet with one row per episode and one column for each of `MOMENTS`.

    Args:
        images: for each episode, one image per moment, uint8 [H, W, 3].
        titles: the label of each row.
    """
    height, width = images[0][0].shape[:2]
    cell = 1.55
    tall = cell * height / width
    figure = Figure(figsize=(2.0 + cell * len(MOMENTS), tall * len(images) + 0.35))
    grid = figure.add_gridspec(
        len(images), len(MOMENTS), left=2.0 / figure.get_figwidth(), right=0.995, bottom=0.005,
        top=1 - 0.3 / figure.get_figheight(), wspace=0.03, hspace=0.03 * width / height,
    )  # fmt: skip
    for row, (frames, title) in enumerate(zip(images, titles, strict=True)):
        for column, frame in enumerate(frames):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(frame, interpolation="nearest" if width < 160 else "antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(MOMENTS[column], fontsize=9, color=SOFT, pad=5)
            if column == 0:
                head, _, rest = title.partition("\n")
                text = "\n".join(textwrap.wrap(rest, 23)[: max(1, int(tall / 0.17) - 1)])
                axis.text(-0.06, 1.0, head, transform=axis.transAxes, ha="right", va="top", fontsize=9,
                          color=INK, weight="bold")  # fmt: skip
                axis.text(-0.06, 1 - 0.19 / tall, text, transform=axis.transAxes, ha="right", va="top", fontsize=8.5,
                          color=SOFT, linespacing=1.25)  # fmt: skip
    return figure


def length_histogram(demos: Demonstrations) -> Figure:
    """Histogram of the episode lengths."""
    lengths = np.array([episode.length for episode in demos.episodes])
    figure = Figure(figsize=(6.4, 2.0), layout="constrained")
    axis = figure.subplots()
    spread = int(np.ptp(lengths)) + 1
    bins = np.linspace(lengths.min() - 0.5, lengths.max() + 0.5, min(40, spread) + 1).tolist()
    axis.hist(lengths, bins=bins, color=ACCENT, rwidth=0.9 if spread > 1 else 0.2)
    axis.axvline(np.median(lengths), color=INK, lw=1, ls=(0, (4, 3)))
    axis.set_xlabel(f"frames (median {np.median(lengths):.0f}, {np.median(lengths) / demos.fps:.1f} s)", fontsize=9)
    axis.set_ylabel("episodes", fontsize=9)
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if spread == 1:
        axis.set_xlim(lengths[0] - 5, lengths[0] + 5)
    _style(axis)
    return figure


def _histogram(axis: Axes, name: str, values: np.ndarray, edges: np.ndarray) -> None:
    _style(axis)
    axis.set_title(name, fontsize=10, color=INK, loc="left", weight="bold")
    first, last = float(edges[0]), float(edges[-1])
    low, high = min(values.min(), first), max(values.max(), last)
    margin = 0.04 * (high - low)
    counts, borders = np.histogram(values, bins=_BARS, range=(low, high))
    centres = (borders[1:] + borders[:-1]) / 2
    colours = [WARN if not first <= centre <= last else ACCENT for centre in centres]
    axis.bar(centres, counts, width=0.92 * (borders[1] - borders[0]), color=colours, log=True)
    axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(0.6, max(counts.max() * 1.7, 10))
    for edge in (first, last):
        axis.axvline(edge, color=INK, lw=0.9, ls=(0, (4, 3)))
    # Draw bin edges as ticks below the bars. Their height in points is independent of the figure size.
    axis.plot(edges, np.zeros(len(edges)), ls="none", marker=TICKDOWN, ms=_COMB, color=SOFT, clip_on=False,
              mew=0.8 if len(edges) < _FEW else 0.25, transform=axis.get_xaxis_transform())  # fmt: skip
    axis.tick_params(axis="x", pad=_COMB + 3)
    axis.minorticks_off()
    outside = np.mean((values < first - 1e-6) | (values > last + 1e-6))
    axis.set_title(f"{outside:.1%} clipped" if outside else "", fontsize=8.5, color=SOFT, loc="right")


def _style(axis: Axes) -> None:
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(LINE)
    axis.tick_params(colors=SOFT, labelsize=8, length=0)
    axis.grid(axis="y", color=LINE, lw=0.6)
    axis.set_axisbelow(True)
    axis.xaxis.label.set_color(SOFT)
    axis.yaxis.label.set_color(SOFT)
