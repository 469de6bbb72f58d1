"""Classification as a task of the engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.cluster.launch import World, drawing
from m3i_scale.config import ConfigError
from m3i_scale.config.classification import Classification, ClassificationData, ImageAugmentation
from m3i_scale.data.map_stream import MapStream, Placed
from m3i_scale.engine.agreement import flat
from m3i_scale.engine.files import write_whole
from m3i_scale.engine.task import Values
from m3i_scale.models.layer_decay import layer_scales
from m3i_scale.models.precision import DTYPES
from m3i_scale.models.stochastic_depth import hash_keys
from m3i_scale.profiling.forward import backbone_flops
from m3i_scale.profiling.record import ROWS, Sketch
from m3i_scale.profiling.trace import without_checkpointing
from m3i_scale.tasks.classification.evaluation import confusion
from m3i_scale.tasks.classification.images import LabelledSet, Transform, open_images
from m3i_scale.tasks.classification.networks import ClassificationNetworks, Inputs
from m3i_scale.tasks.transfer import TransferTask, empty_images


class ClassificationTask(TransferTask):
    """Fine-tuning with RandAugment, MixUp and CutMix."""

    config: Classification

    def __init__(self, config: Classification) -> None:
        super().__init__(config)
        self._mix = mixing(config.data.augmentation, config.model.classes)

    def networks(self) -> nn.Module:
        """A backbone with a linear classifier."""
        return ClassificationNetworks(self.config.model)

    def rate_factors(self, networks: nn.Module) -> Mapping[str, float]:
        """Layer decay."""
        spec = self.config.optimizer
        return layer_scales(networks, spec.layer_decay, deformation=spec.deformation_factor)

    def statement(self, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Seed, batch, augmentation, the data set and the networks' sizes."""
        tree = self.config.model_dump(mode="json")
        data = {
            key: value
            for key, value in tree["data"].items()
            if key in ("augmentation", "image_size", "mean", "std", "max_pixels")
        }
        return self.common_statement() | flat("data", data | {"train": dict(sources[0])})

    def flops(self) -> float:
        """Of the backbone: its forward pass three times, or once where it is frozen."""
        model, size = self.config.model, self.config.data.image_size
        return backbone_flops(model.backbone, size) * (1 if model.frozen else 3)

    def sketch(self) -> Sketch:
        """The whole loss."""
        config, size = self.config, self.config.data.image_size
        backbone = without_checkpointing(config.model.backbone)
        model = config.model.model_copy(update={"backbone": backbone})

        def run(networks: ClassificationNetworks) -> object:
            keys, targets = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS, model.classes)
            return networks.forward(Inputs(empty_images(config, size, size), targets, keys))

        title = f"{backbone.name}, {size} pixels"
        return self.sketched(title, lambda: ClassificationNetworks(model), run)

    @functools.cached_property
    def test_set(self) -> LabelledSet:
        """What is tested on."""
        data = self.config.data
        return self._open("test", test_transform(data))

    @property
    def tested(self) -> LabelledSet:
        """The test set."""
        return self.test_set

    def open_stream(self) -> MapStream:
        """Training images; the test images are opened, too, so that a fault is found now."""
        data = self.config.data
        train = self._open("train", training_transform(data))
        assert len(self.test_set)
        return self.stream_of(train)

    def _open(self, which: str, transform: Transform) -> LabelledSet:
        data = self.config.data
        try:
            return open_images(getattr(data, which), data, self.config.model.classes, transform)
        except ValueError as error:
            raise ConfigError(f"data.{which}: {error}") from error

    def prepare(self, batch: Placed, world: World) -> Inputs:
        """Mix the images of a micro-batch, as its first position decides."""
        spec, data = self.config, batch.to(world.device)
        with drawing(self.seed_of(batch), world.device):
            images, targets = self._mix(data.batch.images, data.batch.labels)
        smoothing = spec.data.augmentation.label_smoothing
        targets = targets * (1 - smoothing) + smoothing / spec.model.classes
        dtype = DTYPES[spec.engine.precision]
        return Inputs(images.to(dtype), targets, hash_keys(data.position, spec.seed))

    def evaluate(self, networks: nn.Module, world: World) -> Values:
        """Top-1 and top-5 accuracy in percent; the confusion matrix goes to the run folder."""
        config = self.config
        tested = confusion(
            networks, self.test_set, config.model.classes, world,
            batch=config.optimizer.max_micro_batch, dtype=DTYPES[config.engine.precision],
            workers=config.data.workers,
        )  # fmt: skip
        matrix = tested.confusion
        top1 = int(matrix.diagonal().sum()) / max(1, int(matrix.sum()))
        if world.is_main:
            write_whole(config.run_folder / "confusion.json", json.dumps(matrix.tolist()))
        left_out = float(tested.left_out)
        return {"top1": 100 * top1, "top5": 100 * tested.top5, "left_out": left_out}


def mixing(spec: ImageAugmentation, classes: int) -> Any:
    """MixUp or CutMix: images (B, 3, S, S), labels (B,) -> images, targets (B, C).

    torchvision's, which draw from torch's generator.
    """
    from torchvision.transforms import v2

    kinds = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, spec.mixup), (v2.CutMix, spec.cutmix))
        if alpha
    ]
    if not kinds:
        return functools.partial(_unmixed, classes)
    return kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)


def _unmixed(classes: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images, F.one_hot(labels, classes).float()


def training_transform(data: ClassificationData) -> Transform:
    """Crop, flip, RandAugment, normalise, erase; all draw from torch's generator."""
    from torchvision.transforms import v2

    spec, bicubic = data.augmentation, v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(
        data.image_size, spec.scale, spec.ratio, interpolation=bicubic, antialias=True
    )
    parts: list[nn.Module] = [crop, v2.RandomHorizontalFlip(spec.flip)]
    if spec.rand_augment is not None:
        strength = spec.rand_augment
        # On tensors its default, the nearest pixel, and bilinear only.
        parts.append(v2.RandAugment(strength.operations, strength.magnitude))
    parts += [*_normalised(data), v2.RandomErasing(spec.erasing)]
    return v2.Compose(parts)


def test_transform(data: ClassificationData) -> Transform:
    """Resize, central crop, normalise."""
    from torchvision.transforms import v2

    shorter = round(data.image_size / data.test_crop)
    resize = v2.Resize(shorter, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(data.image_size), *_normalised(data)])


def _normalised(data: ClassificationData) -> list[nn.Module]:
    from torchvision.transforms import v2

    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(data.mean), list(data.std))]
