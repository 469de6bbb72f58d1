"""ViTs of timm and transformers under the names of `m3i_scale.models.vit.ViT`, which are timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from m3i_scale.integrations.folders import Entry
from m3i_scale.models.positions import grid_embedding

# transformers' names (ViT, ViTMAE, VitDet) -> timm's
_RENAMED = (
    (r"^(?:vit|model|backbone)\.", ""),
    (r"^embeddings\.(?:patch_embeddings\.)?projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(qkv|proj)\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_QKV = ("query", "key", "value")


def timm_name(name: str) -> str:
    """What timm calls a tensor of a ViT of transformers; its own names stay."""
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def timm_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """All tensors under timm's names; queries, keys and values of a block become one."""
    named = {timm_name(name): entry for name, entry in entries.items()}
    for name in [name for name in named if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in _QKV]
        if all(part in named for part in parts):
            named[name.replace(".query.", ".qkv.")] = _joined([named.pop(part) for part in parts])
    return named


def _joined(parts: list[Entry]) -> Entry:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(shape, lambda: torch.cat([part.load() for part in parts]))


def compare_positions(entries: Mapping[str, Entry], trained_side: int | None = None) -> str:
    """How the stored position embedding differs from the computed one, as a sentence.

    That is of the stored grid, or laid over one of `trained_side` rows and columns.
    """
    if any(
        _positions_are(entries, exchanged=False, trained_side=side) for side in (None, trained_side)
    ):
        return "its positions are those that this ViT computes"
    if has_x_first(entries):
        return (
            "its positions have x before y: the halves of its channels are exchanged, with which "
            "it computes the same"
        )
    return "its positions were learned; this ViT computes sines and cosines instead"


def has_x_first(entries: Mapping[str, Entry]) -> bool:
    """Whether the stored positions are sines and cosines of x, then of y, as MAE has them."""
    return _positions_are(entries, exchanged=True)


def _positions_are(
    entries: Mapping[str, Entry], *, exchanged: bool, trained_side: int | None = None
) -> bool:
    """Whether `pos_embed` (1, T, D), after class and other tokens, is the computed one."""
    if "pos_embed" not in entries or len(entries["pos_embed"].shape) != 3:
        return False
    stored = entries["pos_embed"].load()[0].float()
    tokens, width = stored.shape
    side = int(tokens**0.5)
    own = grid_embedding((side, side), width, trained_side=trained_side)
    if exchanged:
        own = own.roll(width // 2, 1)
    return torch.allclose(stored[tokens - side * side :], own, atol=1e-3)


# Weights whose rows, and whose columns, are channels between the blocks.
_ROWS = re.compile(r"^patch_embed\.proj\.|^norm\.|\.norm[12]\.|\.attn\.proj\.|\.mlp\.fc2\.")
_COLUMNS = re.compile(r"\.attn\.qkv\.weight$|\.mlp\.fc1\.weight$")


def exchange_halves(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The ViT whose channels between the blocks are those of `entries`, halves exchanged.

    It computes the same, with positions exchanged likewise: a permutation of channels passes
    through norms and sums, and into the weights of all layers.
    """
    return {name: _exchanged(name, entry) for name, entry in entries.items()}


def _exchanged(name: str, entry: Entry) -> Entry:
    axis = 0 if _ROWS.search(name) else 1 if _COLUMNS.search(name) else None
    if axis is None:
        return entry
    return Entry(entry.shape, lambda: entry.load().roll(entry.shape[axis] // 2, axis))
