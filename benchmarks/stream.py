"""Throughput of the stream beside the usual pipeline and beside bare JPEG decoding.

    python benchmarks/stream.py [--samples 2048] [--workers 0 1 2] [--seconds 8]

One run over the same tar shards (256 px JPEGs of about 21 kB, captions of 60 characters):

* `decode`   bare decoding of the bytes in memory with torchvision, the ceiling;
* `usual`    webdataset -> Pillow -> torchvision transforms, two full float views per image, as
             open_clip-style loaders do it;
* `crop`     the same with crops and flips only, no photometric work;
* `stream`   this project: decode once, two uint8 crops, parameters of the photometric work;
* `stream1`  the same with one view.

Photometric work is drawn but not applied by `stream`: it runs on the device.  Samples per second
are divided by the processes that work (one in-process, otherwise the workers).
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
import webdataset
from PIL import Image
from torchvision import transforms as T
from torchvision.io import ImageReadMode, decode_jpeg

from m3i_scale.data import Augmentation, Source, Stream
from m3i_scale.data.indexing import index_shards

SIZE = 192


def photograph(rng: np.random.Generator) -> bytes:
    """A 256 px JPEG of about 21 kB with smooth areas, edges and grain."""
    small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = rng.normal(0, 13, (256, 256, 1))
    image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def make_shards(folder: Path, samples: int) -> tuple[list[str], list[bytes]]:
    """Write the shards; return their paths and the JPEGs."""
    rng = np.random.default_rng(0)
    images = [photograph(rng) for _ in range(min(samples, 512))]
    paths = [str(folder / f"{number:05d}.tar") for number in range(4)]
    for shard, path in enumerate(paths):
        with webdataset.TarWriter(path) as tar:
            for number in range(shard, samples, 4):
                caption = f"a photograph of thing number {number} in front of a wall, grainy"
                image = images[number % len(images)]
                tar.write({"__key__": f"{number:09d}", "jpg": image, "txt": caption})
    return paths, images


def tokenize(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in of no cost: the same in both pipelines."""
    return torch.zeros(len(texts), 32, dtype=torch.int64), torch.ones(len(texts), 32)


def mask(rng: np.random.Generator) -> np.ndarray:
    """Likewise."""
    return rng.random((12, 12)) < 0.5


def usual(paths: list[str], workers: int, batch: int, photometric: bool) -> Iterable:
    """webdataset + Pillow + torchvision, two views."""
    crop = [
        T.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(),
    ]
    colour = [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], 0.55),
        T.RandomSolarize(128, 0.1),
    ]
    end = [T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    view = T.Compose(crop + (colour if photometric else []) + end)

    def collate(samples: list) -> tuple:
        images, texts = zip(*samples, strict=True)
        views = [torch.stack([pair[v] for pair in images]) for v in (0, 1)]
        return (*views, *tokenize(list(texts)))

    data = (
        webdataset.WebDataset(paths, shardshuffle=4, resampled=True, nodesplitter=None)
        .shuffle(500)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(lambda image: (view(image), view(image)), lambda text: text)
        .batched(batch, collation_fn=collate)
    )
    return torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=workers, worker_init_fn=_single
    )


def _single(_: int) -> None:
    torch.set_num_threads(1)


def stream(index: str, workers: int, batch: int, views: int, interpolation: str) -> Iterable:
    """This project's loader."""
    augmentation = Augmentation(views=views, interpolation=interpolation)
    source = Source("bench", index, "text")
    made = Stream(
        [source],
        seed=0,
        image_size=SIZE,
        augmentation=augmentation,
        tokenize=tokenize,
        mask_sampler=mask,
        lanes=1024,
    )
    return made.loader(start=0, micro_batch=batch, workers=workers)


def rate(batches: Iterable, batch: int, seconds: float) -> float:
    """Samples per second after a warm-up of ten batches."""
    iterator = iter(batches)
    for _ in range(10):
        next(iterator)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(iterator)
        count += batch
    return count / (time.perf_counter() - begin)


def decode_rate(images: list[bytes], seconds: float) -> float:
    """Images per second of bare decoding."""
    encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    begin, count = time.perf_counter(), 0
    for image in itertools.cycle(encoded):
        decode_jpeg(image, ImageReadMode.RGB)
        count += 1
        if time.perf_counter() - begin > seconds:
            break
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--interpolation", default="bicubic")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths, images = make_shards(Path(folder), args.samples)
        index = f"{folder}/index.parquet"
        index_shards(paths, index, kind="text", progress=False)
        size = sum(map(len, images)) / len(images)
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
            f"{torch.__version__}, torchvision {torchvision.__version__}, {size:.0f} bytes a JPEG"
        )
        ceiling = decode_rate(images, args.seconds)
        print(f"{'pipeline':10} {'workers':>7} {'samples/s':>10} {'per core':>9} {'of decode':>9}")
        print(f"{'decode':10} {'-':>7} {ceiling:10.0f} {ceiling:9.0f} {1:9.0%}")
        for workers in args.workers:
            rows = {
                "usual": usual(paths, workers, args.batch, True),
                "crop": usual(paths, workers, args.batch, False),
                "stream": stream(index, workers, args.batch, 2, args.interpolation),
                "stream1": stream(index, workers, args.batch, 1, args.interpolation),
            }
            for name, batches in rows.items():
                total = rate(batches, args.batch, args.seconds)
                each = total / max(1, workers)
                print(f"{name:10} {workers:7d} {total:10.0f} {each:9.0f} {each / ceiling:9.0%}",
                      flush=True)  # fmt: skip
        print(f"peak memory of the main process: "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
