"""Configuration: one frozen dataclass per job, read strictly from YAML, overridden by flags.

Owns: the fields, types, limits and defaults of every job, and reading them from YAML (precedence: default < YAML <
flag). It does not know how the jobs use the values. `vla.preflight` checks whether named files and environments exist.
"""

from vla.config.data import AdapterConfig, CollectConfig, HostsConfig, InspectConfig, ReplayConfig
from vla.config.deployment import (
    ControlConfig,
    DeployConfig,
    DoctorConfig,
    ExportConfig,
    KeysConfig,
    SafetyConfig,
    ServeConfig,
)
from vla.config.evaluation import (
    GREEDY,
    BenchmarkConfig,
    DecodingConfig,
    ExposureConfig,
    LatentConfig,
    RolloutConfig,
    TokenizersConfig,
)
from vla.config.files import dump, from_dict, load, to_dict
from vla.config.limits import Dtype, check
from vla.config.training import AugmentConfig, DaggerConfig, LoraConfig, ModelConfig, QuickstartConfig, TrainConfig

__all__ = [
    "GREEDY",
    "AdapterConfig",
    "AugmentConfig",
    "BenchmarkConfig",
    "CollectConfig",
    "ControlConfig",
    "DaggerConfig",
    "DecodingConfig",
    "DeployConfig",
    "DoctorConfig",
    "Dtype",
    "ExportConfig",
    "ExposureConfig",
    "HostsConfig",
    "InspectConfig",
    "KeysConfig",
    "LatentConfig",
    "LoraConfig",
    "ModelConfig",
    "QuickstartConfig",
    "ReplayConfig",
    "RolloutConfig",
    "SafetyConfig",
    "ServeConfig",
    "TokenizersConfig",
    "TrainConfig",
    "check",
    "dump",
    "from_dict",
    "load",
    "to_dict",
]
