"""Small shards made by hand: tars as foreign tools write them, not by the project's own builder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from m3i_scale.config import Config
from m3i_scale.data import Augmentation, Source, Stream
from m3i_scale.shards.indexing import index_shards


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 32), **options) -> bytes:
    """A smooth JPEG of (width, height) whose colours depend on the seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """A plain tar with the members in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def text_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """img2dataset's layout: key.jpg, key.json, key.txt."""
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:09d}.jpg", jpeg(number)),
            (f"{number:09d}.json", b'{"caption": "c%d", "url": "x"}' % number),
            (f"{number:09d}.txt", b"caption %d" % number),
        ]
    return members


def category_members(first: int, count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(first, first + count):
        members += [(f"n{number}.cls", b"%d" % (number % 7)), (f"n{number}.jpg", jpeg(number))]
    return members


def tokenize(texts: list[str]):
    """Bytes of the text, padded to 16."""
    ids = torch.zeros(len(texts), 16, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        data = list(text.encode()[:16])
        row[: len(data)] = torch.tensor(data, dtype=torch.int64)
    return ids, ids > 0


def sample_mask(rng: np.random.Generator):
    return rng.random((2, 2)) < 0.5


def make_stream(sources: list[Source], **options) -> Stream:
    chosen = {
        "seed": 3,
        "image_size": 16,
        "augmentation": Augmentation(),
        "tokenize": tokenize,
        "mask_sampler": sample_mask,
        "lanes": 8,
        "chunk_bytes": 8192,
    }
    return Stream(sources, **{**chosen, **options})


WITHOUT_TEXT = """
run: small
model:
  backbone: {name: vit, options: {width: 32, depth: 1, heads: 2}}
  decoder: {depth: 1, width: 32, heads: 2, ffn: 64}
  categories: 5
objective:
  input: {corruption: mask, patch: 16, ratio: 0.5, pairing: neighbours, both_views: false}
  targets:
    - {name: pixels, representation: pixels, regularisation: none, likelihood: {form: gaussian},
       decoder: linear, normalise: norm_pix}
    - {name: category, representation: category, regularisation: negatives,
       likelihood: {form: boltzmann, temperature: 1.0}}
optimizer: {global_batch_size: 8, max_micro_batch: 8, duration: 6 steps, warmup: 1 steps}
"""


def config_without_text(index: str, **data) -> Config:
    """A small configuration of labelled pictures, with these keys below `data`."""
    sources = [{"name": "c", "index": index, "kind": "category"}]
    tree = {**yaml.safe_load(WITHOUT_TEXT), "data": {"image_size": 32, "sources": sources, **data}}
    return Config.model_validate(tree)


def text_source(folder: Path, counts: list[int], name: str = "pairs") -> Source:
    """A text source of shards with the given numbers of samples."""
    paths, first = [], 0
    for number, count in enumerate(counts):
        path = folder / name / f"{number:05d}.tar"
        paths.append(str(write_tar(path, text_members(first, count))))
        first += count
    index = str(folder / f"{name}.parquet")
    index_shards(paths, index, kind="text", progress=False)
    return Source(name, index, "text")


def category_source(folder: Path, counts: list[int], name: str = "labels") -> Source:
    paths, first = [], 0
    for number, count in enumerate(counts):
        path = folder / name / f"{number:05d}.tar"
        paths.append(str(write_tar(path, category_members(first, count))))
        first += count
    index = str(folder / f"{name}.parquet")
    index_shards(paths, index, kind="category", progress=False)
    return Source(name, index, "category")
