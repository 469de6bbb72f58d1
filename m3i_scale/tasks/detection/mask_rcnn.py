"""Mask R-CNN of torchvision's parts on a ViT (simple feature pyramid) or an InternImage (FPN).

Convolutions compute in the weights' precision, boxes in float32 throughout: a coordinate of 1,000
pixels has steps of 4 in bfloat16.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.poolers import initLevelMapper

from m3i_scale.config.detection import DetectionData, Detector, MaskRcnn
from m3i_scale.tasks.detection.backbones import build_backbone, stage_widths
from m3i_scale.tasks.detection.batch import Batch, Objects, normalised
from m3i_scale.tasks.detection.detections import Detections, figures
from m3i_scale.tasks.detection.masks import cut_masks, paste_masks
from m3i_scale.tasks.detection.vitdet import SimpleFeaturePyramid, WindowedViT

_LEVELS = ["0", "1", "2", "3"]  # of the pyramid that regions are cut from; "pool" only proposes
BOX_SIDE, MASK_SIDE = 7, 14  # of the regions that the heads see
POSITIVE = 0.25  # share of the regions of the box loss that has an object, at most
_LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


class MaskRcnnDetector(nn.Module):
    """Backbone, pyramid, proposals, heads: losses in training, detections in evaluation.

    Args:
        config: backbone and head.
        data: size, mean and deviation of the images.
    """

    def __init__(self, config: Detector, data: DetectionData) -> None:
        super().__init__()
        head = config.head
        assert isinstance(head, MaskRcnn)
        self.mean, self.std = data.mean, data.std
        size = training_side(data)
        self.backbone = build_backbone(config, size)
        self.side = size if isinstance(self.backbone, WindowedViT) else None
        if isinstance(self.backbone, WindowedViT):
            self.neck: nn.Module = SimpleFeaturePyramid(self.backbone.width, head.width)
            finest = self.backbone.stride / 4
        else:
            self.neck, finest = StagePyramid(stage_widths(self.backbone), head.width), 4.0
        self.rpn, self.roi_heads = _parts(head, config.categories, finest)

    def forward(self, inputs: Batch) -> dict[str, Any]:
        """Losses of a batch: "loss", and "loss/NAME" as [sum, count]; or its "detections"."""
        if not self.training:
            return {"detections": self.detect(inputs)}
        targets = [_target(objects) for objects in inputs.objects]
        images, maps = self._maps(inputs)
        proposals, losses = self.rpn(images, maps, targets)
        _, more = self.roi_heads(maps, proposals, images.image_sizes, targets)
        named = {_LOSSES[name]: value for name, value in {**losses, **more}.items()}
        return {"loss": torch.stack(list(named.values())).sum(), **figures(named)}

    @torch.no_grad()
    def detect(self, inputs: Batch) -> list[Detections]:
        """What is seen in each image, in pixels of the stored image; call in evaluation mode."""
        images, maps = self._maps(inputs)
        proposals, _ = self.rpn(images, maps)
        found, _ = self.roi_heads(maps, proposals, images.image_sizes)
        return [
            _detections(one, fed, stored)
            for one, fed, stored in zip(found, images.image_sizes, inputs.originals, strict=True)
        ]

    def _maps(self, inputs: Batch) -> tuple[ImageList, dict[str, Tensor]]:
        """The images with their sizes, and maps by level."""
        dtype = next(self.backbone.parameters()).dtype
        normal = normalised(inputs, self.mean, self.std, dtype)
        images, named = self.maps(normal, inputs.keys)
        sizes = [(int(height), int(width)) for height, width in inputs.sizes.tolist()]
        return ImageList(images, sizes), named

    def maps(self, images: Tensor, keys: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised images, padded as the backbone needs them, and maps by level."""
        if isinstance(self.backbone, WindowedViT):
            assert self.side is not None
            images = _square(images, self.side)
            maps = self.neck(self.backbone.feature_map(images, keys))
        else:
            maps = self.neck(self.backbone.forward_stages(images, keys))
        named = OrderedDict((name, found) for name, found in zip(_LEVELS, maps, strict=True))
        named["pool"] = F.max_pool2d(maps[-1], 1, 2)
        return images, named


class StagePyramid(nn.Module):
    """Maps of stages (B, H, W, C_i) -> maps (B, C, H, W), top-down (arXiv 1612.03144)."""

    def __init__(self, of_stages: Sequence[int], channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(of_stages), channels)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Four maps, the finest first."""
        maps = {str(i): stage.permute(0, 3, 1, 2) for i, stage in enumerate(stages)}
        return list(self.fpn(OrderedDict(maps)).values())


class _Anchors(AnchorGenerator):
    """Anchors in float32 whatever the maps are."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class _ProposalHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(x)
        return [score.float() for score in scores], [box.float() for box in boxes]


class _Regions(nn.Module):
    """Regions of the maps, cut in float32 and given in the maps' precision (N, C, side, side).

    The value of a cell is that of its centre (`aligned`), which torchvision's `MultiScaleRoIAlign`
    takes at the corner; and strides are given, which it guesses from the images of the first batch.
    """

    def __init__(self, side: int, finest: float) -> None:
        super().__init__()
        self.side = side
        strides = [finest * 2**level for level in range(len(_LEVELS))]
        self.scales = [1 / stride for stride in strides]
        self.level_of = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        numbers = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        regions, levels = torch.cat([numbers, torch.cat(boxes)], 1), self.level_of(boxes)
        finest, side = x[_LEVELS[0]], self.side
        cut = finest.new_zeros(len(regions), finest.shape[1], side, side, dtype=torch.float32)
        for level, (name, scale) in enumerate(zip(_LEVELS, self.scales, strict=True)):
            of_level = torch.where(levels == level)[0]
            maps, own = x[name].float(), regions[of_level]
            found = roi_align(maps, own, (side, side), scale, sampling_ratio=0, aligned=True)
            cut = cut.index_put((of_level,), found)
        return cut.to(finest.dtype)


class _Heads(RoIHeads):
    """Boxes as torchvision has them; masks without its shift (`masks`)."""

    def has_mask(self) -> bool:
        """Not torchvision's."""
        return False

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        self._sampled = super().select_training_samples(proposals, targets)
        return self._sampled

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation mode, losses in training; masks are probabilities."""
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if self.mask_head is None:
            return found, losses
        if targets is None:
            labels = [one["labels"] for one in found]
            scores = self._masks(features, [one["boxes"] for one in found], image_shapes)
            for one, masks in zip(found, maskrcnn_inference(scores, labels), strict=True):
                one["masks"] = masks
            return found, losses
        boxes, matched, labels, _ = self._sampled
        positive = [torch.where(label > 0)[0] for label in labels]
        boxes, matched, labels = (
            [values[rows] for values, rows in zip(of_images, positive, strict=True)]
            for of_images in (boxes, matched, labels)
        )
        scores, label = self._masks(features, boxes, image_shapes), torch.cat(labels)
        scores = scores[torch.arange(len(label), device=label.device), label]
        side = scores.shape[-1]
        wanted = torch.cat([
            cut_masks(target["masks"], box, match, side)
            for target, box, match in zip(targets, boxes, matched, strict=True)
        ])  # fmt: skip
        loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
        return found, losses | {"loss_mask": loss / max(wanted.numel(), 1)}

    def _masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Scores (N, classes, side, side) of regions."""
        scores: Tensor = self.mask_predictor(
            self.mask_head(self.mask_roi_pool(features, boxes, shapes))
        )
        return scores


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores.float(), boxes.float()


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class _Stub(nn.Module):
    """Stands for a backbone while torchvision assembles the other parts."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


def _parts(head: MaskRcnn, categories: int, finest: float) -> tuple[Any, Any]:
    """The proposal network and the heads; `finest`: stride of the maps."""
    width = head.width
    anchors = _Anchors(tuple((side,) for side in head.anchors), ((0.5, 1.0, 2.0),) * 5)
    boxes = [width] * head.box_convolutions
    heads = _Heads(
        box_roi_pool=_Regions(BOX_SIDE, finest),
        box_head=FastRCNNConvFCHead(
            (width, BOX_SIDE, BOX_SIDE), boxes, [head.box_hidden], norm_layer=LayerNorm2d
        ),
        box_predictor=_BoxPredictor(head.box_hidden, categories + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=head.box_samples,
        positive_fraction=POSITIVE,
        bbox_reg_weights=None,
        score_thresh=head.score_threshold,
        nms_thresh=0.5,
        detections_per_img=head.detections,
    )
    if head.masks:
        heads.mask_roi_pool = _Regions(MASK_SIDE, finest)
        heads.mask_head = MaskRCNNHeads(width, [width] * head.mask_convolutions, 1, LayerNorm2d)
        heads.mask_predictor = _MaskPredictor(width, width, categories + 1)
    proposals = FasterRCNN(
        _Stub(width),
        rpn_anchor_generator=anchors,
        rpn_head=_ProposalHead(width, 3, conv_depth=2),
        rpn_pre_nms_top_n_train=2 * head.proposals,
        rpn_pre_nms_top_n_test=head.proposals,
        rpn_post_nms_top_n_train=head.proposals,
        rpn_post_nms_top_n_test=head.proposals,
        rpn_batch_size_per_image=head.proposal_samples,
        box_head=heads.box_head,
        box_predictor=heads.box_predictor,
    )
    return proposals.rpn, heads


def training_side(data: DetectionData) -> int:
    """The longest side of a training image."""
    resize = data.resize
    return resize.size if resize.kind == "jitter" else resize.longest


def _square(images: Tensor, side: int) -> Tensor:
    """Pad to a square of `side`, or of the next multiple of it, for relative positions."""
    height, width = images.shape[-2:]
    whole = -(-max(height, width) // side) * side
    return F.pad(images, (0, whole - width, 0, whole - height))


def _target(objects: Objects) -> dict[str, Tensor]:
    """As torchvision takes it: 0 is the background."""
    target = {"boxes": objects.boxes, "labels": objects.labels + 1}
    if objects.masks is not None:
        target["masks"] = objects.masks.to(torch.uint8)
    return target


def _detections(
    found: dict[str, Tensor], fed: tuple[int, int], stored: tuple[int, int]
) -> Detections:
    boxes = resize_boxes(found["boxes"], fed, stored)
    masks = None
    if "masks" in found:
        masks = paste_masks(found["masks"][:, 0], boxes, stored)
    return Detections(boxes, found["labels"] - 1, found["scores"], masks)
