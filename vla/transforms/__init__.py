"""Between a robot's data and tokens: images, prompts, normalisation, chunks, action tokenizers. No models."""
