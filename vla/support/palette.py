"""Colours of all figures, and the style of their axes."""

from matplotlib.axes import Axes

INK, SOFT, LINE = "#16202c", "#5c6b7c", "#dfe4ea"  # text, secondary text, axes
ACCENT, WARN = "#0c7d69", "#e09a2b"


def dress(axis: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of a plot, and the style of its axes."""
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=8.5, color=SOFT)
    axis.set_ylabel(y, fontsize=8.5, color=SOFT)
    axis.tick_params(labelsize=8, colors=SOFT)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(LINE)
