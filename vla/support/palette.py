"""Colours of all figures."""

INK, SOFT, LINE = "#16202c", "#5c6b7c", "#dfe4ea"  # text, secondary text, axes
ACCENT, WARN = "#0c7d69", "#e09a2b"
