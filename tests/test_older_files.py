"""Files of version 0.1.0, written before its modules moved, still load with the same meaning."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from vla import config
from vla.data.reader import Demonstrations
from vla.errors import ConfigError
from vla.jobs.collect import collect
from vla.policy import Policy

FIXTURES = Path(__file__).parent / "data" / "fixtures"
RENAMED = {
    "deploy": {"control.seam": "control.transition", "control.trust": "control.prefix_threshold"},
    "train": {"augment.committed": "augment.prefix"},
    "dagger": {"train.augment.committed": "train.augment.prefix"},
}


def test_a_dataset_equals_a_new_collection(tmp_path):
    old = FIXTURES / "demonstrations_0_1_0"
    demos = Demonstrations(old)
    assert [episode.instruction for episode in demos.episodes] and demos.num_frames == 10
    again = dataclasses.replace(config.load(config.CollectConfig, old / "collect.yaml"), out=tmp_path / "today")
    today = Demonstrations(collect(again))
    assert [e.instruction for e in today.episodes] == [e.instruction for e in demos.episodes]
    np.testing.assert_array_equal(today.actions, demos.actions)
    np.testing.assert_array_equal(today.states, demos.states)


def test_a_checkpoint_decodes_the_same_tokens():
    policy = Policy.from_pretrained(str(FIXTURES / "checkpoint_0_1_0"), device="cpu")
    image = (np.arange(32 * 32 * 3) % 251).astype(np.uint8).reshape(32, 32, 3)
    observation = {"pixels": {"front": image}, "agent_pos": np.array([0.25, -1.0], np.float32)}
    expected = json.loads((FIXTURES / "checkpoint_0_1_0_expected.json").read_text())
    predicted = policy.predict([observation] * 2, ["go to the red goal", "close it"])
    assert predicted.ids.tolist() == expected["ids"]
    np.testing.assert_allclose(predicted.chunks, expected["chunks"], atol=1e-6)


@pytest.mark.parametrize("path", sorted((FIXTURES / "configs_0_1_0").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_read(path, tmp_path):
    """New fields may have been added, and renamed ones are rejected with their new names. All other values are kept."""
    cls = getattr(config, f"{path.stem.capitalize()}Config")
    old = yaml.safe_load(path.read_text())
    for keys, new in RENAMED.get(path.stem, {}).items():
        with pytest.raises(ConfigError, match=rf"{re.escape(keys)} is now called {re.escape(new)}\."):
            config.load(cls, path)
        *parents, last = keys.split(".")
        inner = functools.reduce(dict.__getitem__, parents, old)
        inner[new.rpartition(".")[2]] = inner.pop(last)
        path = tmp_path / "renamed.yaml"
        path.write_text(yaml.safe_dump(old))
    assert merged(config.to_dict(config.load(cls, path)), old) == config.to_dict(config.load(cls, path))


def merged(values: dict, changes: dict) -> dict:
    assert changes.keys() <= values.keys()
    both = {key: merged(values[key], new) if isinstance(new, dict) and new else new for key, new in changes.items()}
    return values | both
