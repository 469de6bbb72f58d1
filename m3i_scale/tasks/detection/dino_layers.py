"""The Transformer of DINO out of Deformable DETR's layers: tokens of maps, encoder, decoder.

Weights compute in their own precision; coordinates and what is sampled at them are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DeformableDetrConfig, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrEncoder,
    DeformableDetrMultiscaleDeformableAttention,
    DeformableDetrSinePositionEmbedding,
    MultiScaleDeformableAttention,
)
from transformers.models.rt_detr.modeling_rt_detr import RTDetrMLPPredictionHead

from m3i_scale.config.detection import Dino
from m3i_scale.models.positions import sincos_embedding
from m3i_scale.tasks.detection.batch import valid

LEVELS = 4  # maps at strides 8, 16, 32 and 64
_TEMPERATURE = 20


@dataclass(frozen=True)
class Tokens:
    """All maps as one sequence: N tokens of L maps.

    features   (B, N, D)
    positions  (B, N, D)
    inside     bool (B, N), False where an image is padded
    shapes     rows and columns of the maps
    ratios     float32 (B, L, 2): share of each map's width and height inside the image
    """

    features: Tensor
    positions: Tensor
    inside: Tensor
    shapes: tuple[tuple[int, int], ...]
    ratios: Tensor

    @property
    def layout(self) -> dict[str, Any]:
        """The shapes as the layers of Deformable DETR take them."""
        spatial = torch.tensor(self.shapes, device=self.features.device)
        starts = torch.cat([spatial.new_zeros(1), spatial.prod(1).cumsum(0)[:-1]])
        return {
            "spatial_shapes": spatial,
            "spatial_shapes_list": list(self.shapes),
            "level_start_index": starts,
        }


class MapTokens(nn.Module):
    """Maps of the last three stages (B, H, W, C_i) -> tokens at strides 8 to 64."""

    def __init__(self, of_stages: Sequence[int], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(_projected(nn.Conv2d(c, width, 1)) for c in of_stages)
        self.coarsest = _projected(nn.Conv2d(of_stages[-1], width, 3, stride=2, padding=1))
        self.level = nn.Embedding(LEVELS, width)
        self.sine = DeformableDetrSinePositionEmbedding(
            width // 2, normalize=True, temperature=_TEMPERATURE
        )
        self.apply(_xavier)

    def forward(self, stages: Sequence[Tensor], sizes: Tensor, padded: tuple[int, int]) -> Tokens:
        """Tokens of maps of images of these sizes (B, 2) in a batch of `padded` pixels."""
        first = [stage.permute(0, 3, 1, 2) for stage in stages]
        maps = [project(found) for project, found in zip(self.projections, first, strict=True)]
        maps.append(self.coarsest(first[-1]))
        whole = valid(sizes, *padded)
        inside, ratios, positions = [], [], []
        levels = self.level(torch.arange(LEVELS, device=sizes.device))
        for found, level in zip(maps, levels, strict=True):
            mask = F.interpolate(whole[:, None].float(), found.shape[-2:])[:, 0].bool()
            rows, columns = mask[:, :, 0].sum(1), mask[:, 0].sum(1)
            ratios.append(torch.stack([columns / mask.shape[2], rows / mask.shape[1]], -1))
            sine = self.sine(found.shape, found.device, torch.float32, mask).to(found.dtype)
            positions.append(_flat(sine) + level)
            inside.append(mask.flatten(1))
        return Tokens(
            torch.cat([_flat(found) for found in maps], 1),
            torch.cat(positions, 1),
            torch.cat(inside, 1),
            tuple((found.shape[-2], found.shape[-1]) for found in maps),
            torch.stack(ratios, 1).float(),
        )


class Encoder(nn.Module):
    """Deformable self-attention over all tokens."""

    def __init__(self, config: Dino) -> None:
        super().__init__()
        self.layers = DeformableDetrEncoder(_detr_config(config)).layers
        self.checkpointed = config.checkpoint_layers
        _prepare(self)

    def forward(self, tokens: Tokens) -> Tensor:
        """Features (B, N, D) of the tokens."""
        x = tokens.features
        reference = DeformableDetrEncoder.get_reference_points(
            tokens.shapes, tokens.ratios, x.device
        )
        for layer in self.layers:
            x = _run(
                layer,
                x,
                self.checkpointed,
                attention_mask=tokens.inside,
                spatial_position_embeddings=tokens.positions,
                reference_points=reference,
                **tokens.layout,
            )
        return x


class Decoder(nn.Module):
    """Queries that attend to each other and sample the tokens around their boxes.

    Each layer refines the boxes of the one before; its loss reaches that one, too ("look forward
    twice").
    """

    def __init__(self, config: Dino, categories: int) -> None:
        super().__init__()
        width = config.width
        self.layers = DeformableDetrDecoder(_detr_config(config)).layers
        self.norm = nn.LayerNorm(width)
        self.position = RTDetrMLPPredictionHead(2 * width, width, width, 2)
        self.checkpointed = config.checkpoint_layers
        _prepare(self)
        count = config.decoder_layers
        self.classes = nn.ModuleList(class_head(width, categories) for _ in range(count))
        self.boxes = nn.ModuleList(box_head(width) for _ in range(count))

    def forward(
        self,
        queries: Tensor,
        reference: Tensor,
        memory: Tensor,
        tokens: Tokens,
        attention: Tensor | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, logits (B, Q, K) and boxes (B, Q, 4) from 0 to 1, float32.

        Args:
            queries: (B, Q, D)
            reference: unsquashed boxes (B, Q, 4), float32
            memory: what the encoder gives
            tokens: what it was given
            attention: added to the attention of queries, (Q, Q); None: nothing
        """
        x, found = queries, []
        mask = None if attention is None else attention.to(x.dtype)[None, None]
        ratios = torch.cat([tokens.ratios, tokens.ratios], -1)[:, None]  # (B, 1, L, 4)
        for layer, classes, boxes in zip(self.layers, self.classes, self.boxes, strict=True):
            before = reference.detach().sigmoid()
            position = self.position(box_embedding(before, x.shape[-1]).to(x.dtype))
            x = _run(
                layer,
                x,
                self.checkpointed,
                object_queries_position_embeddings=position,
                reference_points=before[:, :, None] * ratios,
                encoder_hidden_states=memory,
                encoder_attention_mask=tokens.inside,
                attention_mask=mask,
                **tokens.layout,
            )
            normed = self.norm(x)
            shift = boxes(normed).float()
            found.append((classes(normed).float(), (reference + shift).sigmoid()))
            reference = reference.detach() + shift
        return found


class _Sampling(MultiScaleDeformableAttention):
    """Samples in float32: positions of the weights' precision would be off by pixels."""

    def forward(self, value: Tensor, *where: Any) -> Tensor:
        shapes, listed, starts, locations, weights, step = where
        found = super().forward(
            value.float(), shapes, listed, starts, locations.float(), weights.float(), step
        )
        return found.to(value.dtype)


def class_head(width: int, categories: int) -> nn.Linear:
    """Logits that start at a probability of 0.01."""
    head = nn.Linear(width, categories)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(width: int) -> nn.Module:
    """Shifts of boxes that start at zero."""
    head = RTDetrMLPPredictionHead(width, width, 4, num_layers=3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


def box_embedding(boxes: Tensor, width: int) -> Tensor:
    """Sines and cosines (B, Q, 2 * width) of boxes (B, Q, 4) from 0 to 1."""
    return sincos_embedding(boxes * 2 * math.pi, width // 2).flatten(-2)


def _detr_config(config: Dino) -> DeformableDetrConfig:
    found = DeformableDetrConfig(
        backbone_config=ResNetConfig(out_features=["stage4"]),  # required, and never built
        d_model=config.width,
        num_feature_levels=LEVELS,
        encoder_layers=config.encoder_layers,
        encoder_attention_heads=config.heads,
        encoder_ffn_dim=config.ffn,
        decoder_layers=config.decoder_layers,
        decoder_attention_heads=config.heads,
        decoder_ffn_dim=config.ffn,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    found._attn_implementation = "sdpa"
    return found


def _prepare(module: nn.Module) -> None:
    """Glorot weights, except in what says where to sample; sampling in float32."""
    for layer in module.modules():
        if isinstance(layer, DeformableDetrMultiscaleDeformableAttention):
            layer.attn = _Sampling()
    for name, layer in module.named_modules():
        if not name.endswith(("sampling_offsets", "attention_weights")):
            _xavier(layer)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _projected(convolution: nn.Conv2d) -> nn.Module:
    width = convolution.out_channels
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(32, width // 4), width))


def _flat(found: Tensor) -> Tensor:
    return found.flatten(2).transpose(1, 2)


def _run(layer: Callable[..., Tensor], x: Tensor, checkpointed: bool, **rest: Any) -> Tensor:
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(layer, x, use_reentrant=False, **rest)
    return layer(x, **rest)
