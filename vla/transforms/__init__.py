"""Transforms between robot data and tokens: images, prompts, normalisation, chunks, action tokenizers. No models."""
