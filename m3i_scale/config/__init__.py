"""The configuration: one strict, typed, immutable tree, and how it is read."""

from m3i_scale.config.data import (
    MAX_PIXELS,
    Augmentation,
    Data,
    MixedSize,
    Photometric,
    Source,
    SourceKind,
    Storage,
)
from m3i_scale.config.likelihoods import Boltzmann, Gaussian, Sigmoid
from m3i_scale.config.load import dump_config, load_config, load_run
from m3i_scale.config.model import (
    Backbone,
    Decoder,
    FrozenTeacher,
    GlobalHead,
    Model,
    TextTower,
)
from m3i_scale.config.objective import Balance, Input, Objective
from m3i_scale.config.schema import (
    Checkpoint,
    Config,
    Engine,
    Logging,
    Optimizer,
    PretrainingOptimizer,
    RunConfig,
    Verify,
    Zero,
)
from m3i_scale.config.target import Target
from m3i_scale.config.types import ConfigError, Count, Duration, Node, PathText

__all__ = [
    "MAX_PIXELS",
    "Augmentation",
    "Backbone",
    "Balance",
    "Boltzmann",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Count",
    "Data",
    "Decoder",
    "Duration",
    "Engine",
    "FrozenTeacher",
    "Gaussian",
    "GlobalHead",
    "Input",
    "Logging",
    "MixedSize",
    "Model",
    "Node",
    "Objective",
    "Optimizer",
    "PathText",
    "Photometric",
    "PretrainingOptimizer",
    "RunConfig",
    "Sigmoid",
    "Source",
    "SourceKind",
    "Storage",
    "Target",
    "TextTower",
    "Verify",
    "Zero",
    "dump_config",
    "load_config",
    "load_run",
]
