"""Positions of the patches of a target view in the grid of the input view (after arXiv 2206.01204).

Positions are float32 (..., 4): y, x in patches of the input view (0, 0 is the centre of its first
patch), 10 log dh, 10 log dw with dh, dw the size of a target patch in patches of the input view.
"""

import torch
from torch import Tensor

Grid = tuple[int, int]


def grid_positions(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Positions (h * w, 4), row-major, of the patches of a view in its own grid (h, w)."""
    y = torch.arange(grid[0], device=device, dtype=torch.float32)
    x = torch.arange(grid[1], device=device, dtype=torch.float32)
    y, x = torch.meshgrid(y, x, indexing="ij")
    scale = torch.zeros_like(y)
    return torch.stack([y, x, scale, scale], -1).flatten(0, 1)


def relative_positions(
    input_box: Tensor,
    input_flip: Tensor,
    target_box: Tensor,
    target_flip: Tensor,
    grid: Grid,
    target_grid: Grid | None = None,
) -> Tensor:
    """Positions (B, N, 4) of the N patches of each target view, row-major, in its input view.

    Boxes (B, 4) are top, left, height, width of the crops in pixels of the source image, before
    flipping; flips (B,) bool are horizontal. `grid` is that of the input view, rows and columns,
    and, if `target_grid` is not given, of the target view too.

    A target patch is followed from its view into the source image and from there into the input
    view. Without flips that is y = (r + 0.5) dh + di - 0.5 with (di, dj) the distance of the
    crops' origins, x alike; a flipped input view mirrors x inside it, and a flipped target view
    runs through its columns from the crop's right edge (so di, dj of two flipped views is the
    distance of their top-right corners).
    """
    target_grid = target_grid or grid
    unflipped = torch.zeros_like(input_flip)
    y, dh = _axis(
        input_box[:, ::2], unflipped, grid[0], target_box[:, ::2], unflipped, target_grid[0]
    )
    x, dw = _axis(
        input_box[:, 1::2], input_flip, grid[1], target_box[:, 1::2], target_flip, target_grid[1]
    )
    rows, columns = y.shape[1], x.shape[1]
    y = y[:, :, None].expand(-1, -1, columns)  # (B, h, w)
    x = x[:, None, :].expand(-1, rows, -1)
    scales = 10 * torch.stack([dh, dw], -1).log()  # (B, 2)
    scales = scales[:, None, None].expand(-1, rows, columns, -1)
    return torch.cat([y[..., None], x[..., None], scales], -1).flatten(1, 2)


def _axis(
    input_span: Tensor,
    input_flip: Tensor,
    input_cells: int,
    target_span: Tensor,
    target_flip: Tensor,
    target_cells: int,
) -> tuple[Tensor, Tensor]:
    """Coordinates (B, target_cells) and scale (B,) along one axis; spans (B, 2) are start, size."""
    start, size = input_span.float()[:, :, None].unbind(1)  # (B, 1)
    target_start, target_size = target_span.float()[:, :, None].unbind(1)
    centre = (torch.arange(target_cells, device=size.device) + 0.5) / target_cells
    centre = torch.where(target_flip[:, None], 1 - centre, centre)  # fraction of the target crop
    centre = ((target_start - start) + centre * target_size) / size  # fraction of the input crop
    centre = torch.where(input_flip[:, None], 1 - centre, centre)  # fraction of the input view
    scale = (target_size / target_cells) / (size / input_cells)
    return centre * input_cells - 0.5, scale[:, 0]


def sincos_embedding(coordinates: Tensor, width: int) -> Tensor:
    """Sines and cosines (..., width) of coordinates (...), wavelengths 2 pi to 20000 pi."""
    if width < 2 or width % 2:
        raise ValueError(f"width={width} of a sine-cosine embedding: must be even")
    exponent = torch.arange(width // 2, device=coordinates.device) / (width // 2)
    angles = coordinates[..., None] * 10000.0**-exponent
    return torch.cat([angles.sin(), angles.cos()], -1)


def position_embedding(positions: Tensor, width: int) -> Tensor:
    """Embed positions (..., 4) as (..., 2 * width): four sine-cosine parts of width / 2 each."""
    return sincos_embedding(positions.float(), width // 2).flatten(-2)


def grid_embedding(
    grid: Grid, width: int, device: torch.device | None = None, trained_side: int | None = None
) -> Tensor:
    """Fixed 2-D sine-cosine embedding (h * w, width) of a view's own patches: y half, x half.

    With `trained_side` the grid is laid over one of that many rows and columns, which a network
    was trained on: it sees the coordinates that it knows, in finer steps where h, w are larger.
    """
    positions = grid_positions(grid, device)
    if trained_side is not None:
        positions = on_trained_grid(positions, grid, trained_side)
    return sincos_embedding(positions[:, :2], width // 2).flatten(-2)


def on_trained_grid(positions: Tensor, grid: Grid, side: int) -> Tensor:
    """Positions (..., 4) in patches of a grid (h, w), in those of one of side x side patches.

    Both grids cover the same view: patches of another resolution lie between the coordinates that
    a network was trained on. Sizes of target patches are shares of patches of the input view,
    which are the same at every resolution.
    """
    if grid == (side, side):
        return positions  # to the bit
    y, x, *scales = positions.unbind(-1)
    rescaled = [(at + 0.5) * (side / n) - 0.5 for at, n in zip((y, x), grid, strict=True)]
    return torch.stack([*rescaled, *scales], -1)
