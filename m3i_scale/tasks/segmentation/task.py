"""Semantic segmentation as a task of the engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import (
    Mask2Former,
    MaskedImages,
    Segmentation,
    SegmentationEvaluation,
    UperNet,
)
from m3i_scale.data.map_stream import MapStream, Placed
from m3i_scale.engine.agreement import flat
from m3i_scale.engine.files import write_whole
from m3i_scale.engine.task import Values
from m3i_scale.models.layer_decay import layer_scales
from m3i_scale.models.precision import DTYPES
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.profiling.record import Sketch
from m3i_scale.tasks.segmentation import sketch
from m3i_scale.tasks.segmentation.augmentation import TrainingCrop
from m3i_scale.tasks.segmentation.build import build_networks, segmenter_flops
from m3i_scale.tasks.segmentation.dataset import SegmentationSet, read_class_names
from m3i_scale.tasks.segmentation.evaluation import evaluate
from m3i_scale.tasks.segmentation.inference import Planner
from m3i_scale.tasks.segmentation.networks import Inputs, Segmenter, inputs_of
from m3i_scale.tasks.segmentation.pictures import save_pictures
from m3i_scale.tasks.transfer import TransferTask

# What of `data` the loss depends on; the folders are told by what is in them.
_STATED = (
    "augmentation", "crop", "mean", "std", "max_pixels", "zero_is_unlabelled",
)  # fmt: skip


class SegmentationTask(TransferTask):
    """UperNet or Mask2Former on a backbone, trained on images with masks."""

    built_whole = True  # transformers' initialisation writes to whole weights
    config: Segmentation

    def networks(self) -> Segmenter:
        """The backbone and its head."""
        return build_networks(self.config.model, self.config.data.crop)

    def title(self, networks: Segmenter) -> str:
        """The head and the backbone."""
        return f"{self.config.model.head.kind} on {self.config.model.backbone.name}"

    def rate_factors(self, networks: Segmenter) -> Mapping[str, float]:
        """Layer decay."""
        return layer_scales(networks, self.config.optimizer.layer_decay)

    def statement(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Seed, batch, the data set and what is done to it, the head."""
        tree = self.config.model_dump(mode="json")
        data = {key: tree["data"][key] for key in _STATED} | {"train": dict(sources[0])}
        return (
            self.common_statement() | flat("data", data) | flat("model.head", tree["model"]["head"])
        )

    def flops(self) -> float:
        """The forward pass three times."""
        return 3 * segmenter_flops(self.config.model, self.config.data.crop)

    def sketch(self) -> Sketch:
        """The whole loss; of Mask2Former with a fixed number of masks (`sketch`)."""
        config, model = self.config, self.config.model
        notes = []
        if isinstance(model.head, Mask2Former):
            notes.append(f"{sketch.masks_of(config)} masks of an image in the losses; no matching")
        return self.sketched(
            f"{model.head.kind} on {model.backbone.name}, {config.data.crop} pixels",
            functools.partial(sketch.build, config),
            functools.partial(sketch.run, config),
            notes,
        )

    # ---------------------------------------------------------------------------------- samples

    def open_stream(self) -> MapStream:
        """Training images; all else is opened, too, so that a fault is found now."""
        data = self.config.data
        _require_gpus_of_norm(self.config)
        train = self._open("train", data.train, TrainingCrop(data))
        assert self.names
        assert data.test is None or len(self.test_set)
        return self.stream_of(train)

    @property
    def tested(self) -> SegmentationSet | None:
        """The test set, if there is one."""
        return None if self.config.data.test is None else self.test_set

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the classes."""
        return read_class_names(self.config.data.class_names, self.config.model.classes)

    @functools.cached_property
    def test_set(self) -> SegmentationSet:
        """What is tested on."""
        assert self.config.data.test is not None
        return self._open("test", self.config.data.test)

    def _open(
        self, which: str, files: MaskedImages, augment: TrainingCrop | None = None
    ) -> SegmentationSet:
        spec = self.config
        return SegmentationSet(files, spec.data, spec.model.classes, augment, f"data.{which}")

    # ----------------------------------------------------------------------------- around a step

    def prepare(self, batch: Placed, world: World) -> Inputs:
        """Move a batch to the device and normalise it."""
        spec, placed = self.config, batch.to(world.device)
        keys = hash_keys(placed.position, spec.seed)
        return inputs_of(placed.batch, spec.data, DTYPES[spec.engine.precision], keys)

    @property
    def evaluation(self) -> SegmentationEvaluation | None:
        """At the end and at intervals, if there is something to test on."""
        return None if self.config.data.test is None else self.config.evaluation

    def evaluate(self, networks: Any, world: World) -> Values:
        """mIoU and accuracies in percent; a table and pictures go to the run folder."""
        spec = self.config
        dtype = DTYPES[spec.engine.precision]
        multiple = networks.module.multiple if hasattr(networks, "module") else networks.multiple
        planner = Planner(spec.evaluation, spec.data, multiple, world.device, dtype)
        pictures = spec.evaluation.pictures
        result = evaluate(networks, self.test_set, self.names, planner, world, pictures)
        if world.is_main:
            folder = spec.run_folder / "evaluation"
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result.table(), indent=1, allow_nan=False)
            write_whole(folder / "segmentation.json", text)
            if pictures:
                save_pictures(folder, result, self.test_set.name)
        counts = ("images", "left_out")
        return {n: v if n in counts else 100 * v for n, v in result.figures().items()}


def _require_gpus_of_norm(spec: Segmentation) -> None:
    head = spec.model.head
    on_gpu = spec.engine.device != "cpu" and torch.cuda.is_available()
    if isinstance(head, UperNet) and head.norm == "sync_batch" and not on_gpu:
        raise ConfigError(
            "model.head.norm sync_batch works on GPUs only; set model.head.norm: group"
        )
