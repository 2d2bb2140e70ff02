"""Action tokenizers: normalised action chunks to token ids and back."""

from vla.transforms.tokenizers import bins, components, fast, splines  # noqa: F401  (they register themselves)
