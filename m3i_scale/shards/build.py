"""Writing shards: from an image folder, from a CSV or Parquet table, or from existing archives.

1. list the records: where each image is, its caption, its category (records.py);
2. shuffle them with a seed and deal them to shards that are equal in count and, as far as sizes
   are known beforehand, in bytes;
3. write the shards in several processes, each under a temporary name until it is complete, so
   that an interrupted build goes on where it stopped;
4. index the result.

Because of step 2 neighbours in a shard are unrelated, whatever the order of the source was.  Only
images that lie inside a Parquet table stay together by row group, which is read as a whole.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow.parquet as pq
import webdataset
from PIL import Image
from tqdm import tqdm

from m3i_scale.data import decode
from m3i_scale.data.decode import BadSample
from m3i_scale.data.order import hash64
from m3i_scale.data.storage import Storage
from m3i_scale.shards.indexing import IndexSummary, index_shards, process_map
from m3i_scale.shards.records import Record, list_records

_UNKNOWN_BYTES = 100_000  # what an image is taken to weigh where its size is not known beforehand


@dataclass(frozen=True)
class Recipe:
    """How images are written.

    Attributes:
        resize: shorter side in pixels that larger images are reduced to; 0 keeps them.
        reencode: write every image as RGB JPEG; otherwise only resized ones are encoded anew.
        quality: of the JPEGs that are encoded.
    """

    resize: int = 0
    reencode: bool = False
    quality: int = 90

    def __post_init__(self) -> None:
        if self.resize < 0:
            raise ValueError(f"resize is {self.resize}: give pixels, or 0 to keep the sizes")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}: JPEG takes 1 to 100")


@dataclass(frozen=True)
class BuildSummary:
    """What a build wrote and what it left out, by cause."""

    index: IndexSummary
    left_out: dict[str, int]

    def __str__(self) -> str:
        lines = [str(self.index)]
        lines += [f"  {count:,} not written: {cause}" for cause, count in self.left_out.items()]
        return "\n".join(lines)


def build_shards(
    source: str,
    folder: str | Path,
    *,
    shard_samples: int = 10_000,
    shard_bytes: int = 1 << 30,
    recipe: Recipe | None = None,
    seed: int = 0,
    processes: int = 1,
    text_column: str | None = None,
    category_column: str | None = None,
    progress: bool = True,
) -> BuildSummary:
    """Build `<folder>/00000.tar, ...` and the index `<folder>.parquet` from `source`.

    Args:
        source: a folder of images (sub-folders are categories; `x.txt` beside `x.jpg` is its
            caption), a .csv, .tsv or .parquet table, or a path or glob of tar or zip archives.
        shard_samples: upper bound of the samples in a shard.
        shard_bytes: about the upper bound of its bytes.
        recipe: resizing and re-encoding.
        processes: shards written at once.
        text_column: column of a table that holds captions; well-known names are found anyway.
        category_column: likewise for categories, integers or names.

    Raises ValueError where nothing usable is found, or where `folder` holds another build.
    """
    if shard_samples < 1 or shard_bytes < 1:
        raise ValueError(f"shards of {shard_samples} samples and {shard_bytes} bytes hold nothing")
    folder, recipe = Path(str(folder).rstrip("/")), recipe or Recipe()
    listing = list_records(source, text_column, category_column)
    shards = deal(listing.records, shard_samples, shard_bytes, seed)
    plan = {"source": source, "samples": len(listing.records), "shards": len(shards)}
    _claim(folder, {**plan, "seed": seed, **asdict(recipe)})
    if listing.classes:
        names = json.dumps(listing.classes, ensure_ascii=False, indent=0)
        (folder / "classes.json").write_text(names, encoding="utf-8", errors="replace")
    paths = [folder / f"{number:05d}.tar" for number in range(len(shards))]
    with process_map(processes) as run:
        done = run(partial(write_shard, recipe=recipe), paths, shards)
        reports = list(tqdm(done, total=len(paths), unit="shard", disable=not progress))
    first = listing.records[0]
    kind = "text" if first.category is None else "category" if first.text is None else "both"
    index = index_shards(
        [str(path) for path in paths],
        f"{folder}.parquet",
        kind=kind,
        processes=processes,
        progress=False,
    )
    left_out = Counter(listing.left_out)
    for report in reports:
        left_out.update(report)
    return BuildSummary(index, dict(left_out))


def deal(
    records: list[Record], shard_samples: int, shard_bytes: int, seed: int
) -> list[list[Record]]:
    """Shuffle and cut in the fewest shards within both bounds, equal to within one sample."""
    total = sum(record.size or _UNKNOWN_BYTES for record in records)
    count = max(-(-len(records) // shard_samples), -(-total // shard_bytes))
    count = min(count, len(records))
    order = sorted(records, key=partial(_shuffle_key, seed))
    cuts = [len(order) * i // count for i in range(count + 1)]
    return [order[i:j] for i, j in pairwise(cuts)]


def _shuffle_key(seed: int, record: Record) -> tuple[int, int]:
    """Random, but rows of one row group of a table stay together."""
    name = crc32(record.url.encode("utf-8", "surrogateescape"))
    block = int(hash64(seed, name, record.group + 1)[0])
    return block, int(hash64(seed, name, record.offset, record.row + 1)[0])


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write down what is built here; refuse to mix two builds in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "build.json"
    if note.exists() and json.loads(note.read_text()) != plan:
        raise ValueError(
            f"{folder} holds another build ({note.read_text()}): choose another folder or delete it"
        )
    note.write_text(json.dumps(plan))


def write_shard(path: Path, records: list[Record], *, recipe: Recipe) -> dict[str, int]:
    """Write one shard unless it is complete already; return what was left out, by cause."""
    report = path.with_suffix(".json")
    if path.exists() and report.exists():
        return dict(json.loads(report.read_text()))
    temporary, left_out = f"{path}.{os.getpid()}.tmp", Counter[str]()
    with open(temporary, "wb") as file, webdataset.TarWriter(file, mtime=0) as tar:
        for sample in _samples(path.stem, records, recipe, left_out):
            tar.write(sample)
    os.replace(temporary, path)
    report.write_text(json.dumps(left_out))
    return dict(left_out)


def _samples(
    shard: str, records: list[Record], recipe: Recipe, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    storage = Storage()
    for number, record in enumerate(records):
        try:
            extension, image = encode(_image_bytes(record, storage), recipe)
        except BadSample as bad:
            left_out[bad.cause] += 1
            continue
        except OSError:
            left_out["unreadable file"] += 1
            continue
        sample: dict[str, Any] = {"__key__": f"{shard}{number:06d}", extension: image}
        if record.text is not None:
            sample["txt"] = record.text
        if record.category is not None:
            sample["cls"] = str(record.category)
        yield sample


def _image_bytes(record: Record, storage: Storage) -> bytes:
    if record.row >= 0:
        value = _row_group(record.url, record.group, record.column)[record.row]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise BadSample("no image")
        return bytes(data)
    size = record.size or storage.size(record.url)
    return storage.read(record.url, record.offset, record.offset + size)


@lru_cache(maxsize=2)
def _row_group(url: str, group: int, column: str) -> list[Any]:
    return list(pq.ParquetFile(url).read_row_group(group, columns=[column]).column(0).to_pylist())


def encode(data: bytes, recipe: Recipe) -> tuple[str, bytes]:
    """(extension, bytes) of an image after the recipe; BadSample where it cannot be decoded."""
    image = decode.decode_image(data)
    height, width = image.shape[:2]
    if recipe.resize and min(height, width) > recipe.resize:
        scale = recipe.resize / min(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC)
    elif recipe.reencode:
        picture = Image.fromarray(image.numpy())
    else:
        return _extension(data), data
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=recipe.quality)
    return "jpg", buffer.getvalue()


def _extension(data: bytes) -> str:
    if data[:2] == b"\xff\xd8":
        return "jpg"
    form = decode.image_format(data)
    return {"tiff": "tif", "mpo": "jpg"}.get(form, form)
