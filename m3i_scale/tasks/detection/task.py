"""Detection and instance segmentation as a task of the engine."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m3i_scale.cluster.launch import World, drawing, gather_objects
from m3i_scale.config import ConfigError
from m3i_scale.config.detection import Detection, Dino, MaskRcnn
from m3i_scale.data.map_stream import MapStream, Placed
from m3i_scale.engine.agreement import flat
from m3i_scale.engine.files import write_whole
from m3i_scale.engine.task import Values
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.profiling.forward import forward_flops
from m3i_scale.profiling.record import Sketch
from m3i_scale.profiling.trace import without_checkpointing
from m3i_scale.tasks.detection import pictures, sketch
from m3i_scale.tasks.detection.backbones import build_backbone, layer_scales, pretrained_names
from m3i_scale.tasks.detection.batch import Batch
from m3i_scale.tasks.detection.dataset import TestImages, TrainingImages, open_test, open_training
from m3i_scale.tasks.detection.dino import DinoDetector
from m3i_scale.tasks.detection.evaluation import detect, measure
from m3i_scale.tasks.detection.mask_rcnn import MaskRcnnDetector, training_side
from m3i_scale.tasks.detection.networks import build_detector, needs_masks
from m3i_scale.tasks.detection.vitdet import WindowedViT
from m3i_scale.tasks.transfer import TransferTask

log = logging.getLogger(__name__)

_OF_EVALUATION = {"detections", "score_threshold", "checkpoint_layers"}  # settings of a head


class DetectionTask(TransferTask):
    """Mask R-CNN or DINO on COCO's or LVIS's files."""

    config: Detection
    built_whole = True  # transformers' layers write to weights while they are built

    @functools.cached_property
    def training_set(self) -> TrainingImages:
        """What is trained on; what was left out of it is logged."""
        found = self._opened("train", lambda data, masks: open_training(data, masks=masks))
        assert isinstance(found, TrainingImages)
        return found

    @functools.cached_property
    def test_set(self) -> TestImages:
        """What is evaluated."""
        train = self.training_set.file
        found = self._opened("val", lambda data, masks: open_test(data, masks=masks, train=train))
        assert isinstance(found, TestImages)
        if not found.file.annotated:
            log.warning(
                "data.val: %s has no annotation to compare with: an evaluation writes "
                "detections.json and gives no AP", found.file.path,
            )  # fmt: skip
        return found

    def _opened(self, which: str, opened: Any) -> TrainingImages | TestImages:
        config = self.config
        try:
            images, lines = opened(config.data, needs_masks(config.model))
        except ValueError as error:
            raise ConfigError(f"data.{which}: {error}") from error
        if len(images.categories) != config.model.categories:
            raise ConfigError(
                f"{images.file.path} has {len(images.categories)} categories and model.categories "
                f"is {config.model.categories}; set it to {len(images.categories)}"
            )
        for line in lines:
            log.warning("data.%s: %s", which, line)
        return images

    @property
    def tested(self) -> TestImages:
        """The test set."""
        return self.test_set

    def open_stream(self) -> MapStream:
        """Training images; those of validation are opened, too, so that a fault is found now."""
        assert len(self.test_set)
        return self.stream_of(self.training_set)

    def networks(self) -> MaskRcnnDetector | DinoDetector:
        """The detector; a federated loss reads how many images show each category."""
        head = self.config.model.head
        federated = isinstance(head, Dino) and head.federated is not None
        counts = self.training_set.file.image_counts() if federated else None
        return build_detector(self.config.model, self.config.data, counts)

    def title(self, networks: Any) -> str:
        """Backbone and head."""
        return f"{self.config.model.backbone.name} with {self.config.model.head.kind}"

    def rate_factors(self, networks: MaskRcnnDetector | DinoDetector) -> Mapping[str, float]:
        """Layer decay, and factors of offsets."""
        spec = self.config.optimizer
        return layer_scales(
            networks,
            spec.layer_decay,
            deformation=spec.deformation_factor,
            sampling=spec.sampling_factor,
        )

    def initial_names(self, names: Iterable[str]) -> dict[str, str]:
        """Without what only pre-training uses; both backbones of a composite."""
        head = self.config.model.head
        return pretrained_names(names, composite=isinstance(head, Dino) and head.composite)

    def statement(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Seed, batch, augmentation, the data set, and the head's losses."""
        tree = self.config.model_dump(mode="json")
        wanted = (
            "resize", "flip_probability", "without_objects", "least_box", "mean", "std",
            "max_pixels",
        )  # fmt: skip
        data = {key: tree["data"][key] for key in wanted} | {"train": dict(sources[0])}
        head = {k: v for k, v in tree["model"]["head"].items() if k not in _OF_EVALUATION}
        return self.common_statement() | flat("data", data) | flat("model.head", head)

    def flops(self) -> float:
        """Of the backbone, its forward pass three times, at the largest training size.

        Heads are not counted: what they do depends on the objects.
        """
        model, data = self.config.model, self.config.data
        model = model.model_copy(update={"backbone": without_checkpointing(model.backbone)})
        height, width = sketch.padded_size(self.config)

        def run(backbone: Any) -> Any:
            images = torch.zeros(1, 3, height, width)
            if isinstance(backbone, WindowedViT):
                return backbone.feature_map(images)
            return backbone.forward_stages(images)

        return 3 * forward_flops(lambda: build_backbone(model, training_side(data)), run)

    def sketch(self) -> Sketch:
        """At fixed sizes (`sketch`)."""
        config, head = self.config, self.config.model.head
        found = self.sketched(
            sketch.title(config),
            functools.partial(sketch.build, config),
            functools.partial(sketch.run, config),
            sketch.notes(config),
        )
        return sketch.with_layers(found, head) if isinstance(head, Dino) else found

    def prepare(self, batch: Placed, world: World) -> Batch:
        """The batch on the device, with what stochastic depth draws from."""
        data = batch.to(world.device)
        keys = hash_keys(data.position, self.config.seed)
        return replace(data.batch, keys=keys, seed=self.seed_of(batch))

    def forward(self, engine: nn.Module, inputs: Batch) -> dict[str, Tensor]:
        """Run the networks; what they draw is a function of the seed and the first sample."""
        assert inputs.seed is not None
        with drawing(inputs.seed, inputs.images.device):
            outputs: dict[str, Tensor] = engine(inputs)
        return outputs

    def evaluate(self, networks: nn.Module, world: World) -> Values:
        """AP and AR in percent; pictures and all detections go to the run folder."""
        config, images = self.config, self.test_set
        results, left_out = detect(
            networks, images, world,
            batch=config.optimizer.max_micro_batch, workers=config.data.workers,
        )  # fmt: skip
        values: Values = {"left_out": float(left_out)}
        if world.is_main:
            kinds = ["box", "mask"] if images.masks else ["box"]
            for kind in kinds:
                found = measure(images.file, results, kind)
                values |= {name.replace("/", "_"): 100 * v for name, v in found.items() if v >= 0}
            write_whole(config.run_folder / "detections.json", json.dumps(results))
            if not results and isinstance(config.model.head, MaskRcnn):  # DINO gives its best
                log.warning(
                    "no object was found in %d images: no score is above %g, "
                    "model.head.score_threshold", len(images), config.model.head.score_threshold,
                )  # fmt: skip
            self._draw(results, kinds)
        return gather_objects(values, world)[0]

    def _draw(self, results: list[dict[str, Any]], kinds: Sequence[str]) -> None:
        folder, images = self.config.run_folder, self.test_set
        pictures.save_detections(folder / "detections.png", images, results)
        pictures.save_mistakes(folder / "mistakes.png", images, results)
        pictures.save_curves(folder / "precision_recall.png", images.file, results, kinds)
