"""Pictures of a run: retrieval.png (nearest captions and images) and curves.png (metrics)."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from m3i_scale.transfer import knn, zero_shot
from m3i_scale.transfer.evaluation import Evaluation
from m3i_scale.transfer.features import Place, read_image
from m3i_scale.transfer.labels import categories, rows_with, subject, subjects

RIGHT, WRONG = "#1a7f37", "#b42318"
_PANELS = {
    "losses": ("loss/",),
    "evaluation: accuracy, %": (
        "evaluation/knn",
        "evaluation/zero_shot",
        "evaluation/classifier",
    ),
    "evaluation: effective rank of the features": ("evaluation/rank",),
    "accuracy within the batch": ("accuracy/",),
    "lambda and gradient norms at the features": ("balance/", "gradient/ssp", "gradient/sp"),
    "spread of the targets": ("spread/",),
    "effective rank of the targets": ("rank/",),
    "effective rank of the predictions": ("rank_prediction/",),
    "effective rank and spread of the student's pooled features": ("student/",),
    "constant share of the targets": ("constant/",),
    "mask-token use": ("mask_token_use/",),
    "temperature": ("temperature/",),
    "learning rate": ("learning_rate",),
}
_LOGARITHMIC = ("lambda", "temperature")


# ---------------------------------------------------------------------------------------- retrieval


def save_retrieval(
    path: Path, evaluation: Evaluation, image_size: int, *, rows: int = 8, columns: int = 5
) -> None:
    """Draw held-out queries with their nearest captions and nearest gallery images.

    The queries are a fixed random choice, neither the best nor the worst. Green: the caption's
    subject is the query's, red: it is not. Gallery images without a caption are passed over;
    where captions cannot be compared at all, categories are.

    Args:
        path: the PNG to write.
        evaluation: of a run.
        image_size: side at which images are drawn, in pixels.
        rows: queries.
        columns: captions and images for each.
    """
    chosen = _choice(len(evaluation.queries), rows)
    found = _neighbours(evaluation, chosen, columns)

    def image_at(place: Place) -> Any:
        return read_image(place, image_size, evaluation.storage).numpy()

    has_captions = evaluation.caption_embeddings is not None
    widths = [1.0, *([2.9] if has_captions else []), *[1.0] * columns]
    figure = _figure(1.25 * sum(widths), 1.35 * len(chosen) + 0.5)
    axes = figure.subplots(len(chosen), len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("query", fontsize=9)
    axes[0, 1 + has_captions].set_title("nearest gallery images", fontsize=9, loc="left")
    if has_captions:
        axes[0, 1].set_title("nearest captions", fontsize=9, loc="left")
    for row, query in enumerate(chosen):
        axes[row, 0].imshow(image_at(evaluation.queries.places[query]))
        _name(axes[row, 0], subject(evaluation.queries.captions[query]))
        if has_captions:
            _write_captions(axes[row, 1], evaluation, query, columns)
        for axis, (image, right) in zip(axes[row, 1 + has_captions :], found[row], strict=False):
            axis.imshow(image_at(evaluation.gallery.places[image]))
            _frame(axis, RIGHT if right else WRONG)
    figure.savefig(path, dpi=110)


def _choice(total: int, rows: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=generator)[:rows].tolist()


def _name(axis: Any, text: str) -> None:
    short = textwrap.shorten(text, 28, placeholder=" …")
    axis.text(0.5, -0.02, short, fontsize=6, ha="center", va="top", transform=axis.transAxes)


def _frame(axis: Any, colour: str) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2.5)


def _write_captions(axis: Any, evaluation: Evaluation, query: int, k: int) -> None:
    assert evaluation.query_texts is not None
    assert evaluation.caption_embeddings is not None
    cosine, index = zero_shot.nearest_captions(
        evaluation.query_texts[query : query + 1], evaluation.caption_embeddings, k
    )
    truth = evaluation.queries.captions[query]
    for line, (value, i) in enumerate(zip(cosine[0].tolist(), index[0].tolist(), strict=True)):
        caption = evaluation.captions[i]
        colour = RIGHT if subject(caption) == subject(truth) else WRONG
        text = f"{value:.2f} {textwrap.shorten(caption, 48, placeholder=' …')}"
        height = 0.92 - 0.2 * line
        axis.text(0, height, text, fontsize=7, va="center", color=colour, transform=axis.transAxes)


def _neighbours(
    evaluation: Evaluation, chosen: Sequence[int], k: int
) -> list[list[tuple[int, bool]]]:
    """For each query the k nearest gallery images that can be judged, and whether they are right.

    They are judged by the first kind of label that both sides carry; no images where there is none.
    """
    for labelling in (subjects, categories):
        wanted, known = labelling(evaluation.queries), labelling(evaluation.gallery)
        rows = rows_with(known)
        if len(rows) and len(rows_with(wanted)):
            features = evaluation.query_features[list(chosen)], evaluation.gallery_features[rows]
            nearest = rows[knn.neighbours(*features, k)[1]].tolist()
            return [
                [(image, known[image] == wanted[query]) for image in images]
                for query, images in zip(chosen, nearest, strict=True)
            ]
    return [[] for _ in chosen]


# ------------------------------------------------------------------------------------------- curves


def save_curves(path: Path, metrics: Path) -> None:
    """Draw the figures of a run's metrics.jsonl over its steps.

    Raises:
        ValueError: the file holds no step.
    """
    lines = read_metrics(metrics)
    steps = [int(line["step"]) for line in lines]
    names = sorted({name for line in lines for name in line})
    panels = {
        title: chosen
        for title, starts in _PANELS.items()
        if (chosen := [name for name in names if name.startswith(starts)])
    }
    columns = 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(5.5 * columns, 2.8 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, chosen) in zip(axes, panels.items(), strict=False):
        for name in chosen:
            values = [float(line.get(name, math.nan)) for line in lines]
            label = name.split("/", 1)[-1].replace("_", " ")
            if name.startswith("evaluation/"):  # of some steps only
                points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
                axis.plot(*zip(*points, strict=True), "o-", linewidth=1.2, ms=3, label=label)
            else:
                axis.plot(steps, smooth(values), linewidth=1.2, label=label)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if title.startswith(_LOGARITHMIC):
            axis.set_yscale("log")
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.savefig(path, dpi=110)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl by step, the latest of each: a resumed run repeats some.

    Raises:
        ValueError: there is no such file, or no complete line in it.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the metrics ({error.strerror})") from None
    by_step: dict[int, dict[str, float]] = {}
    for line in text.splitlines():
        try:
            values = json.loads(line)
            by_step[int(values["step"])] = values
        except (ValueError, KeyError, TypeError):
            continue  # a crash can cut a line short
    if not by_step:
        raise ValueError(f"{path} holds no step")
    return [by_step[step] for step in sorted(by_step)]


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Mean of the finite values in a centred window of `share` of all."""
    reach = int(len(values) * share / 2)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [_mean([v for v in window if math.isfinite(v)]) for window in windows]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
