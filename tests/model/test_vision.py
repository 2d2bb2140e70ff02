"""A kind of vision tower that `vla` does not know: a convolutional network, registered from outside the package."""

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tests.random_models import save_llama
from vla.config import ModelConfig
from vla.errors import ConfigError
from vla.model.build import build_policy
from vla.model.vision import TOWERS, Tower
from vla.policy import Policy, checkpoint


@strict
class ConvConfig(PreTrainedConfig):
    model_type = "toy_convnet"
    hidden_size: int = 24
    image_size: int = 40


class ConvModel(PreTrainedModel):
    """Features [B, 24, 2, 2], whatever the image's size."""

    config_class = ConvConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvConfig) -> None:
        super().__init__(config)
        self.net = nn.Sequential(nn.Conv2d(3, config.hidden_size, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.net(pixel_values))


@pytest.fixture(scope="module", autouse=True)
def registered():
    AutoConfig.register("toy_convnet", ConvConfig)
    AutoModel.register(ConvConfig, ConvModel)

    @TOWERS.register("toy_convnet")
    class Convolutional(Tower):
        any_size = True

        @classmethod
        def check(cls, name, config):
            if config.hidden_size % 2:
                raise ConfigError(f"{name} is odd.")

        @classmethod
        def tokens_per_image(cls, config, image_size):
            return 4

        @classmethod
        def features(cls, tower, images, layer):
            return tower(pixel_values=images).last_hidden_state.flatten(2).transpose(1, 2)

    yield
    del TOWERS._members["toy_convnet"]


@pytest.mark.filterwarnings("ignore:.*comes without image_mean")
def test_a_tower_of_another_kind_is_composed_saved_and_decoded(tmp_path, facts, observations):
    save_llama(tmp_path / "llama")
    torch.manual_seed(0)
    ConvModel(ConvConfig()).save_pretrained(tmp_path / "eyes")
    model = ModelConfig(backbone=str(tmp_path / "llama"), vision=(str(tmp_path / "eyes"),), horizon=2, bins=31)
    network, processor = build_policy(model, facts)
    assert processor.tokens_per_image == network.tokens_per_image == 4
    assert processor.prefix_ids("reach").count(processor.config.image_token_id) == 2 * 4
    before = Policy(network.eval(), processor).predict(observations(2), ["reach"] * 2)
    checkpoint.save(network, processor, tmp_path / "policy")
    after = Policy.from_pretrained(str(tmp_path / "policy"), device="cpu").predict(observations(2), ["reach"] * 2)
    assert (before.ids == after.ids).all()
    other = Policy(network, processor).predict(observations(2, seed=1), ["reach"] * 2)
    assert (other.log_probs != before.log_probs).any()  # the images matter


def test_its_own_check_is_asked(tmp_path, facts):
    save_llama(tmp_path / "llama")
    ConvModel(ConvConfig(hidden_size=25)).save_pretrained(tmp_path / "eyes")
    model = ModelConfig(backbone=str(tmp_path / "llama"), vision=(str(tmp_path / "eyes"),))
    with pytest.raises(ConfigError, match="eyes is odd"):
        build_policy(model, facts)
