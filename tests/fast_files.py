"""A FAST tokenizer in the format of physical-intelligence/fast: byte-level BPE of the characters chr(q - min_token)."""

import json

import numpy as np
from tokenizers import ByteLevelBPETokenizer

from vla.transforms.tokenizers.fast import dct_matrix


def publish(folder, chunks, min_token=-354, vocab_size=600):
    """Train a tokenizer on chunks [N, H, D], and write its files."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts(chunks, min_token), vocab_size, show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"scale": 10, "min_token": min_token, "vocab_size": vocab_size, "action_dim": None, "time_horizon": None}
    (folder / "processor_config.json").write_text(json.dumps(values))
    return tokenizer


def texts(chunks, min_token):
    coefficients = np.rint(10 * dct_matrix(chunks.shape[1]) @ chunks).astype(int).reshape(len(chunks), -1)
    return ["".join(chr(q - min_token) for q in row) for row in coefficients]
