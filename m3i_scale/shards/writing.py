"""Writing one shard: images read, re-encoded if asked, and a report of what went in.

A shard is finished when its report says so: the report holds a fingerprint of everything that the
shard was made of, and the tar's length.  Whatever changes, the fingerprint does, and the shard is
written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import webdataset
from PIL import Image

from m3i_scale.data import decode
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.files import written
from m3i_scale.data.storage import StorageClient, is_local, join, local_path, parent
from m3i_scale.shards.records import Record, read_zip
from m3i_scale.shards.tables import parquet_file

FORMAT = 2  # of shards and reports: another one is written anew
UNREADABLE = "unreadable file"


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


@dataclass
class Report:
    """What one shard was made of."""

    fingerprint: str
    bytes: int = 0
    samples: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # by cause
    examples: dict[str, str] = field(default_factory=dict)  # by cause
    again: bool = False  # something could not be read that may be read another time
    fresh: bool = field(default=False, compare=False)  # written now, not by an earlier build

    def leave_out(self, cause: str, example: str) -> None:
        """Count a sample that is not written."""
        self.left_out[cause] = self.left_out.get(cause, 0) + 1
        self.examples.setdefault(cause, example)


def write_shard(path: Path, records: list[Record], *, recipe: Recipe, index: Path) -> Report:
    """Write one shard unless it is finished and nothing has changed that it was made of.

    Before a shard is replaced, the `index` that describes the old one is removed.

    Raises:
        ValueError: the shard cannot be written; the message says why.
    """
    note, fingerprint = path.with_suffix(".json"), fingerprint_of(records, recipe)
    report = read_report(note)
    finished = report is not None and report.fingerprint == fingerprint and not report.again
    if report and finished and path.exists() and path.stat().st_size == report.bytes:
        return report
    report = Report(fingerprint, fresh=True)
    with written(path) as temporary:
        with open(temporary, "wb") as file:
            with webdataset.TarWriter(file, mtime=0) as tar:
                for sample in _samples(path.stem, records, recipe, report):
                    tar.write(sample)
            file.flush()
            os.fsync(file.fileno())
        report.bytes = temporary.stat().st_size
        index.unlink(missing_ok=True)
        note.unlink(missing_ok=True)  # the old report must never stand beside the new tar
    with written(note) as temporary:
        content = {name: value for name, value in asdict(report).items() if name != "fresh"}
        temporary.write_text(json.dumps(content))
    return report


def read_report(path: Path) -> Report | None:
    """The report of a shard; None where there is none, or one that a crash left half written."""
    try:
        return Report(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def fingerprint_of(records: list[Record], recipe: Recipe) -> str:
    """A hash of all that a shard is made of: records, recipe, sizes and times of local files."""
    digest, stamps = hashlib.sha256(), dict[str, str]()
    digest.update(json.dumps([FORMAT, asdict(recipe)]).encode())
    for record in records:
        if record.url not in stamps:
            stamps[record.url] = _stamp(record.url)
        digest.update(repr((stamps[record.url], record)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _stamp(url: str) -> str:
    """Size and time of a local file; "" where there is none, and of what is remote."""
    try:
        found = os.stat(local_path(url)) if is_local(url) else None
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}" if found else ""


def _samples(
    shard: str, records: list[Record], recipe: Recipe, report: Report
) -> Iterator[dict[str, Any]]:
    storage = StorageClient()
    for number, record in enumerate(records):
        try:
            data = _image_bytes(record, storage)
        except BadSample as bad:
            report.leave_out(bad.cause, record.place)
            continue
        except (OSError, ValueError, pa.ArrowException) as error:
            report.leave_out(UNREADABLE, f"{record.place}: {_reason(error)}")
            report.again |= not (isinstance(error, FileNotFoundError) and is_local(record.url))
            continue
        try:
            extension, image = encode(data, recipe)
        except BadSample as bad:
            report.leave_out(bad.cause, record.place)
            continue
        report.samples += 1
        sample: dict[str, Any] = {"__key__": f"{shard}{number:06d}", extension: image}
        if record.texts:
            sample["txt"] = record.texts[0]
        if len(record.texts) > 1:
            sample["json"] = {"captions": list(record.texts)}
        if record.category is not None:
            sample["cls"] = str(record.category)
        yield sample


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def _image_bytes(record: Record, storage: StorageClient) -> bytes:
    if record.row >= 0:
        value = _row_group(record.url, record.group, record.column)[record.row]
        data = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if not data and path:  # Hugging Face's tables may name a file instead
            url = join(parent(record.url), path)
            data = storage.read(url, 0, storage.size(url))
        if not data:
            raise BadSample("no image")
        return bytes(data)
    if record.column:
        return read_zip(record.url, record.column)
    if is_local(record.url):
        return _read_local(local_path(record.url), record.offset, record.size)
    size = record.size or storage.size(record.url)
    return storage.read(record.url, record.offset, record.offset + size)


def _read_local(path: str, offset: int, size: int) -> bytes:
    """Bytes of a local file, whose name may be any bytes; size 0 is up to its end."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size or -1)


@lru_cache(maxsize=2)
def _row_group(url: str, group: int, column: str) -> list[Any]:
    return list(parquet_file(url).read_row_group(group, columns=[column]).column(0).to_pylist())


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
    return {"tiff": "tif", "mpo": "jpg", "jpeg2000": "jp2"}.get(form, form)
