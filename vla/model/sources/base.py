"""Sources of weights: the interface.

Owns: the base class and the registry of sources. `vla train --backbone NAME` uses the first registered source whose
`probe` accepts the name, else `vla.model.sources.composed`. `vla --plugin MODULE` adds others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from transformers import PreTrainedTokenizerBase

from vla.config import ModelConfig
from vla.model.configuration import VLAConfig
from vla.model.modeling import VLAForActionPrediction
from vla.support.registry import Registry


class Source(ABC):
    """The backbone `name`, with the architecture options of `model`.

    Attributes:
        trained: whether the weights include trained camera embeddings and a state projector, which limit the number of
            cameras and the state dimension.
    """

    trained = False

    def __init__(self, name: str, model: ModelConfig) -> None:
        self.name, self.model = name, model

    @classmethod
    @abstractmethod
    def probe(cls, name: str) -> bool:
        """Whether this source provides `name`. Must be fast: it reads at most small files.

        Raises:
            CheckpointError: a file is damaged.
        """

    @abstractmethod
    def config(self) -> VLAConfig:
        """The architecture. `build_policy` then adds robot, statistics, tokenizer and prompt.

        Raises:
            ConfigError: the source does not support an option or this model.
        """

    @abstractmethod
    def load(self, config: VLAConfig) -> tuple[VLAForActionPrediction, PreTrainedTokenizerBase]:
        """The network and its text tokenizer.

        Raises:
            ConfigError, CheckpointError: weights are missing, damaged or do not fit `config`.
        """


SOURCES: Registry[type[Source]] = Registry("source of weights")
