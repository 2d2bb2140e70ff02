"""Custom vision towers and sources of weights, registered from outside the package."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.random_models import save_llama
from tests.test_docs import DOCS, block
from vla.config import ModelConfig
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.model.modeling import VLAForActionPrediction
from vla.model.sources.base import SOURCES, Source
from vla.model.sources.checkpoint import NANO
from vla.model.sources.untrained import untrained_config
from vla.model.vision import TOWERS
from vla.policy import Policy, checkpoint


@pytest.fixture(scope="module")
def tower():
    """The module in docs/backbones.md."""
    module = {"__name__": "my_tower"}
    exec(block((DOCS / "backbones.md").read_text(), "file: my_tower.py", "python"), module)
    yield module
    del TOWERS._members["my_convnet"]


@pytest.mark.filterwarnings("ignore:.*has no image_mean")
def test_a_custom_tower_is_composed_saved_and_decoded(tower, tmp_path, facts, observations):
    save_llama(tmp_path / "llama")
    torch.manual_seed(0)
    tower["ConvModel"](tower["ConvConfig"]()).save_pretrained(tmp_path / "eyes")
    model = ModelConfig(backbone=str(tmp_path / "llama"), vision=(str(tmp_path / "eyes"),), horizon=2, bins=31)
    network, processor = build_policy(model, facts)
    assert processor.tokens_per_image == network.tokens_per_image == 4
    assert processor.prefix_ids("reach").count(processor.config.image_token_id) == 2 * 4
    before = Policy(network.eval(), processor).predict(observations(2), ["reach"] * 2)
    checkpoint.save(network, processor, tmp_path / "policy")
    after = Policy.from_pretrained(str(tmp_path / "policy"), device="cpu").predict(observations(2), ["reach"] * 2)
    assert (before.ids == after.ids).all()
    other = Policy(network, processor).predict(observations(2, seed=1), ["reach"] * 2)
    assert (other.log_probs != before.log_probs).any()  # the tokens depend on the images


def test_its_own_check_is_used(tower, tmp_path, facts, monkeypatch):
    def check(name, config):
        raise ConfigError(f"{name} is odd.")

    save_llama(tmp_path / "llama")
    tower["ConvModel"](tower["ConvConfig"]()).save_pretrained(tmp_path / "eyes")
    model = ModelConfig(backbone=str(tmp_path / "llama"), vision=(str(tmp_path / "eyes"),))
    monkeypatch.setattr(tower["Convolutional"], "check", check)
    with pytest.raises(ConfigError, match="eyes is odd"):
        build_policy(model, facts)


def test_a_custom_source_provides_only_its_names(facts, observations):
    @SOURCES.register("zeros")
    class Zeros(Source):
        @classmethod
        def probe(cls, name):
            return name.startswith("zeros:")

        def config(self):
            return untrained_config("nano-init", int(self.name.partition(":")[2]))

        def load(self, config):
            network = VLAForActionPrediction(config)
            for parameter in network.language_model.lm_head.parameters():
                torch.nn.init.zeros_(parameter)
            return network, AutoTokenizer.from_pretrained(NANO)

    try:
        network, processor = build_policy(ModelConfig(backbone="zeros:48", horizon=2, bins=31), facts)
        assert processor.config.image_size == 48 and processor.config.horizon == 2
        prediction = Policy(network.eval(), processor).predict(observations(1), ["reach"])
        assert prediction.log_probs == pytest.approx(-torch.log(torch.tensor(31.0)).item(), abs=1e-5)
        with pytest.raises(ConfigError, match="unknown backbone 'ones:48'"):
            build_policy(ModelConfig(backbone="ones:48"), facts)
    finally:
        del SOURCES._members["zeros"]
