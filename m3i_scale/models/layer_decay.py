"""Layer decay: the learning rate of each parameter falls with its distance from the heads.

    layer                           ViT                    InternImage
    0                               patch embedding        stem
    1 to L                          block                  block, numbered through all stages
    L + 1, learning rate times 1    last norm, pooling     fused map, pooling, classifier

and so is everything outside the backbone. A parameter of layer l has decay ** (L + 1 - l) of the
learning rate (arXiv 2106.08254; MAE, ViTDet). In InternImage the norm and the downsampling at the
end of a stage belong to the first block of the next one, the norm at the end of the last stage to
its last block, and a norm between blocks to the block before it. Only names count, so it makes no
difference whether parameters are partitioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from m3i_scale.models.intern_image import InternImage, Stage
from m3i_scale.models.vit import ViT

# Parts of the names of parameters that move sampling points or blend what was sampled.
_DEFORMATION = (".dcn.offset.", ".dcn.center_feature_scale_proj_")


def layer_scales(
    networks: nn.Module, decay: float, *, deformation: float = 1.0, own_ends: bool = True
) -> dict[str, float]:
    """Factor of the learning rate for every parameter of `networks`, by its name.

    Every ViT and InternImage inside is found; what belongs to none has factor 1.

    Args:
        networks: one or several backbones and whatever reads their features.
        decay: factor from one layer to the one before it, above 0 and at most 1; 1: none.
        deformation: further factor of the offsets and the centre scale in InternImage's blocks; its
            classifiers of size L to G are fine-tuned with 0.1.
        own_ends: embedding and heads are layers; without, they share the factors of the first and
            of the last block, which InternImage's classifiers are fine-tuned with.

    Raises:
        ValueError: a factor is out of bounds.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer decay {decay}: must be above 0 and at most 1")
    if not 0 < deformation <= 1:
        raise ValueError(f"factor of the deformation {deformation}: must be above 0 and at most 1")
    scales = {name: 1.0 for name, _ in networks.named_parameters()}
    for path, module in networks.named_modules():
        if isinstance(module, InternImage | ViT):
            blocks, layers = layer_numbers(module)
            first, last = (0, blocks + 1) if own_ends else (1, blocks)
            for name, layer in layers.items():
                scale = decay ** (last - min(max(layer, first), last))
                if any(part in name for part in _DEFORMATION):
                    scale *= deformation
                scales[f"{path}.{name}" if path else name] = scale
    return scales


def layer_numbers(backbone: InternImage | ViT) -> tuple[int, dict[str, int]]:
    """Number of blocks L, and the layer of each parameter, 0 to L + 1, by its name."""
    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, ViT):
        blocks = len(backbone.blocks)
        return blocks, {name: _of_vit(name, blocks) for name in names}
    stages = cast(Sequence[Stage], backbone.levels)
    depths = [len(stage.blocks) for stage in stages]
    blocks = sum(depths)
    layers = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "levels":
            stage = int(parts[1])
            before = sum(depths[:stage])
            if parts[2] == "blocks":
                layers[name] = before + int(parts[3]) + 1
            elif parts[2] == "post_norms":
                layers[name] = before + stages[stage].post_norm_ids[int(parts[3])] + 1
            else:
                layers[name] = min(before + depths[stage] + 1, blocks)
        else:
            layers[name] = 0 if parts[0] == "patch_embed" else blocks + 1
    return blocks, layers


def _of_vit(name: str, blocks: int) -> int:
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    return 0 if parts[0] == "patch_embed" else blocks + 1
