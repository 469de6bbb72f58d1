"""An image encoder with projectors: student or teacher, and what it says about a clean view."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from m3i_scale.config import Model, Objective, Target
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.heads import MLP


class Encoding(NamedTuple):
    """Representations of a clean view, by the teacher, the student or a frozen teacher."""

    features: Tensor | None  # (B, N, D), where a dense target is made of them
    pooled: Tensor | None  # (B, G), where a target is global; of a frozen teacher as it pools
    projected: Tensor | None  # (B, N, G), where a dense target has a projector

    def target(self, target: Target) -> Tensor:
        """The part that is this target, rows in batch order."""
        if target.representation == "global":
            chosen = self.pooled
        elif target.decoder == "projector" and not target.frozen:
            chosen = self.projected
        else:
            chosen = self.features
        assert chosen is not None  # Encoder has the projectors that the targets want
        return chosen


class Encoder(nn.Module):
    """The image backbone, and the projectors of the targets that have one."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.backbone = build_backbone(model.backbone.name, **model.backbone.options)
        head, backbone = model.global_head, self.backbone
        self.projector = self.dense_projector = None
        targets = [target for target in objective.targets if not target.frozen]
        self.keeps_features = any(
            t.representation == "gram"
            or (t.representation == "features" and t.decoder != "projector")
            or t.match == "similarity"
            for t in targets
        )
        if any(t.representation == "global" for t in targets):
            self.projector = MLP(backbone.embed_dim, head.hidden, head.width)
        if any(t.decoder == "projector" for t in targets):
            self.dense_projector = MLP(backbone.width, head.hidden, head.width)

    def encode(self, images: Tensor, keys: Tensor) -> Encoding:
        """Everything that targets are made of, for clean images (B, 3, H, W) and their keys."""
        features = self.backbone.features(images, keys)
        pooled = projected = None
        if self.projector is not None:
            pooled = self.projector(self.backbone.pool(features))
        if self.dense_projector is not None:
            projected = self.dense_projector(features)
        return Encoding(features if self.keeps_features else None, pooled, projected)
