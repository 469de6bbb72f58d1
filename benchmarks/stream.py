"""Throughput of the stream beside the usual pipeline and beside bare JPEG decoding.

    python benchmarks/stream.py [--samples 2048] [--workers 0 2] [--rounds 9]

One run over the same tar shards (256 px JPEGs of about 21 kB, captions of 60 characters):

* `decode`   bare decoding of the bytes in memory with torchvision, the ceiling;
* `usual`    webdataset -> Pillow -> torchvision transforms, two full float views per image, as
             open_clip-style loaders do it;
* `crop`     the same with crops and flips only, no photometric work;
* `stream`   this project: decode once, two uint8 crops, parameters of the photometric work;
* `stream1`  the same with one view.

Photometric work is drawn but not applied by `stream`: it runs on the device.  Samples per second
are per process that works.  All pipelines run in short turns and the medians are compared, in
processor time where the work is in this process, so that a busy machine does not favour anyone.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
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
Clock = Callable[[], float]


def photograph(rng: np.random.Generator) -> bytes:
    """A 256 px JPEG of about 21 kB with smooth areas, edges and grain."""
    small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = rng.normal(0, 10, (256, 256, 1))
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
        with webdataset.TarWriter(path, mtime=0) as tar:
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


def slices(batches: Iterable, batch: int, count: int, clock: Clock) -> Iterator[float]:
    """Microseconds per sample of successive slices of `count` batches."""
    iterator = iter(batches)
    for _ in range(2):
        next(iterator)
    while True:
        begin = clock()
        for _ in range(count):
            next(iterator)
        yield (clock() - begin) / (count * batch) * 1e6


def decode_slices(images: list[bytes]) -> Iterator[float]:
    """Microseconds per image of bare decoding."""
    encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
    while True:
        begin = time.process_time()
        for image in encoded:
            decode_jpeg(image, ImageReadMode.RGB)
        yield (time.process_time() - begin) / len(encoded) * 1e6


def table(title: str, taken: dict[str, list[float]]) -> None:
    """Print the medians of microseconds per sample and process."""
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"\n{title}\n{'pipeline':10} {'samples/s per core':>18} {'of decode':>9} {'x usual':>8}")
    for name, each in medians.items():
        print(f"{name:10} {1e6 / each:18.0f} {medians['decode'] / each:9.0%} "
              f"{medians['usual'] / each:8.1f}", flush=True)  # fmt: skip


def in_process(rows: dict[str, Iterator[float]], rounds: int) -> dict[str, list[float]]:
    """Slices of all rows in turn, so that a busy machine does not favour any of them."""
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            taken[name].append(next(row))
    return taken


def main() -> None:
    """Run everything and print one table per number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--interpolation", default="bicubic")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths, images = make_shards(Path(folder), args.samples)
        index = f"{folder}/index.parquet"
        index_shards(paths, index, kind="text", progress=False)
        size = sum(map(len, images)) / len(images)
        print(f"{os.cpu_count()} cores, torch {torch.__version__}, torchvision "
              f"{torchvision.__version__}, {size / 1000:.1f} kB a JPEG")  # fmt: skip
        for workers in args.workers:
            pipelines: dict[str, Callable[[], Iterable]] = {
                "usual": partial(usual, paths, workers, args.batch, True),
                "crop": partial(usual, paths, workers, args.batch, False),
                "stream": partial(stream, index, workers, args.batch, 2, args.interpolation),
                "stream1": partial(stream, index, workers, args.batch, 1, args.interpolation),
            }
            if workers == 0:
                rows = {"decode": decode_slices(images)}
                for name, make in pipelines.items():
                    count = 2 if name in ("usual", "crop") else 8
                    rows[name] = slices(make(), args.batch, count, time.process_time)
                table("in process, processor time", in_process(rows, args.rounds))
                continue
            taken = {"decode": list(islice(decode_slices(images), args.rounds))}
            for name, make in pipelines.items():
                row = slices(make(), args.batch, 4 * workers, time.perf_counter)
                taken[name] = [each * workers for each in islice(row, args.rounds)]
                row.close()  # ends the workers, which would steal time from the next row
            table(f"{workers} workers, wall time", taken)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"\npeak memory of the main process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
