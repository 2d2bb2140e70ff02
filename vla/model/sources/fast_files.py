"""FAST tokenizers as their authors publish them, such as `physical-intelligence/fast`.

Owns: reading `tokenizer.json` and `processor_config.json`, and their conversion to `Fast`. In these files, a
coefficient q is the character chr(q - min_token), and BPE works on the bytes of these characters. A piece may end
within a character; `Fast` has no such pieces, so these are omitted, and ids are assigned anew. Otherwise, a chunk has
the same pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders
from transformers.utils import cached_file

from vla.errors import ConfigError
from vla.model.sources.hub import errors_as, read_json
from vla.support.locations import missing_folder
from vla.transforms.tokenizers.fast import Coefficients, Fast

_FILES = ("tokenizer.json", "processor_config.json")


def is_published(name: str) -> bool:
    """Whether `name` is a path or hub id instead of the name of a registered tokenizer."""
    return "/" in name or Path(name).is_dir()


def load_fast(name: str, horizon: int, action_dim: int, n_ids: int, active: Sequence[int] | None = None) -> Fast:
    """The tokenizer in the folder or hub id `name`, with its first pieces up to `n_ids` ids.

    Raises:
        ConfigError: the files do not exist, are damaged or do not describe a FAST tokenizer, or `n_ids` is too small.
    """
    if problem := missing_folder(name):
        raise ConfigError(f"no action tokenizer {name!r}: {problem}")
    with errors_as(ConfigError, f"{name!r} is not a FAST tokenizer"):
        files = [Path(cached_file(name, file)) for file in _FILES]
        values = {"scale": 10.0} | read_json(files[1])
        if "min_token" not in values:
            raise ConfigError(f"{name!r} is not a FAST tokenizer: {_FILES[1]} has no min_token.")
        Tokenizer.from_file(str(files[0]))  # raises if the file is damaged
        merges = read_json(files[0])["model"]["merges"]
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        return Fast.from_pieces(
            horizon, action_dim, values["scale"], _read(pairs, int(values["min_token"])), n_ids, active
        )


def _read(pairs: Sequence[Sequence[str]], min_token: int) -> list[tuple[Coefficients, ...]]:
    """The coefficients of the two parts of each merge. Merges with a part of an incomplete character are omitted."""
    decoder = decoders.ByteLevel()
    texts = ([decoder.decode([part]) for part in pair] for pair in pairs)
    whole = [pair for pair in texts if not any("\ufffd" in text for text in pair)]
    return [tuple(tuple(ord(character) + min_token for character in text) for text in pair) for pair in whole]
