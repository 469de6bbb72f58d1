"""Image classification as configuration: the networks, images with labels, augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.data import Storage
from m3i_scale.config.transfer import TransferData, TransferModel, TransferOptimizer, TransferRun
from m3i_scale.config.types import BelowOne, Count, Fraction, Node, PathText, Positive


class Classifier(TransferModel):
    """The backbone and a linear classifier of its pooled features."""

    classes: Annotated[int, Field(ge=2)]
    """Number of classes."""
    pooling: Literal["mean", "attention"] = "mean"
    """Mean of all tokens, or the backbone's attention pooling, which pre-training with texts or
    categories has trained.
    """
    frozen: bool = False
    """Train the classifier alone: a linear probe. The backbone stays outside of ZeRO, whole on
    every GPU; `data.features` runs it once and not in every step.
    """
    dropout: BelowOne = 0.0
    """Share of pooled features that are dropped in training."""


class LabelledImages(Node):
    """Images with labels: a folder of one folder for each class, or an index of shards."""

    folder: PathText | None = None
    """Folder whose folders are the classes, in the order of their names (`class_names` may say
    another)."""
    index: PathText | None = None
    """Index of shards with categories (`m3i shards index --kind category`)."""

    @model_validator(mode="after")
    def _one(self) -> LabelledImages:
        if (self.folder is None) == (self.index is None):
            raise ValueError("give either folder or index")
        return self


class RandAugment(Node):
    """RandAugment (arXiv 1909.13719), as torchvision has it."""

    operations: Count = 2
    """Changes of an image, one after the other."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Their strength; 30 is the strongest."""


class ImageAugmentation(Node):
    """What training does to an image, and to a batch of them."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Bounds of the crop's share of the image."""
    ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    """Bounds of its width over its height."""
    flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    rand_augment: RandAugment | None = RandAugment()
    """Changes of geometry and colours; null: none."""
    erasing: Fraction = 0.25
    """Probability of erasing a rectangle."""
    mixup: Annotated[float, Field(ge=0)] = 0.8
    """alpha of MixUp; 0: none."""
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    """alpha of CutMix; 0: none. With both, each micro-batch has one of them, drawn evenly."""
    label_smoothing: BelowOne = 0.1
    """Share of the target that is spread over all classes."""


class FeatureCache(Node):
    """Features of a frozen backbone, computed once before training and read from disk after that.

    Each set of weights, images, preparation and precision has a folder with a key of these: what is
    there is used by any later run, what is missing or damaged is computed, by all ranks together.
    """

    folder: PathText
    """Folder of all caches, which every rank must see."""
    views: Annotated[int, Field(ge=0)] = 0
    """Crops of each training image, made as in training; each use of an image draws one of them.
    0: the central crop of a test image alone.
    """
    standardise: bool = True
    """Subtract each feature's mean over the training set and divide by its standard deviation, in
    place of the layer norm of each image's features: a batch norm without parameters, as MAE's
    probe has it, whose statistics are exact.
    """
    batch: Count = 256
    """Images that a rank encodes at once."""


class ClassificationData(TransferData):
    """Images to train on and to test on."""

    train: LabelledImages
    """What is trained on."""
    test: LabelledImages
    """What is tested on."""
    class_names: PathText | None = None
    """Text file with the names of classes, one in each line, in order: of a folder its folders, in
    reports what numbers are called.
    """
    image_size: Count = 224
    """Side of the networks' input, in pixels."""
    test_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the shorter side that the central crop of a test image has."""
    augmentation: ImageAugmentation = ImageAugmentation()
    """What training does to images."""
    storage: Storage = Storage()
    """How shards are read."""
    features: FeatureCache | None = None
    """Run a frozen backbone once over all images and train on its features; null: in every step."""


class ClassificationOptimizer(TransferOptimizer):
    """AdamW or LARS with a learning rate for each layer, and a moving average of the weights."""

    kind: Literal["adamw", "lars"] = "adamw"
    """`lars` (arXiv 1708.03888): for a classifier on a frozen backbone. The rate of each weight
    matrix is 0.001 of its norm over its gradient's, and `betas` begin with the momentum.
    """
    deformation_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Further factor of the offsets and the centre scale in InternImage."""

    @property
    def lars(self) -> bool:
        """As `kind` says."""
        return self.kind == "lars"


class Classification(TransferRun):
    """A classifier that is trained from a backbone."""

    task: Literal["classification"] = "classification"
    """What is trained."""
    model: Classifier
    """The networks."""
    data: ClassificationData
    """Images with labels."""
    optimizer: ClassificationOptimizer
    """Batch, duration, AdamW, layer decay."""

    @model_validator(mode="after")
    def _possible(self) -> Classification:
        augmentation = self.data.augmentation
        if self.optimizer.max_micro_batch == 1 and (augmentation.mixup or augmentation.cutmix):
            raise ValueError(
                "mixup and cutmix mix the images of a micro-batch, which has one: raise "
                "optimizer.max_micro_batch, or set both to 0"
            )
        if self.model.frozen and self.optimizer.layer_decay != 1:
            raise ValueError("layer_decay is of a backbone that is trained; remove it, or frozen")
        if self.optimizer.lars:
            self._require_lars()
        if self.data.features is not None:
            self._require_features()
        return self

    def _require_lars(self) -> None:
        if not self.model.frozen:
            raise ValueError(
                "optimizer.kind: lars trains a classifier on a frozen backbone; set model.frozen: "
                "true, or kind: adamw"
            )
        if self.engine.zero.offload_optimizer:
            raise ValueError(
                "engine.zero.offload_optimizer updates by DeepSpeed's Adam in host memory, and "
                "optimizer.kind is lars; remove one of them"
            )

    def _require_features(self) -> None:
        if not self.model.frozen:
            raise ValueError(
                "data.features are those of a frozen backbone; set model.frozen: true, or remove "
                "data.features"
            )
        if self.data.augmentation.mixup or self.data.augmentation.cutmix:
            raise ValueError(
                "mixup and cutmix mix images, and data.features are computed of single ones; set "
                "both to 0, or remove data.features"
            )
