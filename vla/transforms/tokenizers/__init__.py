"""Action tokenizers: normalised action chunks to token rows and back."""
