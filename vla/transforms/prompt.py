"""Instruction -> prompt.

Owns: which values are texts, the prompt templates, by name, and how an instruction is cleaned before it enters one. A
template's name is stored in the checkpoint and its text never changes: a new wording gets a new name. It does not know
tokens.
"""

from typing import Any

import numpy as np

from vla.errors import ConfigError, unknown

TEMPLATES = {
    "plain": "{instruction}",
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-v01": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: What action should the robot take to {instruction}?"
        " ASSISTANT:"
    ),
}


def text(value: Any) -> str | None:
    """The text that `value` is: a str, UTF-8 bytes (as HDF5 and TFDS store it), or an array of one of them; else None.

    >>> text(np.array([b"push the block"]))
    'push the block'
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return str(value) if isinstance(value, str) else None


def check_template(template: str) -> None:
    """Raise ConfigError for a template name that does not exist."""
    if template not in TEMPLATES:
        raise ConfigError(unknown("prompt template", template, TEMPLATES))


def build_prompt(instruction: str, template: str) -> str:
    """The text given to the language model.

    >>> build_prompt("  Pick up the red cube. ", "plain")
    'pick up the red cube'
    """
    check_template(template)
    cleaned = " ".join(instruction.lower().split()).rstrip(".!")
    return TEMPLATES[template].format(instruction=cleaned)
