"""The backbone "tiny-init": the built-in architecture with 0.3 M parameters, for fast tests."""

from vla.model.sources.untrained import SIZES

SIZES["tiny-init"] = (64, 2, [8, 16], 1, 48)
