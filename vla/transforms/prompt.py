"""The prompt of the language model for an instruction.

Owns: reading text values, the named prompt templates, and the cleaning of instructions. Checkpoints store the name of
their template, so the text of a template must never change; new wording needs a new name. It does not know tokens.
"""

from typing import Any

import numpy as np

from vla.errors import ConfigError, unknown

# "openvla" and "openvla-v01" are the prompts of OpenVLA (arXiv:2406.09246) and of its v01 checkpoint. With
# "openvla-verbatim", instructions are only lowercased, as in OpenVLA's own code.
TEMPLATES = {
    "plain": "{instruction}",
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-verbatim": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-v01": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: What action should the robot take to {instruction}?"
        " ASSISTANT:"
    ),
}


def text(value: Any) -> str | None:
    """`value` as a str, or None if it is not text.

    Text is a str, UTF-8 bytes (as in HDF5 and TFDS), or an array that contains one of them.

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
    """Raise ConfigError if there is no template of that name."""
    if template not in TEMPLATES:
        raise ConfigError(unknown("prompt template", template, TEMPLATES))


def build_prompt(instruction: str, template: str) -> str:
    """The language model's prompt: the cleaned instruction in the named template.

    >>> build_prompt("  Pick up the red cube. ", "plain")
    'pick up the red cube'
    """
    check_template(template)
    lower = instruction.lower()
    cleaned = lower if template == "openvla-verbatim" else " ".join(lower.split()).rstrip(".!")
    return TEMPLATES[template].format(instruction=cleaned)
