"""Roles of the input's tokens: the image that a token shows, the target patch that it predicts."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from m3i_scale.config import Input
from m3i_scale.models.positions import Grid, relative_positions
from m3i_scale.objective.inputs import MixedBatch
from m3i_scale.objective.masks import PatchMask

View = Literal["a", "b"]


class Role(NamedTuple):
    """One image of the input: which sample and view it is, and which tokens show it."""

    sample: Tensor  # int64 (B,): row of the batch the image comes from
    seen: Tensor  # bool (B, N)
    visible: Tensor  # int64 (B, V): indices of the seen tokens
    hidden: Tensor  # int64 (B, N - V): indices of the others
    view: View = "a"  # of that sample, in the input


def view_of(image: str, shown: View, spec: Input) -> View:
    """The view of image "i" or "j" in an input that shows view `shown` of image i."""
    return other(shown) if image == "j" and spec.pairing == "self" else shown


def other(view: View) -> View:
    """The other one of a sample's two views."""
    return "b" if view == "a" else "a"


def target_view(target_view: str, role_view: View) -> View:
    """The view that a target's `view` means: "same" as in the input, or the "other" one."""
    return role_view if target_view == "same" else other(role_view)


def find_roles(
    mixed: MixedBatch, shown: View, spec: Input, hidden_tokens: int, tokens_per_patch: int
) -> dict[str, Role]:
    """The roles of image i and image j in the input that shows view `shown` of image i.

    `hidden_tokens`, how many of the N tokens do not show image i, is the same in every row.
    """
    k = tokens_per_patch
    seen = mixed.seen.repeat_interleave(k, 1).repeat_interleave(k, 2).flatten(1)  # (B, N)
    # Seen tokens first, in row-major order.
    order = torch.argsort((~seen).to(torch.uint8), dim=1, stable=True)
    first, last = order.split([order.shape[1] - hidden_tokens, hidden_tokens], dim=1)
    own = torch.arange(len(seen), device=seen.device)
    return {
        "i": Role(own, seen, first, last, shown),
        "j": Role(mixed.partner, ~seen, last, first, view_of("j", shown, spec)),
    }


def nearest_patches(role: Role, view: View, mixed: MixedBatch, grid: Grid) -> tuple[Tensor, Tensor]:
    """Where the visible tokens lie in view `view` of their image.

    Returns:
        The nearest patch of that view, int64 (B, V), and whether the token's centre is inside it.
    """
    own, target = mixed.crop(role.view, role.sample), mixed.crop(view, role.sample)
    places = take(relative_positions(*target, *own, grid)[..., :2], role.visible)  # (B, V, 2)
    nearest = places.round()
    size = nearest.new_tensor(grid)
    inside = ((nearest >= 0) & (nearest < size)).all(-1)
    row, column = nearest.long().clamp(min=0).unbind(-1)
    index = row.clamp(max=grid[0] - 1) * grid[1] + column.clamp(max=grid[1] - 1)
    return index, inside


@torch.no_grad()
def most_similar(features: Tensor, target: Tensor) -> Tensor:
    """For each token of features (B, V, D) the patch of target (B, N, D) of largest cosine: (B, V).

    The correspondence of DenseCL (arXiv 2011.09157, section 3.3).
    """
    unit = (nn.functional.normalize(x.float(), dim=-1) for x in (features, target))
    a, b = unit
    return (a @ b.transpose(1, 2)).argmax(-1)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens (B, N, D) at index (B, V): (B, V, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def patchify(image: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, row-major: (B, 3, H, W) -> (B, H/p * W/p, 3 * p * p)."""
    return nn.functional.unfold(image, patch, stride=patch).transpose(1, 2)


def count_tokens_per_patch(patch: int, stride: int) -> int:
    """Tokens along one side of a mask patch.

    Raises:
        ValueError: a token would show two images.
    """
    if patch % stride:
        raise ValueError(
            f"objective.input.patch {patch} is not a multiple of the backbone's stride {stride}: a "
            f"token would show both images of a mix; use {stride} or a multiple of it"
        )
    return patch // stride


def count_hidden_tokens(spec: Input, image_size: int, tokens_per_patch: int) -> int:
    """Tokens of each input that do not show image i.

    Raises:
        ValueError: the mask would hide all patches, or none.
    """
    if spec.corruption == "none":
        return 0
    return PatchMask.of(spec, image_size).hidden * tokens_per_patch**2
