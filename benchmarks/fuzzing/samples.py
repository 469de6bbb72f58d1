"""A small shard whose samples are known, and what a stream delivers of it.

Sample k has the picture `picture(k)`, the caption "caption k" and the category k, so that a picture
with another sample's caption shows.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fuzzing.damage import NAMED, UNHARMED, Violation, attempt, require
from m3i_scale.config import ConfigError, Data, Source, Storage
from m3i_scale.data import StorageClient, Stream
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.index import Index, write_index
from m3i_scale.data.make import Fault, TooManyBadSamples, decode_sample
from m3i_scale.data.order import Located
from m3i_scale.shards.scan import Findings, index_shard, wanted_for

SAMPLES = 8
MAX_PIXELS = 1_000_000
Members = list[tuple[str, bytes]]
Delivered = dict[int, tuple[str, dict[str, Tensor]]]  # by position: key, tensors


def picture(number: int, format: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """A smooth picture of 40 x 32 whose colours depend on the number."""
    return _picture(number, format, mode, tuple(sorted(options.items())))


@cache
def _picture(number: int, format: str, mode: str, options: tuple[tuple[str, Any], ...]) -> bytes:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    image = small.resize((40, 32), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format, **dict(options))
    return buffer.getvalue()


def members_of(number: int) -> Members:
    """One sample: picture, caption, label, and a document that no index here uses."""
    return [
        (f"{number:05d}.cls", b"%d" % number),
        (f"{number:05d}.jpg", picture(number)),
        (f"{number:05d}.json", b'{"caption": "caption %d", "label": %d}' % (number, number)),
        (f"{number:05d}.txt", b"caption %d" % number),
    ]


def tar(members: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """A plain tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@cache
def clean() -> bytes:
    """The shard of all samples."""
    return tar([member for number in range(SAMPLES) for member in members_of(number)])


def index_of(folder: Path, shard: bytes, kind: str = "both", **members: Any) -> Path:
    """Write a shard and its index, as `m3i shards index` does for one shard; the index."""
    (folder / "a.tar").write_bytes(shard)
    wanted = wanted_for(kind, **members)  # type: ignore[arg-type]
    row = index_shard("a.tar", io.BytesIO(shard), len(shard), wanted, Findings())
    path = folder / "index.parquet"
    write_index(str(path), [row.table()], {"largest_category": 2**31 - 1, "classes": {}})
    return path


def stream_of(path: Path, kind: str = "both") -> Stream:
    """A stream of one index that tolerates any number of bad samples."""
    data = Data(
        sources=[Source(name="s", index=str(path), kind=kind)],  # type: ignore[arg-type]
        image_size=16, chunk_mebibytes=64, max_bad_rate=1.0, max_pixels=MAX_PIXELS,
    )  # fmt: skip
    storage = StorageClient(Storage(retries=0), first_wait=0.001)
    try:
        return Stream(
            data, seed=3, lanes=8, tokenize=_tokenize, mask_sampler=_mask, storage=storage
        )
    except ValueError as error:  # as `train.build_stream`
        raise ConfigError(f"data: {error}") from error


def _tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A checksum of each text."""
    ids = torch.tensor([[zlib.crc32(text.encode()), 1] for text in texts])
    return ids, ids > -1


def _mask(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    return rng.random((2, 2)) < 0.5


def delivered(stream: Stream) -> tuple[Delivered, dict[str, int]]:
    """One pass over the stream, and the causes of its faults."""
    found: Delivered = {}
    loader = stream.loader(start=0, micro_batch=SAMPLES, end=stream.samples)
    for batch in loader:
        tensors = {name: v for name, v in vars(batch).items() if isinstance(v, Tensor)}
        for view in "ab":
            photometric = getattr(batch, f"photometric_{view}")
            tensors |= {f"{name}_{view}": value for name, value in photometric.items()}
        for row, position in enumerate(batch.position.tolist()):
            values = {name: value[row].clone() for name, value in tensors.items()}
            found[position] = (batch.key[row], values)
    return found, dict(loader.faults)


def order_of(stream: Stream) -> list[int]:
    """The sample at each position of the first pass."""
    located: Located = stream.order.locate(np.arange(stream.samples))
    return [int(sample) for sample in located.sample]


def check_neighbours(stream: Stream, expected: Delivered, good: set[int]) -> str:
    """Deliver everything: the good samples must come as they were, the others with a name.

    Args:
        stream: over the damaged shard.
        expected: of the sound one, of as many samples.
        good: numbers of the samples that the damage has not touched.
    """
    order = order_of(stream)
    require(len(order) == len(expected), "shifted", f"{len(order)} positions")
    found, faults = dict[int, Any](), dict[str, int]()
    try:
        found, faults = delivered(stream)
    except TooManyBadSamples as error:
        require(len(good) < SAMPLES // 2, "shifted", f"all given up: {error}"[:300])
        attempt(partial(_raise, error))
        return NAMED
    for position, sample in enumerate(order):
        if sample in good:
            key, tensors = found[position]
            old_key, old = expected[position]
            same = key == old_key and all(tensors[n].equal(v) for n, v in old.items())
            require(same, "shifted", f"position {position}, sample {sample}: {old_key} is {key}")
    require("" not in faults, "silent", "a fault without a name")
    return NAMED if faults else UNHARMED


def _raise(error: Exception) -> None:
    raise error


def check_pairs(path: Path, kind: str = "both", *, cut: bool = False, changed: bool = False) -> str:
    """Every sample of an index that can be decoded has its own picture, caption and label.

    For shards that were rearranged before they were indexed. With `cut`, headers lied about sizes:
    then a caption may have lost its end. With `changed`, bytes of pictures were: JPEG has no
    checksum, so one that can be decoded may look otherwise, but not like another's.
    """
    refused = attempt(lambda: stream_of(path, kind))
    if refused is not None:
        return "refused"
    stream, named = stream_of(path, kind), False
    maker, source, index = stream.maker(), stream.sources[0], stream.indexes[0]
    for number in range(index.samples):
        faults: list[Fault] = []
        raw = maker.reader.one(number, 0, 0, number)
        try:
            sample = decode_sample(raw, source, index, max_pixels=MAX_PIXELS, faults=faults)
        except BadSample as bad:
            require(bool(bad.cause), "silent", "a bad sample without a cause")
            named = True
            continue
        text, category = sample.text or "", sample.category
        _require_one_sample(sample.image, text, category, cut=cut, changed=changed)
    try:
        delivered(stream)
    except TooManyBadSamples as error:
        attempt(partial(_raise, error))
        named = True
    return NAMED if named or list(index.problems()) else UNHARMED


def _require_one_sample(
    image: Tensor, text: str, category: int, *, cut: bool, changed: bool
) -> None:
    if not 0 <= category < SAMPLES:
        raise Violation("silent", f"category {category} was in no label")
    whole = f"caption {category}"
    same = whole.startswith(text) if cut else whole == text
    require(same, "shifted", f"{text!r} has category {category}")
    others = (n for n in range(SAMPLES) if n != category)
    same = image.equal(_decoded(category)) or (
        changed and not any(image.equal(_decoded(other)) for other in others)
    )
    require(same, "shifted", f"{text!r} has another picture")


@cache
def _decoded(number: int) -> Tensor:
    from m3i_scale.data.decode import decode_image

    return decode_image(picture(number))


def ranges(path: Path) -> list[tuple[int, int]]:
    """First byte and end of each sample of an index of one shard, headers included."""
    index = Index(str(path))
    none = np.zeros(index.samples, np.int64)
    where = Located(none, none, none, none, np.arange(index.samples))
    plan = stream_of(path).maker().reader.plan(where)
    return list(zip(plan.start.tolist(), plan.stop.tolist(), strict=True))
