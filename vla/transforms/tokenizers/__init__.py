"""Action tokenizers: normalised action chunks to token ids and back."""

import vla.transforms.tokenizers.bins  # noqa: F401  (registers the tokenizers of this package)
