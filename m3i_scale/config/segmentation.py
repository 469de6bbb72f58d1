"""Semantic segmentation as configuration: images with masks, the network, its test."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.evaluation import Evaluation
from m3i_scale.config.transfer import TransferData, TransferModel, TransferRun
from m3i_scale.config.types import BelowOne, Count, Fraction, Node, PathText, Positive

# ruff: noqa: RUF012  (pydantic copies defaults)

IGNORED = 255  # in a mask: no class, neither trained nor tested


class MaskedImages(Node):
    """A folder of images and a folder of masks with the same names below them.

    The mask of `images/a/b.jpg` is `masks/a/b.png`: one channel whose values are classes.
    """

    images: PathText
    """Folder of the images."""
    masks: PathText
    """Folder of the masks."""
    split: PathText | None = None
    """Text file that lists the images to take, a name in each line; null: all of them."""


class SegmentationAugmentation(Node):
    """What training does to an image: resize, crop, flip, change its colours.

    The image is resized to fit into `short_side` by `long_side`, both times a factor drawn from
    `scale`, then cropped to `data.crop`; what the crop has beyond the image is ignored.
    """

    short_side: Count = 512
    """Largest length of the shorter side, at factor 1."""
    long_side: Count = 2048
    """Largest length of the longer side, at factor 1."""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """Bounds of the factor."""
    one_class_at_most: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of a crop's labelled pixels that one class may have; ten crops are tried."""
    flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    photometric: Fraction = 0.5
    """Probability of each change of brightness, contrast, saturation and hue; 0: none."""

    @model_validator(mode="after")
    def _ordered(self) -> SegmentationAugmentation:
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"scale [{self.scale[0]:g}, {self.scale[1]:g}] runs backwards; write the smaller "
                "number first"
            )
        if self.short_side > self.long_side:
            raise ValueError(
                f"short_side {self.short_side} is above long_side {self.long_side}; exchange them"
            )
        return self


class SegmentationData(TransferData):
    """Images and masks to train on and to test on."""

    train: MaskedImages
    """What is trained on."""
    test: MaskedImages | None = None
    """What is tested on; null: nothing."""
    class_names: PathText | None = None
    """Text file with the name of a class in each line, in the order of the masks' values, or
    ADE20k's objectInfo150.txt, or a JSON file {name: value}; null: classes have numbers.
    """
    zero_is_unlabelled: bool = False
    """Whether 0 in a mask means no class, so that class 0 is written as 1 (ADE20k)."""
    crop: Count = 512
    """Side of training images, in pixels."""
    augmentation: SegmentationAugmentation = SegmentationAugmentation()
    """What training does to an image."""


class UperNet(Node):
    """Pyramid pooling and a feature pyramid (UperNet, arXiv 1807.10221), with a second head."""

    kind: Literal["upernet"] = "upernet"
    """Which network."""
    width: Count = 512
    """Features of its maps."""
    pool_scales: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3, 6]
    """Rows and columns that the coarsest map is pooled to."""
    auxiliary_width: Count = 256
    """Features of the second head, which reads the map of stride 16."""
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.4
    """Of the second head's loss; 0: there is no second head."""
    dropout: BelowOne = 0.1
    """Share of features that are dropped before the classifiers, in training."""
    norm: Literal["group", "sync_batch"] = "group"
    """`group` is the same on any number of ranks; `sync_batch` needs GPUs."""


class Mask2Former(Node):
    """Queries that each predict a class and a mask (Mask2Former, arXiv 2112.01527)."""

    kind: Literal["mask2former"] = "mask2former"
    """Which network."""
    width: Annotated[int, Field(gt=0, multiple_of=32)] = 256
    """Features of maps and queries."""
    heads: Count = 8
    """Attention heads."""
    queries: Count = 100
    """Masks that are predicted for an image."""
    encoder_layers: Count = 6
    """Layers of deformable attention over three maps."""
    encoder_ffn: Count = 1024
    """Hidden features of their MLPs."""
    decoder_layers: Count = 9
    """Layers in which queries attend to the maps."""
    decoder_ffn: Count = 2048
    """Hidden features of their MLPs."""
    points: Count = 12544
    """Points of a mask that its losses are computed at."""
    class_weight: Positive = 2.0
    """Of the loss of the classes, and of their cost in matching."""
    mask_weight: Positive = 5.0
    """The same of the masks' cross-entropy."""
    dice_weight: Positive = 5.0
    """The same of the masks' overlap."""
    no_object_weight: Positive = 0.1
    """Of queries without a mask, in the loss of the classes."""

    @model_validator(mode="after")
    def _divides(self) -> Mask2Former:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class SegmentationModel(TransferModel):
    """The backbone and what reads its maps.

    A ViT wants the option `position_grid`: its rows in pre-training.
    """

    classes: Annotated[int, Field(ge=2, le=IGNORED)]
    """Number of classes."""
    blocks: list[Annotated[int, Field(ge=0)]] | None = None
    """Of a ViT: the four blocks, from 0 on, whose features become maps of strides 4, 8, 16, 32;
    null: at a third, a half, two thirds and the end (3, 5, 7, 11 of 12).
    """
    head: Annotated[UperNet | Mask2Former, Field(discriminator="kind")]
    """What turns maps into classes."""


class SegmentationEvaluation(Evaluation):
    """When and how images are tested: whole or through a sliding window.

    `whole` gives an image to the network at once; `window` tiles it with windows of `data.crop`
    and takes the mean of the scores where they overlap.
    """

    mode: Literal["whole", "window"] = "whole"
    """Whole images, or a sliding window."""
    stride: Count = 341
    """Pixels from a window to the next."""
    short_side: Count = 512
    """Images are resized to fit into this length of the shorter side ..."""
    long_side: Count = 2048
    """... and this one of the longer."""
    round_to: Count = 32
    """Sides of a resized image are rounded up to a multiple of this."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """Sizes that are tested, as factors of both lengths; of several the mean is taken."""
    flip: bool = False
    """Whether mirrored images are tested, too."""
    batch: Count = 4
    """Windows that a network sees at once."""
    pictures: Annotated[int, Field(ge=0)] = 8
    """Rows in each picture of predictions."""


class Segmentation(TransferRun):
    """A segmentation network that is trained from a backbone."""

    task: Literal["segmentation"] = "segmentation"
    """What is trained."""
    model: SegmentationModel
    """The networks."""
    data: SegmentationData
    """Images with masks."""
    evaluation: SegmentationEvaluation = SegmentationEvaluation()
    """When and how to test."""

    @model_validator(mode="after")
    def _possible(self) -> Segmentation:
        if self.data.zero_is_unlabelled and self.model.classes == IGNORED:
            raise ValueError(
                f"with zero_is_unlabelled the last of {IGNORED} classes would be {IGNORED} in a "
                "mask, which means no class; use fewer classes"
            )
        windowed = self.evaluation.mode == "window"
        if windowed and self.evaluation.stride > self.data.crop:
            raise ValueError(
                f"evaluation.stride {self.evaluation.stride} is above data.crop {self.data.crop}, "
                "so that windows would leave gaps between them; make it smaller"
            )
        return self
