"""The configuration: one strict, typed, immutable tree, and how it is read."""

from m3i_scale.config.load import dump_config, load_config
from m3i_scale.config.objective import Balance, Boltzmann, Gaussian, Input, Objective, Target
from m3i_scale.config.schema import (
    Augmentation,
    Backbone,
    Checkpoint,
    Config,
    Data,
    Decoder,
    Engine,
    GlobalHead,
    Logging,
    Model,
    Optimizer,
    Photometric,
    Source,
    Storage,
    TextTower,
    Zero,
)
from m3i_scale.config.types import ConfigError, Count, Duration, Node

__all__ = [
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
    "Gaussian",
    "GlobalHead",
    "Input",
    "Logging",
    "Model",
    "Node",
    "Objective",
    "Optimizer",
    "Photometric",
    "Source",
    "Storage",
    "Target",
    "TextTower",
    "Zero",
    "dump_config",
    "load_config",
]
