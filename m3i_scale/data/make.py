"""Raw bytes -> one worker's part of a micro-batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.config import Data, Source
from m3i_scale.data import decode, views
from m3i_scale.data.bad_sample import BadSample, OfOneRank, explain, remedy
from m3i_scale.data.batch import PHOTOMETRIC_FIELDS, Batch
from m3i_scale.data.caption_choice import Draw, choose
from m3i_scale.data.index import Index
from m3i_scale.data.members import kinds_of
from m3i_scale.data.order import Order
from m3i_scale.data.reader import Raw, ReadCount, ShardReader

_MOST_SUBSTITUTES = 32


class TooManyBadSamples(OfOneRank, RuntimeError):  # noqa: N818  (the name is the message)
    """More samples had to be replaced than the configuration tolerates."""


class BadSampleLimit:
    """Counts the bad samples of a rank, and stops where they are too many.

    Args:
        rate: share of replaced samples above which it does, `max_bad_rate`.
        window: samples over which it is measured, `bad_window`.

    Attributes:
        faults: Counter of causes, so far.
    """

    def __init__(self, rate: float, window: int) -> None:
        self._rate, self._window = rate, window
        self.faults: Counter[str] = Counter()
        self._seen = self._replaced = 0

    def note(self, cause: str, words: str, *, replaced: bool) -> None:
        """Count a bad sample; raises TooManyBadSamples."""
        self.faults[cause] += 1
        self._replaced += replaced
        if self._replaced > self._rate * self._window:
            raise TooManyBadSamples(
                f"{self._replaced} of the last {self._window} samples of this rank could not be "
                f"used, more than max_bad_rate {self._rate} allows: "
                f"{'; '.join(explain(self.faults))}. The last one: {words}. Raise "
                "data.max_bad_rate where such a share may be lost."
            )

    def passed(self, samples: int) -> None:
        """So many samples went by, good or not."""
        self._seen += samples
        if self._seen >= self._window:
            self._seen = self._replaced = 0


@dataclass(frozen=True)
class Fault:
    """A finding about one sample: why it was replaced, or what was repaired in it."""

    position: int
    cause: str
    shard: str
    key: str
    detail: str
    # "replaced", "repaired", "passed over" as a substitute, or "used other captions of"
    outcome: str

    def __str__(self) -> str:
        return (
            f"{self.outcome} sample {self.key or '?'} of {self.shard} ({self.detail or self.cause})"
        )


@dataclass
class Part:
    """Some consecutive samples of a micro-batch, in the form that crosses process borders.

    The views of a worker process lie in shared memory that is there from the start and is used
    again and again; only the small arrays are sent.
    """

    views: Tensor | None  # uint8 (1 or 2, b, S, S, 3); None while it is on its way
    size: int  # S, the same in all parts of a step
    slot: int  # which of the worker's shared buffers holds the views
    arrays: dict[str, NDArray[Any]]
    key: list[str]
    faults: list[Fault] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.key)


def collate(parts: Sequence[Part], *, pin_memory: bool = False) -> Batch:
    """Join the parts of one micro-batch, in page-locked memory if asked; copies if it joins."""
    parts = [part for part in parts if len(part)] or parts[:1]
    joined = _join_views([part.views for part in parts if part.views is not None], pin_memory)
    tensors = {
        name: torch.from_numpy(np.concatenate([part.arrays[name] for part in parts]))
        for name in parts[0].arrays
    }
    if pin_memory:
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    photometric = [
        {name: tensors.pop(f"{name}_{view}") for name in PHOTOMETRIC_FIELDS} for view in "ab"
    ]
    return Batch(
        view_a=joined[0],
        view_b=joined[-1],
        photometric_a=photometric[0],
        photometric_b=photometric[1],
        key=[key for part in parts for key in part.key],
        **tensors,
    )


def _join_views(parts: list[Tensor], pin_memory: bool) -> Tensor:
    if len(parts) == 1 and not parts[0].is_shared() and not pin_memory:
        return parts[0]
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts), *parts[0].shape[2:])
    if pin_memory:
        joined = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    else:
        joined = empty_views(shape)
    return torch.cat(parts, dim=1, out=joined)


def views_in(flat: Tensor, views: int, samples: int, size: int) -> Tensor:
    """The beginning of uint8 memory (n,) as the views (views, samples, size, size, 3)."""
    shape = (views, samples, size, size, 3)
    return flat[: math.prod(shape)].view(shape)


def empty_views(shape: Sequence[int]) -> Tensor:
    """Uninitialised uint8 memory of a whole batch of views.

    From NumPy, which asks the kernel for huge pages: in small ones every batch of two views would
    meet some 50 page faults per sample.
    """
    return torch.from_numpy(np.empty(shape, dtype=np.uint8))


@dataclass
class Sample:
    """One decoded sample."""

    image: Tensor  # uint8 (H, W, 3)
    text: str | None
    category: int
    key: str
    others: tuple[str, ...] = ()  # its further captions, where all were asked for


def decode_sample(
    raw: Raw,
    source: Source,
    index: Index,
    *,
    max_pixels: int,
    faults: list[Fault],
    draw: Draw | None = None,
    every: bool = False,
) -> Sample:
    """Decode what the kind of the source asks for; repairs go to `faults`, BadSample is raised.

    `draw` decides among several captions (`caption_choice`); `every` reads all of them.
    """
    if raw.problem is not None:
        raise raw.problem
    shard = f"{source.name}/{raw.shard_name}"
    text, others, category = None, list[str](), -1
    if source.has_text:
        places = index.places[raw.shard] or ("txt",)
        found = dict(zip(kinds_of(places), (raw.text, *raw.more), strict=False))
        if source.captions is None and len(places) == 1:
            captions, repaired = decode.decode_captions(raw.text or b"", places[0])
            text, others = captions[0], captions[1:] if every else []
        else:
            weights = source.captions or dict.fromkeys(places, 1.0)
            drawn = None if source.captions is None else draw
            text, repaired, gaps, others = choose(found, weights, drawn, every=every)
            for gap in gaps:
                faults.append(Fault(raw.position, gap.cause, shard, raw.key, str(gap),
                                    "used other captions of"))  # fmt: skip
        if repaired:
            detail = "bad UTF-8: JSON spells half a character"
            faults.append(Fault(raw.position, "bad UTF-8", shard, raw.key, detail, "repaired"))
    if source.has_category:
        member = index.category_member[raw.shard] or "cls"
        category = decode.decode_category(raw.category or b"", member, index.classes)
    image = decode.decode_image(raw.image, max_pixels=max_pixels)
    return Sample(image, text, category, f"{shard}/{raw.key}", tuple(others))


class SampleBuilder:
    """Makes parts from positions: reads, decodes, replaces what is bad, cuts views, tokenises."""

    def __init__(
        self,
        data: Data,
        indexes: Sequence[Index],
        order: Order,
        reader: ShardReader,
        *,
        seed: int,
        tokenize: Callable[[list[str]], tuple[Any, Any]],
        mask_sampler: Callable[[np.random.Generator, int], NDArray[np.bool_]],
    ) -> None:
        self.data, self.indexes, self.order, self.reader = data, indexes, order, reader
        self.sources, self.augmentation = data.sources, data.augmentation
        self.random = views.Randomness(seed)
        self.tokenize, self.mask_sampler = tokenize, mask_sampler
        self._draws_captions = any(source.captions for source in data.sources)

    def parts(
        self,
        blocks: Iterable[NDArray[np.int64]],
        sizes: Iterable[int],
        buffers: Tensor | None = None,
    ) -> Iterator[Part]:
        """One part per block of positions, in order, its views of the next of the `sizes`.

        With shared `buffers` (slots, bytes) the views go there, slot after slot, and the parts come
        without them.
        """
        stream = self.reader.stream(self.order.locate(block) for block in blocks)
        before = vars(ReadCount())
        for number, (raws, size) in enumerate(zip(stream, sizes, strict=False)):
            shape = self.augmentation.views, len(raws), size
            if buffers is None:
                part = self.part(raws, empty_views((*shape, size, 3)))
            else:
                slot = number % len(buffers)
                part = self.part(raws, views_in(buffers[slot], *shape))
                part.views, part.slot = None, slot
            after = vars(self.reader.count).copy()  # it reads ahead meanwhile
            part.read = {name: after[name] - before[name] for name in after}
            before = after
            yield part

    @torch.inference_mode()  # nothing here is differentiated; operators start faster
    def part(self, raws: list[Raw], pixels: Tensor) -> Part:
        """Decode and augment raw samples; the views are written to `pixels` (views, b, S, S, 3)."""
        position = np.array([raw.position for raw in raws], dtype=np.int64)
        # Drawn for all samples first: between the large work on pixels it would take twice as long.
        size = pixels.shape[2]
        draws, mask, captions = self._draw(position, size)
        texts, categories, keys = list[str | None](), list[int](), list[str]()
        faults = list[Fault]()
        crops: list[list[views.Crop]] = [[] for _ in pixels]
        targets = [views.channels_first(view) for view in pixels]
        crop_draws = draws[:, :, : views.CROP_DRAWS].tolist()
        for i, raw in enumerate(raws):
            sample = self.sample(raw, faults, captions[i])
            for v, target in enumerate(targets):
                crops[v].append(self._view(target[i], sample.image, crop_draws[v][i]))
            texts.append(sample.text)
            categories.append(sample.category)
            keys.append(sample.key)
            del sample  # one decoded image at a time, however large they are
        arrays = {
            "mask": mask,
            "position": position,
            **self._geometry(crops),
            **self._targets(texts, categories),
            **self._photometric(draws),
        }
        return Part(pixels, size, 0, arrays, keys, faults)

    def _draw(
        self, position: NDArray[np.int64], size: int
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[Draw | None]]:
        """What is random at each of b positions: draws (views, b, DRAWS_PER_VIEW), masks, captions.

        Captions are drawn last, so that the rest is the same with one of them and with several.
        """
        draws = np.empty((len(position), 2, views.DRAWS_PER_VIEW))
        masks = []
        captions: list[Draw | None] = []
        for row, at in zip(draws, position.tolist(), strict=True):
            rng = self.random.at(at)
            rng.random(out=row)
            masks.append(self.mask_sampler(rng, size))
            captions.append((rng.random(), rng.random()) if self._draws_captions else None)
        mask = np.stack(masks) if masks else self.mask_sampler(self.random.at(0), size)[None][:0]
        return draws.swapaxes(0, 1)[: self.augmentation.views], mask, captions

    def _view(self, out: Tensor, image: Tensor, draws: list[float]) -> views.Crop:
        height, width, _ = image.shape
        crop = views.draw_crop(draws, height, width, self.augmentation)
        views.resize_into(out, image, crop, self.augmentation.interpolation)
        return crop

    def sample(self, raw: Raw, faults: list[Fault], draw: Draw | None = None) -> Sample:
        """Decode one sample or the first usable substitute of it; findings go to `faults`."""
        for attempt in range(_MOST_SUBSTITUTES):
            try:
                return decode_sample(
                    raw,
                    self.sources[raw.source],
                    self.indexes[raw.source],
                    max_pixels=self.data.max_pixels,
                    faults=faults,
                    draw=draw,
                )
            except BadSample as bad:
                name = f"{self.sources[raw.source].name}/{raw.shard_name}"
                outcome = "passed over" if attempt else "replaced"
                faults.append(Fault(raw.position, bad.cause, name, raw.key, str(bad), outcome))
            where = self.order.substitute(raw.position, attempt)
            raw = self.reader.one(raw.position, *where)
        raise TooManyBadSamples(
            f"position {raw.position}: {_MOST_SUBSTITUTES} samples drawn from source "
            f"{self.sources[raw.source].name!r} are all unusable; the last one: {faults[-1]}: "
            f"{remedy(faults[-1].cause)}"
        )

    def _targets(self, texts: list[str | None], categories: list[int]) -> dict[str, NDArray[Any]]:
        ids, mask = self.tokenize([text or "" for text in texts] or [""])
        return {
            "tokens": np.asarray(ids, dtype=np.int64)[: len(texts)],
            "token_mask": np.asarray(mask).astype(bool)[: len(texts)],
            "has_text": np.array([text is not None for text in texts], dtype=bool),
            "category": np.array(categories, dtype=np.int64),
        }

    def _geometry(self, crops: list[list[views.Crop]]) -> dict[str, NDArray[Any]]:
        tables = [np.array(crop, dtype=np.float32).reshape(-1, 5) for crop in crops]
        both = {"a": tables[0], "b": tables[-1]}
        boxes = {f"box_{view}": np.ascontiguousarray(rows[:, :4]) for view, rows in both.items()}
        return {**boxes, **{f"flip_{view}": rows[:, 4] != 0 for view, rows in both.items()}}

    def _photometric(self, draws: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        first, second = self.augmentation.view_a, self.augmentation.view_b
        strengths = {"a": first, "b": second if len(draws) == 2 else first}
        return {
            f"{name}_{view}": values
            for v, (view, strength) in zip((0, -1), strengths.items(), strict=True)
            for name, values in views.photometric_parameters(draws[v], strength).items()
        }
