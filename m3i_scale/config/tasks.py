"""The configuration of each task, by the key `task`."""

from __future__ import annotations

from m3i_scale.config.classification import Classification
from m3i_scale.config.detection import Detection
from m3i_scale.config.schema import Config, RunConfig
from m3i_scale.config.segmentation import Segmentation

TASKS: dict[str, type[RunConfig]] = {
    "pretraining": Config,
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}
