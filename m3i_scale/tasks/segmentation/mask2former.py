"""Mask2Former (arXiv 2112.01527) for semantic segmentation, from transformers' parts.

What is ours: coordinates and positions are float32 whatever the weights are (in bfloat16 a map of
112 pixels would have coordinates half a pixel apart), the loss is float32, and the numbers that
normalise it are averaged over the ranks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPreTrainedModel,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
    multi_scale_deformable_attention,
)

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import IGNORED, Mask2Former, SegmentationModel
from m3i_scale.objective.collectives import average
from m3i_scale.objective.figures import figure
from m3i_scale.tasks.segmentation.networks import Segmenter, group_norm, resize

_KINDS = {"cross_entropy": "class", "mask": "mask", "dice": "dice"}  # transformers' names -> ours


class Positions(Mask2FormerSinePositionEmbedding):
    """transformers' sine positions, computed in float32."""

    def forward(
        self, shape: torch.Size, device: Any, dtype: torch.dtype, mask: Tensor | None = None
    ) -> Tensor:
        """Embed the positions of a map of that shape: (B, D, h, w) of `dtype`."""
        return super().forward(shape, device, torch.float32, mask).to(dtype)


class DeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """transformers' deformable attention over three maps, with float32 coordinates."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attend from every position of the maps, all in one row (B, N, D), to points around it.

        No position is padding here, so that the attention mask is not looked at.
        """
        queries = self.with_pos_embed(hidden_states, position_embeddings)
        shape = (*queries.shape[:2], self.n_heads, self.n_levels, self.n_points)
        value = self.value_proj(encoder_hidden_states).unflatten(-1, (self.n_heads, -1))
        offsets = self.sampling_offsets(queries).view(*shape, 2).float()
        weights = self.attention_weights(queries).unflatten(-1, (self.n_heads, -1))
        weights = weights.float().softmax(-1).view(shape)
        sizes = torch.tensor(
            [[columns, rows] for rows, columns in spatial_shapes_list],
            device=queries.device,
            dtype=torch.float32,
        )
        locations = (
            reference_points.float()[:, :, None, :, None]
            + offsets / sizes[None, None, None, :, None]
        )
        sampled = multi_scale_deformable_attention(
            value.float(), spatial_shapes_list, locations, weights
        )
        return self.output_proj(sampled.to(queries.dtype)), weights


class PixelDecoder(Mask2FormerPixelDecoder):
    """transformers' pixel decoder with the two above."""

    def __init__(self, config: Any, channels: Sequence[int]) -> None:
        super().__init__(config, channels)
        self.position_embedding = Positions(config.feature_size // 2, normalize=True)
        for layer in self.encoder.layers:
            layer.self_attn = DeformableAttention(
                config.feature_size, config.num_attention_heads, n_levels=3, n_points=4
            )

    def get_valid_ratio(self, mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """In float32, of which the coordinates get their precision."""
        return super().get_valid_ratio(mask, torch.float32)


class Criterion(Mask2FormerLoss):
    """transformers' loss of matched queries; ranks normalise by the same numbers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, {})
        del self.empty_weight  # a buffer that a checkpoint need not have
        self._numbers = torch.ones(2)  # of masks, and the weights of all queries

    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of the last layer, and with a number in their names of the layers before.

        Masks (B, Q, h, w) and classes (B, Q, C + 1) are logits; labels are (n, H, W) and (n,).
        """
        if auxiliary_predictions is not None:  # the call that makes the others
            batch, queries = class_queries_logits.shape[:2]
            masks = sum(len(labels) for labels in class_labels)
            matched = sum(min(len(labels), queries) for labels in class_labels)
            weight = matched + self.eos_coef * (batch * queries - matched)
            numbers = torch.tensor([float(masks), weight], device=class_queries_logits.device)
            self._numbers = average(numbers)
        return super().forward(
            masks_queries_logits,
            class_queries_logits,
            mask_labels,
            class_labels,
            auxiliary_predictions,
        )

    def get_num_masks(self, class_labels: Any, device: Any) -> Tensor:
        """Mean over the ranks, 1 or more."""
        return self._numbers[0].clamp(min=1)

    def loss_labels(
        self, class_queries_logits: Tensor, class_labels: Sequence[Tensor], indices: Any
    ) -> dict[str, Tensor]:
        """Cross-entropy of all queries; those without a mask have the class C, and less weight."""
        target = class_queries_logits.new_full(
            class_queries_logits.shape[:2], self.num_labels, dtype=torch.long
        )
        for row, labels, (query, label) in zip(target, class_labels, indices, strict=True):
            row[query.to(row.device)] = labels[label.to(row.device)]
        weight = class_queries_logits.new_ones(self.num_labels + 1)
        weight[-1] = self.eos_coef
        logits = class_queries_logits.transpose(1, 2)
        each = F.cross_entropy(logits, target, weight, reduction="none")
        return {"loss_cross_entropy": each.sum() / self._numbers[1]}


class Mask2FormerSegmenter(Segmenter):
    """A backbone with Mask2Former's pixel decoder and queries.

    Raises:
        ConfigError: SciPy, which matches queries with masks, is not installed.
    """

    def __init__(self, model: SegmentationModel) -> None:
        spec = model.head
        assert isinstance(spec, Mask2Former)
        if importlib.util.find_spec("scipy") is None:
            raise ConfigError(
                "Mask2Former matches queries with masks by SciPy, which is not installed: "
                "pip install 'm3i-scale[transfer]'"
            )
        super().__init__(model, group_norm)
        self.weights = {
            "class": spec.class_weight,
            "mask": spec.mask_weight,
            "dice": spec.dice_weight,
        }
        config = _config(spec, model.classes)
        self.pixel_decoder = PixelDecoder(config, self.channels)
        self.transformer = Mask2FormerTransformerModule(config.feature_size, config)
        self.transformer.position_embedder = Positions(spec.width // 2, normalize=True)
        self.class_predictor = nn.Linear(spec.width, model.classes + 1)
        self.criterion = Criterion(config)
        initialise = Mask2FormerPreTrainedModel(config)._init_weights
        for part in (self.pixel_decoder, self.transformer, self.class_predictor):
            part.apply(initialise)

    def predictions(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Logits of classes (B, Q, C + 1) and masks (B, Q, h, w) after every layer, float32."""
        pixels = self.pixel_decoder(list(maps), output_hidden_states=False, return_dict=True)
        decoded = self.transformer(
            multi_scale_features=pixels.multi_scale_features,
            mask_features=pixels.mask_features,
            output_hidden_states=True,
        )
        return [
            {
                "class_queries_logits": self.class_predictor(queries.transpose(0, 1)).float(),
                "masks_queries_logits": masks.float(),
            }
            for queries, masks in zip(
                decoded.intermediate_hidden_states, decoded.masks_queries_logits, strict=True
            )
        ]

    def scores(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Sum over queries of the class's probability times the mask's: (B, C, H, W)."""
        last = self.predictions(maps)[-1]
        classes = last["class_queries_logits"].softmax(-1)[..., :-1]
        masks = resize(last["masks_queries_logits"], size).sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes, masks)

    def losses(
        self, maps: Sequence[Tensor], masks: Tensor, keys: Tensor | None
    ) -> dict[str, Tensor]:
        """Of classes, masks and their overlap, after every layer; figures are sums over layers."""
        return self.losses_of(maps, [split_mask(mask) for mask in masks])

    def losses_of(
        self, maps: Sequence[Tensor], labels: Sequence[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """The same of masks as `split_mask` gives them, a pair for each image."""
        *before, last = self.predictions(maps)
        found = self.criterion(
            **last,
            mask_labels=[mask for mask, _ in labels],
            class_labels=[present for _, present in labels],
            auxiliary_predictions=before,
        )
        parts = {
            name: torch.stack(
                [value for key, value in found.items() if key.startswith(f"loss_{kind}")]
            ).sum()
            for kind, name in _KINDS.items()
        }
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        figures = {f"loss/{name}": figure(part) for name, part in parts.items()}
        return {"loss": loss, **figures}


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask (H, W) of classes as float (n, H, W), one of each class in it, and the classes (n,).

    Pixels without a class are in no mask.
    """
    present = mask.unique().long()
    present = present[present != IGNORED]
    return (mask == present[:, None, None]).float(), present


def _config(spec: Mask2Former, classes: int) -> Any:
    return Mask2FormerConfig(
        num_labels=classes,
        feature_size=spec.width,
        mask_feature_size=spec.width,
        hidden_dim=spec.width,
        num_attention_heads=spec.heads,
        num_queries=spec.queries,
        encoder_layers=spec.encoder_layers,
        encoder_feedforward_dim=spec.encoder_ffn,
        decoder_layers=spec.decoder_layers + 1,  # transformers counts the prediction before them
        dim_feedforward=spec.decoder_ffn,
        train_num_points=spec.points,
        class_weight=spec.class_weight,
        mask_weight=spec.mask_weight,
        dice_weight=spec.dice_weight,
        no_object_weight=spec.no_object_weight,
    )
