"""Action tokenizers: normalised action chunks to token ids and back."""
