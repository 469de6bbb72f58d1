"""Pictures of an evaluation: detections beside the truth, worst errors, precision and recall."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from m3i_scale.data.bad_sample import BadSample
from m3i_scale.tasks.detection.annotation_faults import clipped
from m3i_scale.tasks.detection.coco import Annotation, CocoFile
from m3i_scale.tasks.detection.dataset import TestImages, decoded_mask
from m3i_scale.tasks.detection.evaluation import Result, precision_recall

RIGHT, WRONG = "#1a7f37", "#b42318"
_OVERLAP = 0.5  # from which a detection of the right category counts as right
_SHOWN = 0.3  # least score of a drawn detection
_PIXELS = 320  # around an error
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")


class Mistake(NamedTuple):
    """One error: the image's position, the box, what is wrong, and how badly (0 to 1)."""

    image: int
    box: tuple[float, float, float, float]
    words: str
    weight: float


def save_detections(
    path: Path, images: TestImages, results: Sequence[Result], *, count: int = 6, seed: int = 0
) -> None:
    """Draw images with their truth on the left and what was detected on the right.

    The images are a fixed random choice, neither the best nor the worst; detections with a score
    below 0.3 are left out.
    """
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    found = _by_image(results)
    rows = [(i, image) for i in chosen.tolist() if (image := _image(images, i)) is not None]
    figure = _figure(8.0, 3.4 * max(1, len(rows)))
    axes = figure.subplots(max(1, len(rows)), 2, squeeze=False)
    names = images.categories
    for row, (index, image) in zip(axes, rows, strict=False):
        entry = images.file.images[index]
        for axis, title in zip(row, ("truth", "detected"), strict=True):
            axis.imshow(image)
            axis.set_title(f"{title}, {entry.file}"[-48:], fontsize=7)
        for thing in images.file.annotations(index):
            mask = decoded_mask(thing, entry) if images.masks and thing.segmentation else None
            name = names[thing.category] + (" (crowd)" if thing.crowd else "")
            _draw(row[0], thing.box, name, _colour(thing.category), mask)
        for result in found.get(entry.id, []):
            if result["score"] < _SHOWN:
                continue
            number = _number(images.file, result)
            box, words = clipped(result["bbox"], entry), f"{names[number]} {result['score']:.2f}"
            if box is not None:
                _draw(row[1], box, words, _colour(number), _mask(result))
    _save(figure, axes, path)


def save_mistakes(
    path: Path, images: TestImages, results: Sequence[Result], *, count: int = 24
) -> None:
    """Draw the worst errors: sure detections of nothing or another category, missed objects."""
    worst = mistakes(images.file, results)[:count]
    columns = 6
    rows = max(1, -(-len(worst) // columns))
    figure = _figure(1.9 * columns, 2.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, mistake in zip(axes.flat, worst, strict=False):
        image = _image(images, mistake.image)
        if image is None:
            continue
        axis.imshow(image)
        _draw(axis, mistake.box, "", WRONG, None)
        _zoom(axis, mistake.box, image.shape[1], image.shape[0])
        words = f"{mistake.words} (score {mistake.weight:.2f})"
        words = mistake.words if mistake.words.startswith("missed ") else words
        axis.set_title("\n".join(textwrap.wrap(words, 26)), fontsize=6)
    if not worst:
        axes[0, 0].set_title("no errors", fontsize=8)
    _save(figure, axes, path)


def save_curves(
    path: Path, file: CocoFile, results: Sequence[Result], kinds: Iterable[str]
) -> None:
    """Draw precision over recall at overlaps of 0.5, 0.75 and 0.9, mean over the categories."""
    kinds = list(kinds)
    figure = _figure(4.6 * len(kinds), 4.0)
    axes = figure.subplots(1, len(kinds), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        recall, thresholds, precision = precision_recall(file, results, kind)
        for threshold in (0.5, 0.75, 0.9):
            row = precision[int((thresholds - threshold).abs().argmin())]
            known = row[:, (row >= 0).all(0)]
            if known.numel():
                mean = known.mean(1)
                label = f"overlap {threshold}: AP {float(mean.mean()):.3f}"
                axis.plot(recall.numpy(), mean.numpy(), label=label)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=kind)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, loc="lower left")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def mistakes(file: CocoFile, results: Sequence[Result]) -> list[Mistake]:
    """All errors, the worst first: of a detection its score counts, a missed object counts 0.5.

    Detections are matched one to one with objects of their category that they overlap by 0.5 or
    more, the surest first; what lies in a crowd is no error.
    """
    found, errors = _by_image(results), []
    for index, entry in enumerate(file.images):
        detections = sorted(found.get(entry.id, []), key=lambda r: -r["score"])
        errors += list(_of_image(file, index, file.annotations(index), detections))
    return sorted(errors, key=lambda mistake: -mistake.weight)


def _of_image(
    file: CocoFile, index: int, things: Sequence[Annotation], detections: Sequence[Result]
) -> Iterable[Mistake]:
    names = [category.name for category in file.categories]
    entry, free = file.images[index], {i for i, thing in enumerate(things) if not thing.crowd}
    boxes = torch.tensor([thing.box for thing in things]).reshape(-1, 4)
    for result in detections:
        box = clipped(result["bbox"], entry)
        if box is None:
            continue
        number = _number(file, result)
        overlaps = box_iou(torch.tensor([box]), boxes)[0]
        same = [i for i in free if things[i].category == number and overlaps[i] >= _OVERLAP]
        if same:
            free.remove(max(same, key=lambda i: float(overlaps[i])))
        elif not _in_crowd(things, box, number):
            yield Mistake(
                index, box, _words(names, number, things, overlaps, free), result["score"]
            )
    for i in sorted(free):
        thing = things[i]
        yield Mistake(index, thing.box, f"missed {names[thing.category]}", 0.5)


def _words(
    names: Sequence[str],
    number: int,
    things: Sequence[Annotation],
    overlaps: Tensor,
    free: set[int],
) -> str:
    nearest = int(overlaps.argmax()) if len(things) else -1
    if nearest < 0 or overlaps[nearest] < 0.1:
        return f"{names[number]} where nothing is"
    thing = things[nearest]
    if thing.category != number:
        return f"{names[number]}, is {names[thing.category]}"
    found = f"{names[number]}, overlap {float(overlaps[nearest]):.2f}"
    return found if nearest in free else f"{names[number]} twice"


def _in_crowd(
    things: Sequence[Annotation], box: tuple[float, float, float, float], number: int
) -> bool:
    """Whether half of a detection lies in a crowd of its category."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    for thing in things:
        if thing.crowd and thing.category == number:
            wide = min(box[2], thing.box[2]) - max(box[0], thing.box[0])
            high = min(box[3], thing.box[3]) - max(box[1], thing.box[1])
            if wide > 0 and high > 0 and wide * high >= _OVERLAP * area:
                return True
    return False


def _by_image(results: Sequence[Result]) -> dict[int, list[Result]]:
    found: dict[int, list[Result]] = {}
    for result in results:
        found.setdefault(result["image_id"], []).append(result)
    return found


def _number(file: CocoFile, result: Result) -> int:
    return next(i for i, c in enumerate(file.categories) if c.id == result["category_id"])


def _image(images: TestImages, index: int) -> npt.NDArray[np.uint8] | None:
    try:
        return images.read(index)[0].permute(1, 2, 0).numpy()
    except BadSample:
        return None


def _mask(result: Result) -> npt.NDArray[Any] | None:
    from faster_coco_eval.core import mask as coco_mask

    runs = result.get("segmentation")
    return None if runs is None else np.asarray(coco_mask.decode(runs)).astype(bool)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _draw(
    axis: Axes,
    box: tuple[float, float, float, float],
    words: str,
    colour: str,
    mask: npt.NDArray[Any] | None,
) -> None:
    left, top, right, bottom = box
    axis.plot(
        [left, right, right, left, left], [top, top, bottom, bottom, top], color=colour, lw=1.2
    )
    if mask is not None:
        layer = np.zeros((*mask.shape, 4))
        layer[mask] = [*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 0.45]
        axis.imshow(layer)
    if words:
        label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        axis.text(left, top, words, fontsize=5, color="white", va="bottom", bbox=label)


def _zoom(axis: Axes, box: tuple[float, float, float, float], width: int, height: int) -> None:
    """Show the surroundings of a box."""
    left, top, right, bottom = box
    half = max(_PIXELS / 2 if max(width, height) > 2 * _PIXELS else 0, right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    axis.set_xlim(max(0, x - half), min(width, x + half))
    axis.set_ylim(min(height, y + half), max(0, y - half))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, axes: Any, path: Path) -> None:
    for axis in axes.flat:
        axis.set_axis_off()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
