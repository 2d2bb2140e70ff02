"""Transforms between robot data and tokens: images, prompts, normalisation, chunks and action tokenizers."""
