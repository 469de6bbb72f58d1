"""From the configuration of a task to the task."""

from __future__ import annotations

from m3i_scale.config import Config, RunConfig
from m3i_scale.config.classification import Classification
from m3i_scale.config.detection import Detection
from m3i_scale.config.segmentation import Segmentation
from m3i_scale.tasks.task import SampledTask


def task_of(config: RunConfig) -> SampledTask:
    """The task that a configuration describes."""
    if isinstance(config, Config):
        from m3i_scale.tasks.pretraining import Pretraining

        return Pretraining(config)
    if isinstance(config, Classification):
        from m3i_scale.tasks.classification.probe import ProbeTask
        from m3i_scale.tasks.classification.task import ClassificationTask

        if config.model.frozen:
            return ProbeTask(config)
        return ClassificationTask(config)
    if isinstance(config, Detection):
        from m3i_scale.tasks.detection.task import DetectionTask

        return DetectionTask(config)
    if isinstance(config, Segmentation):
        from m3i_scale.tasks.segmentation.task import SegmentationTask

        return SegmentationTask(config)
    raise TypeError(f"no task has the configuration {type(config).__name__}")
