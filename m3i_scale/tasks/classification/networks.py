"""A backbone with a linear classifier."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from m3i_scale.config.classification import Classifier
from m3i_scale.models.backbone import build_backbone
from m3i_scale.models.layers import Linear
from m3i_scale.objective.figures import figure


class Inputs(NamedTuple):
    """Images of one micro-batch, on the device.

    images   (B, 3, H, W), normalised, in compute precision
    targets  float32 (B, C): probabilities of the classes
    keys     int64 (B,): what stochastic depth draws from
    """

    images: Tensor
    targets: Tensor
    keys: Tensor


class ClassificationNetworks(nn.Module):
    """Pooled features of a backbone, and a linear classifier.

    The backbone's names begin with `backbone.`.

    Raises:
        ValueError: the backbone has no such options.
    """

    def __init__(self, spec: Classifier) -> None:
        super().__init__()
        backbone = build_backbone(spec.backbone.name, **spec.backbone.options)
        assert isinstance(backbone, nn.Module)
        self.backbone = backbone
        self._attention = spec.pooling == "attention"
        width = backbone.embed_dim if self._attention else backbone.width
        if not self._attention:
            backbone.pooling.requires_grad_(False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(spec.dropout)
        self.head = Linear(width, spec.classes)

    def scores(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> scores (B, C)."""
        tokens = self.backbone.features(images, keys)
        pooled = self.backbone.pool(tokens) if self._attention else tokens.mean(1)
        return self.head(self.dropout(self.norm(pooled)))

    def forward(self, inputs: Inputs | Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy of a micro-batch; of images alone, their scores.

        Returns:
            "loss" and "loss/classification" of `Inputs`, "scores" (B, C) of images.
        """
        if isinstance(inputs, Tensor):
            return {"scores": self.scores(inputs)}
        scores = self.scores(inputs.images, inputs.keys).float()
        loss = F.cross_entropy(scores, inputs.targets)
        return {"loss": loss, "loss/classification": figure(loss)}
