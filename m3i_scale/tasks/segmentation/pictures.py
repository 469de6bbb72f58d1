"""Pictures of a test: images with truth and prediction, the worst of them, the confusion matrix."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from m3i_scale.config.segmentation import IGNORED
from m3i_scale.tasks.segmentation.evaluation import Result
from m3i_scale.tasks.segmentation.tiles import Tile

_LEGEND = 24  # classes in it at most
_MATRIX = 40  # classes in a confusion matrix at most


def save_pictures(folder: Path, result: Result, name: Callable[[int], str]) -> list[Path]:
    """Write predictions.png, worst.png and confusion.png into a folder; the paths written.

    Args:
        folder: is made if it is not there.
        result: of a test.
        name: of an image by its number in the set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, tiles in (("predictions", result.tiles.chosen), ("worst", result.tiles.worst)):
        if tiles:
            path = folder / f"{file}.png"
            save_predictions(path, tiles, result.names, name)
            written.append(path)
    path = folder / "confusion.png"
    save_confusion(path, result.confusion, result.names)
    return [*written, path]


def save_predictions(
    path: Path, tiles: Sequence[Tile], names: Sequence[str], name: Callable[[int], str]
) -> None:
    """Draw a row of each tile: the image, its mask, the prediction; a legend of the classes."""
    colours = palette(len(names))
    figure = _figure(8.4, 2.15 * len(tiles) + 0.4)
    axes = figure.subplots(len(tiles), 3, squeeze=False)
    for row, (index, right, tile) in zip(axes, tiles, strict=True):
        picture = tile.numpy()
        shown = [picture[:3].transpose(1, 2, 0), colours[picture[3]], colours[picture[4]]]
        for axis, content in zip(row, shown, strict=True):
            axis.imshow(content)
            axis.set_axis_off()
        for axis, text in ((row[0], name(index)), (row[2], f"{100 * right:.1f} % of pixels right")):
            axis.text(0, -0.02, text, fontsize=6, va="top", transform=axis.transAxes)
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=8)
    figure.legend(
        handles=_legend([tile for _, _, tile in tiles], names, colours),
        loc="outside right upper",
        fontsize=7,
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def _legend(tiles: Sequence[Tensor], names: Sequence[str], colours: Any) -> list[Patch]:
    """Classes in masks and predictions, the most frequent first."""
    counts = torch.bincount(torch.stack(list(tiles))[:, 3:].flatten().long(), minlength=256)
    order = counts[:IGNORED].argsort(descending=True, stable=True)[:_LEGEND].tolist()
    shown = [i for i in order if counts[i] and i < len(names)]
    patches = [Patch(color=colours[i] / 255, label=names[i]) for i in shown]
    return [*patches, Patch(facecolor=colours[IGNORED] / 255, edgecolor="grey", label="no class")]


def save_confusion(path: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """Draw the shares of each class's pixels by prediction; of many classes the most frequent."""
    frequent = confusion.sum(1).argsort(descending=True, stable=True)[:_MATRIX].sort().values
    part = confusion[frequent][:, frequent].double()
    share = part / confusion.sum(1)[frequent, None].clamp(min=1)
    labels = [names[i] for i in frequent.tolist()]
    side = max(3.2, 0.28 * len(labels) + 1.6)
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    shown = axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axis.set_yticks(range(len(labels)), labels, fontsize=6)
    axis.set(xlabel="predicted", ylabel="true")
    if len(labels) <= 12:
        for row in range(len(labels)):
            for column in range(len(labels)):
                value = float(share[row, column])
                colour = "black" if value > 0.5 else "white"
                text = f"{100 * value:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(shown, label="share of the true class's pixels")
    figure.savefig(path, dpi=110)


def palette(classes: int) -> Any:
    """Colours of classes as uint8 (256, 3); neighbours differ, no class is white."""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    for number in range(classes):
        hue = number * 0.618033988749895 % 1  # the golden ratio spreads any number of hues
        value = (0.85, 0.6, 1.0)[number % 3]
        rgb = colorsys.hsv_to_rgb(hue, (0.75, 0.9, 0.5)[number // 3 % 3], value)
        colours[number] = [round(255 * channel) for channel in rgb]
    return colours


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
