"""Policies on the Hugging Face hub: the model card, and the upload of a folder.

Owns: the text of the card, and the upload in a single commit: a repository never has one policy's config.json with
the weights of another, even if the upload is interrupted. It does not know how a policy is written.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vla.errors import ConfigError, ServerError
from vla.model.configuration import VLAConfig

FRONT_MATTER = """---
library_name: vla
pipeline_tag: robotics
tags: [robotics, vision-language-action, action-tokens]
---
"""


def model_card(config: VLAConfig, name: str, parameters: int, training: str = "") -> str:
    """The model card (README.md): what the policy observes and does, how to use it, and its training data.

    Args:
        name: name of the policy, "owner/name" if it is a repository of the hub.
        parameters: number of weights.
        training: how the policy was trained, as in the card of a run's policy.
    """
    robot, tokenizer = config.robot_spec, config.make_action_tokenizer()
    keys = list(config.statistics)
    state = ", ".join(robot.state_names) if config.use_state and robot.state_names else "none"
    rows = {
        "images": f"{', '.join(robot.cameras) or 'none'}; resized to {config.image_size} px ({config.image_transform})",
        "state": state,
        "actions": f"{', '.join(robot.action_names)}; {robot.action_space}, {robot.control_hz:g} Hz",
        "chunk": f"{config.horizon} actions, {config.n_action_steps} of them executed",
        "action tokens": f"{tokenizer.vocab_size}, `{tokenizer.name}`; normalisation `{config.normalization}`",
        "network": f"{parameters / 1e6:.1f} M parameters; {config.text_config.model_type} decoder",
        "unnorm_key": ", ".join(f"`{key}`" + _size(config.statistics[key]) for key in keys),
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    pixels = ", ".join(f'"{camera}": {camera.replace(".", "_")}_image' for camera in robot.cameras)
    proprioception = ', "agent_pos": state' if state != "none" else ""
    key = f', unnorm_key="{keys[0]}"' if len(keys) > 1 else ""
    return f"""{FRONT_MATTER}
# {name}

A vision-language-action policy: from camera images, state and an instruction, it predicts chunks of actions as tokens.

| | |
|---|---|
{table}

## Use

```python
from vla import Policy

policy = Policy.from_pretrained("{name}"{key})
observation = {{"pixels": {{{pixels}}}{proprioception}}}  # uint8 RGB [height, width, 3], float32
chunk = policy.predict_chunk(observation, "{{instruction}}")  # [{config.horizon}, {robot.action_dim}], robot's units
```

`vla serve --policy {name}{f" --unnorm-key {keys[0]}" if key else ""}` serves it to a robot.
""" + (f"\n## Training\n\n{training}\n" if training else "")


def training_note(folder: Path | None) -> str:
    """The paragraph on training in the card of a policy folder; "" if there is none."""
    card = folder / "README.md" if folder else None
    found = re.search(r"^Trained by .+$", card.read_text(), re.MULTILINE) if card and card.is_file() else None
    return found[0] if found else ""


def check_push(repository: str) -> None:
    """Raise ConfigError if `repository` is not an "owner/name", or if nobody is logged in to the hub."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"push: {error}") from None
    if "/" not in repository:
        raise ConfigError(f"push must be 'owner/name', got {repository!r}.")
    if is_offline_mode():
        raise ConfigError("push needs the hub, but HF_HUB_OFFLINE is set. Unset it.")
    if get_token() is None:
        raise ConfigError("push needs a token of the hub. Log in with `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, repository: str) -> str:
    """Make the contents of a repository equal to those of `folder`, and return its address.

    A repository that does not exist is created, as a private one. `upload_folder` of huggingface_hub would use several
    commits, and leave the weights of an earlier policy in place.

    Raises:
        ServerError: the hub cannot be reached or refuses.
    """
    api = HfApi(library_name="vla")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        stale = set(api.list_repo_files(repository)) - {*files, ".gitattributes"}
        operations = [
            *(CommitOperationDelete(name) for name in sorted(stale)),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ]
        api.create_commit(repository, operations, commit_message="Upload a policy of vla")
    except Exception as error:  # of the hub's client and of its HTTP library
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ServerError(
            f"cannot push to {repository}: {error}{cause}\nThe upload is one commit, so the repository is "
            f"unchanged or complete. {folder} is complete; repeat the command with --overwrite."
        ) from error
    return str(address)


def _size(statistics: dict) -> str:
    counts = [f"{statistics[f'num_{what}']} {what}" for what in ("episodes", "frames") if f"num_{what}" in statistics]
    return f" ({', '.join(counts)})" if counts else ""
