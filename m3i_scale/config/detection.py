"""Detection and instance segmentation as configuration: the detector, and COCO files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from m3i_scale.config.transfer import TransferData, TransferModel, TransferOptimizer, TransferRun
from m3i_scale.config.types import Count, Fraction, Node, PathText, Positive

# ruff: noqa: RUF012  (pydantic copies defaults)


class Windows(Node):
    """How a ViT reads large images: ViTDet (arXiv 2203.16527).

    Its option `position_grid` says for which grid its positions were trained: 14 at 224 pixels.
    """

    size: Count = 14
    """Side of the windows of local attention, in patches."""
    global_blocks: list[Annotated[int, Field(ge=0)]] = [2, 5, 8, 11]
    """Blocks, counted from 0, whose attention spans the whole image."""
    relative_positions: bool = True
    """Learned relative positions in every attention; they start at zero."""


class MaskRcnn(Node):
    """Mask R-CNN (arXiv 1703.06870) in the shape that ViTDet gave it."""

    kind: Literal["mask_rcnn"] = "mask_rcnn"
    """Which detector."""
    width: Count = 256
    """Channels of the pyramid and of the convolutions in the heads."""
    box_convolutions: Count = 4
    """Convolutions of the box head."""
    box_hidden: Count = 1024
    """Features of the box head's linear layer."""
    mask_convolutions: Count = 4
    """Convolutions of the mask head."""
    masks: bool = True
    """Whether there is a mask head; false: Faster R-CNN."""
    anchors: Annotated[list[Count], Field(min_length=5, max_length=5)] = [32, 64, 128, 256, 512]
    """Side of the anchors at strides 4, 8, 16, 32 and 64, in pixels."""
    proposals: Count = 1000
    """Most proposals of an image after suppression; twice as many are suppressed."""
    proposal_samples: Count = 256
    """Anchors of an image that its proposal loss samples."""
    box_samples: Count = 512
    """Proposals of an image that its box loss samples."""
    score_threshold: Fraction = 0.05
    """Detections with a lower score are dropped; LVIS is evaluated at 0.02."""
    detections: Count = 100
    """Most detections of an image; 300 for LVIS."""


class Federated(Node):
    """Classification loss over few classes, for data with few exhaustive labels (LVIS)."""

    classes: Count = 50
    """Classes that the loss of a batch counts: those in it, and others drawn by frequency."""
    power: Fraction = 0.5
    """Classes are drawn in proportion to (images with it) ** power."""


class Dino(Node):
    """DINO (arXiv 2203.03605): deformable encoder and decoder, denoising, mixed queries."""

    kind: Literal["dino"] = "dino"
    """Which detector."""
    width: Count = 256
    """Features of tokens and queries."""
    heads: Count = 8
    """Attention heads."""
    ffn: Count = 2048
    """Hidden features of each MLP."""
    encoder_layers: Count = 6
    """Layers over the maps at strides 8 to 64."""
    decoder_layers: Count = 6
    """Layers over the queries."""
    queries: Count = 900
    """Queries of an image."""
    denoising: Annotated[int, Field(ge=0)] = 1000
    """Noised objects of an image, about; 0: no denoising."""
    label_noise: Fraction = 0.5
    """Half of this share of the denoising queries shows another class."""
    box_noise: Positive = 1.0
    """Largest shift of a denoising query's edges, in halves of its side."""
    composite: bool = False
    """Two backbones, the second fed by the first (CBNetV2): InternImage-H in the paper."""
    first_weight: Fraction = 0.5
    """Weight of the losses at the first of two backbones."""
    class_weight: Positive = 1.0
    """Of the focal loss."""
    box_weight: Positive = 5.0
    """Of the L1 distance of boxes."""
    giou_weight: Positive = 2.0
    """Of the generalised IoU."""
    class_cost: Positive = 2.0
    """Of the focal loss in matching."""
    federated: Federated | None = None
    """For LVIS."""
    detections: Count = 300
    """Most detections of an image."""
    checkpoint_layers: bool = False
    """Recompute encoder and decoder layers in the backward pass to save memory."""

    @model_validator(mode="after")
    def _divisible(self) -> Dino:
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of heads {self.heads}"
            )
        return self


class Detector(TransferModel):
    """Backbone and head."""

    categories: Count
    """Number of categories of the annotation files."""
    windows: Windows = Windows()
    """Of a ViT; InternImage has none."""
    head: Annotated[MaskRcnn | Dino, Field(discriminator="kind")] = MaskRcnn()
    """The detector: `kind: mask_rcnn` or `kind: dino`."""

    @model_validator(mode="after")
    def _dino_of_stages(self) -> Detector:
        if isinstance(self.head, Dino) and not self.backbone.name.startswith("intern_image"):
            raise ValueError(
                f"head.kind dino needs the stages of an InternImage, and {self.backbone.name} has "
                "none; set head.kind: mask_rcnn"
            )
        return self


class CocoSet(Node):
    """Images and their annotations in COCO's or LVIS's JSON."""

    annotations: PathText
    """The JSON file."""
    images: PathText
    """The folder below which its `file_name`s lie."""


class Jitter(Node):
    """Large-scale jitter (arXiv 2012.07177): another scale, then a cut-out that fits a square."""

    kind: Literal["jitter"] = "jitter"
    """Which augmentation."""
    size: Count = 1024
    """Side of the square in pixels."""
    scale: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest scale; 1 fits the image into the square."""

    @model_validator(mode="after")
    def _forwards(self) -> Jitter:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} runs backwards; write the smaller first")
        return self


class Sides(Node):
    """Another size of the whole image."""

    kind: Literal["sides"] = "sides"
    """Which augmentation."""
    shorter: Annotated[list[Count], Field(min_length=1)] = list(range(480, 801, 32))
    """Lengths of the shorter side in pixels; one is drawn."""
    longest: Count = 1333
    """Images whose longer side would exceed it become smaller."""


class DetectionData(TransferData):
    """Training and validation images, and how they are resized."""

    train: CocoSet
    """What is trained on."""
    val: CocoSet
    """What is evaluated; its categories are those of `train`."""
    resize: Annotated[Jitter | Sides, Field(discriminator="kind")] = Jitter()
    """How training images are resized: `kind: jitter` or `kind: sides`."""
    flip_probability: Fraction = 0.5
    """Of a horizontal flip."""
    test_side: Count = 1024
    """Shorter side of an evaluated image in pixels."""
    test_longest: Count = 1024
    """Evaluated images whose longer side would exceed it become smaller."""
    without_objects: bool = False
    """Whether images without objects are trained on, too."""
    least_box: Positive = 1.0
    """Objects whose box has a shorter side in the training image are left out, in pixels."""


class DetectionOptimizer(TransferOptimizer):
    """AdamW with a learning rate for each layer, and a moving average of the weights."""

    deformation_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Further factor of the offsets and the centre scale in InternImage."""
    sampling_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the sampling offsets in DINO's layers."""


class Detection(TransferRun):
    """A detector that is trained from a backbone, with or without masks."""

    task: Literal["detection"] = "detection"
    """What is trained."""
    model: Detector
    """Backbone and head."""
    data: DetectionData
    """Images with objects."""
    optimizer: DetectionOptimizer
    """Batch, duration, AdamW, layer decay."""
