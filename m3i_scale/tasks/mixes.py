"""A sheet of what the networks are shown: inputs, masks, mixes and target views."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from m3i_scale.objective.inputs import MixedBatch

Colour = tuple[float, float, float]


def save_mixes(
    path: Path, view: MixedBatch, mean: Colour, std: Colour, patch: int, rows: int = 6
) -> None:
    """Write a picture with one row per mix and the columns named at its top."""
    # Not needed by every start, of which there may be many, and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    i, j = torch.arange(len(view.image)), view.partner.cpu()
    mask = view.seen.float().repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    clean_a, clean_b = (_pixels(v, mean, std) for v in (view.clean_a, view.clean_b))
    columns = {
        "image i": clean_a[i],
        "image j": clean_a[j],
        "mask (white: i)": mask[..., None].expand(-1, -1, -1, 3).cpu(),
        "input": _pixels(view.image, mean, std),
        "other view of i": clean_b[i],
        "other view of j": clean_b[j],
    }
    rows = min(rows, len(i))
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(images[row].numpy())
            axes[row, column].set_axis_off()
    figure.savefig(path, dpi=110)


def _pixels(images: Tensor, mean: Colour, std: Colour) -> Tensor:
    """Undo the normalisation: (B, 3, H, W) -> (B, H, W, 3) in [0, 1] on the CPU."""
    channels = images.float().cpu().permute(0, 2, 3, 1)
    return (channels * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
