"""UperNet (arXiv 1807.10221) from transformers' heads.

Pyramid pooling on the coarsest map and a feature pyramid, with a second, convolutional head on the
map of stride 16. Names below `decode_head` and `auxiliary_head` are those of transformers, but a
layer called `batch_norm` is a GroupNorm unless configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import (
    UperNetConvModule,
    UperNetFCNHead,
    UperNetHead,
    UperNetPyramidPoolingBlock,
)

from m3i_scale.config.segmentation import IGNORED, SegmentationModel, UperNet
from m3i_scale.models.stochastic_depth import draw_uniform, hash_keys
from m3i_scale.objective.figures import figure
from m3i_scale.tasks.segmentation.networks import NORMS, Norm, Segmenter, pixel_loss, resize

_LEVEL = 2  # of the second head: stride 16


class FeatureDropout(nn.Module):
    """Drops whole maps of an image, as `nn.Dropout2d`, by keys of the images where there are some.

    `keys` is set before each forward pass.
    """

    def __init__(self, rate: float, salt: int) -> None:
        super().__init__()
        self.rate, self.salt = rate, salt
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, h, w)."""
        if not (self.training and self.rate):
            return x
        # Other numbers than those of the backbone's stochastic depth, which has the same keys.
        keys = None if self.keys is None else hash_keys(self.keys, -self.salt)
        drawn = draw_uniform(len(x), x.shape[1], keys, x.device).T
        factor = (drawn >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * factor[:, :, None, None]


class RegionMeans(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two products, which add in the same order each time.

    The backward pass of PyTorch's operator does not on a GPU.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Means (B, C, size, size) of x (B, C, h, w) over regions that cover it."""
        rows, columns = (self._weights(side, x.device) for side in x.shape[-2:])
        return (rows @ x.float() @ columns.T).to(x.dtype)

    def _weights(self, side: int, device: torch.device) -> Tensor:
        """(size, side): what each position counts in the mean of each region."""
        return nn.functional.adaptive_avg_pool1d(torch.eye(side, device=device), self.size).T


class UperNetSegmenter(Segmenter):
    """A backbone with UperNet's heads."""

    def __init__(self, model: SegmentationModel) -> None:
        spec = model.head
        assert isinstance(spec, UperNet)
        norm = NORMS[spec.norm]
        super().__init__(model, norm)
        config = UperNetConfig(
            hidden_size=spec.width,
            pool_scales=spec.pool_scales,
            auxiliary_channels=spec.auxiliary_width,
            num_labels=model.classes,
        )
        self.auxiliary_weight = spec.auxiliary_weight
        self.decode_head = _prepared(UperNetHead(config, self.channels), norm)
        self.decode_head.fpn_bottleneck.activation = _with_dropout(spec.dropout, 1)
        if spec.auxiliary_weight:
            head = _prepared(UperNetFCNHead(config, self.channels, in_index=_LEVEL), norm)
            head.convs[-1].activation = _with_dropout(spec.dropout, 2)
            self.auxiliary_head = head

    def scores(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, C, H, W), float32."""
        return resize(self.decode_head(maps).float(), size)

    def losses(
        self, maps: Sequence[Tensor], masks: Tensor, keys: Tensor | None
    ) -> dict[str, Tensor]:
        """Cross-entropy of both heads, and how many pixels are right."""
        for module in self.modules():
            if isinstance(module, FeatureDropout):
                module.keys = keys
        logits = self.decode_head(maps)
        loss = pixel_loss(logits, masks)
        figures = {"loss/decode": figure(loss), "accuracy/pixels": _accuracy(logits, masks)}
        if self.auxiliary_weight:
            second = pixel_loss(self.auxiliary_head(maps), masks)
            figures["loss/auxiliary"] = figure(second)
            loss = loss + self.auxiliary_weight * second
        return {"loss": loss, **figures}


@torch.no_grad()
def _accuracy(logits: Tensor, masks: Tensor) -> Tensor:
    """(right, labelled) pixels of the masks at the centres of the logits' pixels."""
    size = list(logits.shape[-2:])
    labels = nn.functional.interpolate(masks[:, None], size, mode="nearest-exact")[:, 0]
    labelled = labels != IGNORED
    right = (logits.argmax(1) == labels) & labelled
    return torch.stack([right.sum(), labelled.sum()]).float()


def _with_dropout(rate: float, salt: int) -> nn.Module:
    """ReLU, then dropout: no parameters, so that no name changes."""
    return nn.Sequential(nn.ReLU(), FeatureDropout(rate, salt))


def _prepared(head: Any, norm: Norm) -> Any:
    """Give a head its norms and its pooling, its classifier the small weights of the reference."""
    for module in head.modules():
        if isinstance(module, UperNetConvModule):
            module.batch_norm = norm(module.conv.out_channels)
        if isinstance(module, UperNetPyramidPoolingBlock):
            module.layers[0] = RegionMeans(module.layers[0].output_size)
            module.add_module("0", module.layers[0])
    nn.init.normal_(head.classifier.weight, std=0.01)
    nn.init.zeros_(head.classifier.bias)
    return head
