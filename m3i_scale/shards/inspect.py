"""Looking at indexed shards: which samples are bad, and what the good ones look like."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m3i_scale.config import MAX_PIXELS, Source
from m3i_scale.data.bad_sample import BadSample, explain
from m3i_scale.data.index import Index
from m3i_scale.data.labels import names_by_number
from m3i_scale.data.make import Fault, Sample
from m3i_scale.data.sequential import central_square, source_of, walk
from m3i_scale.data.storage import StorageClient

__all__ = ["CheckReport", "check", "show", "source_of"]


@dataclass
class CheckReport:
    """Findings about the samples of one index; `bad` holds lines `cause, shard, key`."""

    samples: int = 0
    largest_category: int = -1
    causes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.samples:,} samples, {len(self.bad):,} bad"]
        return "\n".join([*lines, *(f"  {line}" for line in explain(self.causes))])

    def add(self, cause: str, shard: str, key: str) -> None:
        """Note one bad sample."""
        self.causes[cause] += 1
        self.bad.append((cause, shard, key))


_OUTCOMES = {"repaired": " (repaired)", "used other captions of": " (other captions are used)"}


def check(
    index: str,
    *,
    categories: int | None = None,
    storage: StorageClient | None = None,
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> CheckReport:
    """Read and decode every sample of an index; list what the index left out as well.

    With `categories` a sample is bad too whose category is not below that number.
    """
    source, report, repairs = source_of(index, storage), CheckReport(), list[Fault]()
    for shard, key, cause in Index(index, storage).problems():
        report.add(cause, shard, key)
    _check_lengths(Index(index, storage), storage or StorageClient(), report)
    total = Index(index, storage).samples
    found = walk(source, storage=storage, max_pixels=max_pixels, faults=repairs)
    for raw, sample in tqdm(found, total=total, unit="sample", disable=not progress):
        report.samples += 1
        if isinstance(sample, BadSample):
            report.add(sample.cause, raw.shard_name, raw.key)
            continue
        report.largest_category = max(report.largest_category, sample.category)
        if categories is not None and sample.category >= categories:
            cause = f"category {sample.category}, not below {categories}"
            report.add(cause, raw.shard_name, raw.key)
    report.causes.update(f"{fault.cause}{_OUTCOMES[fault.outcome]}" for fault in repairs)
    return report


def _check_lengths(index: Index, storage: StorageClient, report: CheckReport) -> None:
    """Note shards that have grown, shrunk or gone since: what was appended is in no sample."""
    for number in np.flatnonzero(index.counts).tolist():
        try:
            length = storage.size(index.url(number))
        except OSError:
            continue  # every sample of it will say so
        if length != index.shard_bytes[number]:
            report.add("shard of another length", index.shards[number], "")


def show(
    index: str,
    output: str,
    *,
    count: int = 48,
    seed: int = 0,
    classes: Mapping[int, str] | None = None,
    storage: StorageClient | None = None,
) -> None:
    """Draw a contact sheet of `count` samples with their targets, and histograms, to a PNG.

    `classes` names the categories; by default the index does, where its labels are names. The
    samples are consecutive runs from all over the source, so that a sorted one shows as such.
    """
    from matplotlib.figure import Figure

    source = source_of(index, storage)
    classes = classes or names_by_number(Index(index, storage).classes)
    samples = [s for s in _spread(source, count, seed, storage) if isinstance(s, Sample)]
    columns = 8
    rows = -(-max(1, len(samples)) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * rows + 3.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.4 * rows, 3.5])
    sheet, charts = parts
    pictures = sheet.subplots(rows, columns, squeeze=False).flat
    for axes, sample in zip(pictures, samples, strict=False):
        axes.imshow(central_square(sample.image, 160).numpy())
        axes.set_title(_title(sample, classes), fontsize=7)
    for axes in sheet.axes:
        axes.axis("off")
    _histograms(charts.subplots(1, 3), Index(index, storage), samples, classes)
    figure.suptitle(f"{index}: {Index(index, storage).samples:,} samples ({source.kind})")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Path(output).write_bytes(buffer.getvalue())


def _spread(
    source: Source, count: int, seed: int, storage: StorageClient | None
) -> Iterator[Sample | BadSample]:
    total = Index(source.index, storage).samples
    runs = max(1, count // 4)
    starts = np.sort(np.random.default_rng(seed).integers(0, max(1, total - 4), runs))
    for start in starts.tolist():
        for _, sample in walk(source, start=start, limit=-(-count // runs), storage=storage):
            yield sample


def _title(sample: Sample, classes: Mapping[int, str]) -> str:
    words = []
    if sample.category >= 0:
        words.append(classes.get(sample.category, f"{sample.category}"))
    words.append(sample.text or "")
    if sample.others:
        words.append(f"and {len(sample.others)} more")
    lines = textwrap.wrap(": ".join(word for word in words if word), 28)[:3]
    return "\n".join(lines).replace("$", r"\$")


def _histograms(  # type: ignore[no-untyped-def]
    axes, index: Index, samples: list[Sample], classes: Mapping[int, str]
) -> None:
    sizes = [max(sample.image.shape[:2]) for sample in samples]
    axes[0].hist(sizes, bins=20)
    axes[0].set_title("longer side of the images shown, pixels")
    axes[1].hist(index.counts, bins=20)
    axes[1].set_title("samples per shard")
    categories = Counter(sample.category for sample in samples if sample.category >= 0)
    if categories:
        names = [classes.get(c, str(c)) for c in categories]
        axes[2].bar(names, list(categories.values()))
        axes[2].tick_params(axis="x", rotation=60, labelsize=6)
        axes[2].set_title("categories of the samples shown")
    else:
        axes[2].hist([len((sample.text or "").split()) for sample in samples], bins=20)
        axes[2].set_title("words per caption of the samples shown")
