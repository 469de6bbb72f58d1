"""DINO (arXiv 2203.03605) on an InternImage, or on two of them.

Positions of queries are the best boxes of the encoder, their content is learned ("mixed query
selection"); noised objects are learned to be restored beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from m3i_scale.config.detection import DetectionData, Detector, Dino
from m3i_scale.models.intern_image import InternImage
from m3i_scale.objective.collectives import average
from m3i_scale.tasks.detection.backbones import build_backbone, stage_widths
from m3i_scale.tasks.detection.batch import Batch, normalised
from m3i_scale.tasks.detection.composite import CompositeInternImage
from m3i_scale.tasks.detection.detections import Detections, figures
from m3i_scale.tasks.detection.dino_layers import (
    Decoder,
    Encoder,
    MapTokens,
    Tokens,
    box_head,
    class_head,
)
from m3i_scale.tasks.detection.dino_loss import DinoLoss, Predicted, Target, Terms
from m3i_scale.tasks.detection.mask_rcnn import training_side

_NEAR_EDGE = 0.01  # a proposal's centre must be further inside the image


class DinoDetector(nn.Module):
    """Backbone, encoder, decoder: losses in training, detections in evaluation.

    Args:
        config: backbone and head.
        data: mean and deviation of the images.
        image_counts: images with each category, for the federated loss.
    """

    def __init__(
        self,
        config: Detector,
        data: DetectionData,
        image_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        head = config.head
        assert isinstance(head, Dino)
        self.head, self.categories = head, config.categories
        self.mean, self.std = data.mean, data.std
        backbone = build_backbone(config, training_side(data))
        assert isinstance(backbone, InternImage)  # the configuration refuses others
        self.backbone = backbone
        self.tokens = MapTokens(stage_widths(self.backbone)[1:], head.width)
        self.encoder = Encoder(head)
        self.proposal = nn.Sequential(nn.Linear(head.width, head.width), nn.LayerNorm(head.width))
        self.proposal_classes = class_head(head.width, self.categories)
        self.proposal_boxes = box_head(head.width)
        self.queries = nn.Embedding(head.queries, head.width)
        # One row more: the padding of images with fewer objects.
        self.noised = nn.Embedding(self.categories + 1, head.width) if head.denoising else None
        self.decoder = Decoder(head, self.categories)
        counts = None if image_counts is None else torch.tensor(image_counts)
        self.loss = DinoLoss(head, counts)

    def forward(self, inputs: Batch) -> dict[str, Any]:
        """Losses of a batch: "loss", and "loss/NAME" as [sum, count]; or its "detections"."""
        if not self.training:
            return {"detections": self.detect(inputs)}
        targets = [_target(inputs, i) for i in range(len(inputs))]
        return self.losses(inputs, targets, self.loss.choose(targets, self.categories))

    def losses(
        self, inputs: Batch, targets: Sequence[Target], chosen: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses of a batch with these objects; `chosen`: see `DinoLoss.choose`."""
        total, named = inputs.images.new_zeros((), dtype=torch.float32), {}
        sets = self._stages(inputs)
        for weight, stages in sets:  # the backbone that counts comes last
            terms = self._losses(stages, inputs, targets, chosen)
            total = total + weight * torch.stack([term.total for term in terms.values()]).sum()
            named = terms
        last = named[f"decoder_{len(self.decoder.layers)}"]
        parts = {"class": last.classes, "box": last.boxes, "giou": last.giou}
        sums = {
            name: torch.stack([term.total for key, term in named.items() if key.startswith(name)])
            for name in ("proposal", "decoder", "denoising")
            if self.noised is not None or name != "denoising"
        }
        parts |= {name: value.sum() for name, value in sums.items()}
        return {"loss": total, **figures(parts)}

    @torch.no_grad()
    def detect(self, inputs: Batch) -> list[Detections]:
        """What is seen in each image, in pixels of the stored image; call in evaluation mode."""
        _, stages = self._stages(inputs)[-1]
        tokens, memory = self._encoded(stages, inputs)
        _, reference = self._proposals(memory, tokens)
        queries = self._content(reference)
        logits, boxes = self.decoder(queries, reference, memory, tokens, None)[-1]
        return [
            self._detections(own, where, stored)
            for own, where, stored in zip(logits, boxes, inputs.originals, strict=True)
        ]

    def _stages(self, inputs: Batch) -> list[tuple[float, list[Tensor]]]:
        """Weight and maps at strides 8 to 32 of each supervised backbone, the main one last."""
        dtype = next(self.backbone.parameters()).dtype
        images = normalised(inputs, self.mean, self.std, dtype)
        if isinstance(self.backbone, CompositeInternImage):
            first, second = self.backbone.forward_pair(images, inputs.keys)
            pair = [(self.head.first_weight, first[1:]), (1.0, second[1:])]
            return pair if self.training else pair[1:]
        return [(1.0, self.backbone.forward_stages(images, inputs.keys)[1:])]

    def _encoded(self, stages: list[Tensor], inputs: Batch) -> tuple[Tokens, Tensor]:
        height, width = inputs.images.shape[-2:]
        tokens = self.tokens(stages, inputs.sizes, (height, width))
        return tokens, self.encoder(tokens)

    def _losses(
        self,
        stages: list[Tensor],
        inputs: Batch,
        targets: Sequence[Target],
        chosen: Tensor | None,
    ) -> dict[str, Terms]:
        """Losses of the proposals, of each decoder layer, and of its denoising."""
        tokens, memory = self._encoded(stages, inputs)
        proposed, reference = self._proposals(memory, tokens)
        queries = self._content(reference)
        noised, attention = 0, None
        pairs: list[tuple[Tensor, Tensor]] = []
        if self.noised is not None:
            content, where, attention, pairs = self._denoising(targets, queries.shape[1])
            noised = content.shape[1]
            queries = torch.cat([content.to(queries.dtype), queries], 1)
            reference = torch.cat([where, reference], 1)
        layers = self.decoder(queries, reference, memory, tokens, attention)
        objects, restorable = self._counts(targets, pairs, memory.device)
        terms = {"proposal": self.loss.matched(proposed, targets, objects, chosen)}
        for number, (logits, boxes) in enumerate(layers, 1):
            own = Predicted(logits[:, noised:], boxes[:, noised:])
            terms[f"decoder_{number}"] = self.loss.matched(own, targets, objects, chosen)
            if self.noised is not None:
                restored = Predicted(logits[:, :noised], boxes[:, :noised])
                measured = self.loss.measured(restored, targets, pairs, restorable, chosen)
                terms[f"denoising_{number}"] = measured
        return terms

    def _counts(
        self,
        targets: Sequence[Target],
        pairs: Sequence[tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> Tensor:
        """Objects, and noised copies that are to be restored: means over the ranks, at least 1."""
        counts = [sum(len(t.labels) for t in targets), sum(len(queries) for queries, _ in pairs)]
        return average(torch.tensor(counts, dtype=torch.float32, device=device)).clamp(min=1)

    def _content(self, reference: Tensor) -> Tensor:
        """The learned content (B, Q, D) of queries at these boxes."""
        rows = torch.arange(reference.shape[1], device=reference.device)
        return self.queries(rows).expand(len(reference), -1, -1)

    def _proposals(self, memory: Tensor, tokens: Tokens) -> tuple[Predicted, Tensor]:
        """The best boxes of the encoder, and the same unsquashed and detached, (B, Q, 4)."""
        anchors, usable = _anchors(tokens)
        usable = (usable & tokens.inside)[..., None]
        features = self.proposal(memory.masked_fill(~usable, 0))
        logits = self.proposal_classes(features).float()
        boxes = anchors + self.proposal_boxes(features).float()
        scores = logits.detach().amax(-1).masked_fill(~usable[..., 0], -torch.inf)
        best = scores.topk(min(self.head.queries, scores.shape[1]), dim=1).indices[..., None]
        logits = logits.gather(1, best.expand(-1, -1, logits.shape[-1]))
        boxes = boxes.gather(1, best.expand(-1, -1, 4))
        return Predicted(logits, boxes.sigmoid()), boxes.detach()

    def _denoising(
        self, targets: Sequence[Target], queries: int
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Noised objects: content (B, M, D), boxes (B, M, 4), attention, pairs with objects.

        A batch without objects gets one noised padding, and no pair: the same layers run.
        """
        assert self.noised is not None
        named = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
        empty = not any(len(target.labels) for target in targets)
        if empty:
            labels = torch.full_like(targets[0].labels.new_zeros(1), self.categories - 1)
            box = targets[0].boxes.new_full((1, 4), 0.5)
            named = [{"class_labels": labels, "boxes": box} for _ in targets]
        content, boxes, attention, meta = get_contrastive_denoising_training_group(
            named,
            self.categories,
            queries,
            self.noised,
            num_denoising_queries=self.head.denoising,
            label_noise_ratio=self.head.label_noise,
            box_noise_scale=self.head.box_noise,
        )
        pairs = []
        for target, positive in zip(targets, meta["dn_positive_idx"], strict=True):
            objects = torch.arange(len(target.labels), device=positive.device)
            pairs.append((positive[:0] if empty else positive, objects.tile(meta["dn_num_group"])))
        return content, boxes.float(), attention, pairs

    def _detections(self, logits: Tensor, boxes: Tensor, stored: tuple[int, int]) -> Detections:
        """The best pairs of query and category of one image."""
        scores, best = logits.sigmoid().flatten().topk(min(self.head.detections, logits.numel()))
        height, width = stored
        found = box_convert(boxes[best // self.categories], "cxcywh", "xyxy").clamp(0, 1)
        return Detections(
            found * found.new_tensor([width, height, width, height]),
            best % self.categories,
            scores,
        )


def _target(inputs: Batch, index: int) -> Target:
    """Objects of an image, boxes as centre and size in shares of it."""
    objects = inputs.objects[index]
    height, width = inputs.sizes[index].tolist()
    size = objects.boxes.new_tensor([width, height, width, height])
    return Target(objects.labels, box_convert(objects.boxes / size, "xyxy", "cxcywh"))


def _anchors(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Unsquashed boxes (B, N, 4) around each token, and whether it is well inside (B, N).

    Their sides are 0.05 of the image at the finest map and twice as long at each coarser one.
    """
    parts = []
    device, ratios = tokens.ratios.device, tokens.ratios
    for level, (rows, columns) in enumerate(tokens.shapes):
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)
        centre = grid[None] / ratios[:, None, level]
        side = torch.full_like(centre, 0.05 * 2**level)
        parts.append(torch.cat([centre, side], -1))
    boxes = torch.cat(parts, 1)
    usable = ((boxes > _NEAR_EDGE) & (boxes < 1 - _NEAR_EDGE)).all(-1)
    # What is not usable is not infinite: its loss, if it is chosen for want of others, is a number.
    return boxes.clamp(_NEAR_EDGE, 1 - _NEAR_EDGE).logit(), usable
