"""Throughput of the stream beside the usual pipeline and beside bare JPEG decoding.

    python benchmarks/stream.py [--rounds 48] [--workers 2] [--long 400]

One run over the same tar shards (256 px JPEGs of about 21 kB, captions of 60 characters):

* `decode`   bare decoding of the bytes in memory by torchvision's operator, the ceiling;
* `usual`    webdataset -> Pillow -> torchvision transforms, two full float views per image, as
             open_clip-style loaders do it;
* `crop`     the same with crops and flips only, no photometric work;
* `stream`   this project: decode once, two uint8 crops, parameters of the photometric work, masks;
* `stream1`  the same with one view.

Photometric work is drawn but not applied by `stream`: it runs on the device.

1. In one process all pipelines take turns of one batch, forwards and backwards, and their processor
   times are compared: what else runs on the machine slows all of them alike.
2. With workers one pipeline runs after the other: samples per second, and per second of processor
   time of all its processes, the start left out.
3. A long run of `stream` with these workers: private memory early and at the end.
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
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torchvision
import webdataset
from PIL import Image
from torchvision import transforms as T
from torchvision.io import ImageReadMode

from m3i_scale.config import Augmentation, Data, Input, Source
from m3i_scale.data import Stream
from m3i_scale.objective.masks import PatchMask
from m3i_scale.shards.indexing import index_shards

SIZE = 192
Interpolation = Literal["bicubic", "bilinear"]


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


def stream(
    index: str, workers: int, batch: int, views: Literal[1, 2], interpolation: Interpolation
) -> Iterable:
    """This project's loader."""
    data = Data(
        sources=[Source(name="bench", index=index, kind="text")],
        image_size=SIZE,
        augmentation=Augmentation(views=views, interpolation=interpolation),
    )
    masks = PatchMask.of(Input(patch=16), SIZE)
    made = Stream(
        data,
        seed=0,
        lanes=1024,
        tokenize=tokenize,
        mask_sampler=lambda rng, size: masks(rng),
    )
    return made.loader(start=0, micro_batch=batch, workers=workers)


class Decode(torch.utils.data.IterableDataset):
    """Bare decoding, one item per batch."""

    def __init__(self, images: list[bytes], batch: int) -> None:
        self.encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images]
        self.batch = batch

    def __iter__(self) -> Iterator[int]:
        decode = torch.ops.image.decode_jpeg  # io.decode_jpeg without its warning on every call
        for first in count(0, self.batch):
            for number in range(first, first + self.batch):
                decode(self.encoded[number % len(self.encoded)], ImageReadMode.RGB.value)
            yield self.batch


def decode(images: list[bytes], workers: int, batch: int) -> Iterable:
    """The ceiling."""
    return torch.utils.data.DataLoader(
        Decode(images, batch), batch_size=None, num_workers=workers, worker_init_fn=_single
    )


def in_turns(pipelines: dict[str, Iterable], batch: int, rounds: int) -> dict[str, list[float]]:
    """Processor time of each pipeline, in microseconds per sample, for every round.

    The slow ones take part in every eighth round only.
    """
    iterators = {name: iter(pipeline) for name, pipeline in pipelines.items()}
    taken: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(-2, rounds):  # two rounds to warm up
        rare = number % 8 == 0 or number < 0
        names = [name for name in pipelines if rare or name not in ("usual", "crop")]
        for name in names[:: 1 if number % 2 else -1]:
            begin = time.process_time()
            next(iterators[name])
            if number >= 0:
                taken[name].append((time.process_time() - begin) / batch * 1e6)
    return taken


def report_turns(taken: dict[str, list[float]]) -> None:
    """One line per pipeline: means over all rounds, for reading ahead comes in bursts."""
    mean = {name: statistics.fmean(values) for name, values in taken.items()}
    print("\none process, processor time")
    print(f"{'pipeline':10} {'samples/s per core':>18} {'of decode':>9} {'x usual':>8}")
    for name, each in mean.items():
        print(f"{name:10} {1e6 / each:18.0f} {mean['decode'] / each:9.0%} "
              f"{mean['usual'] / each:8.1f}", flush=True)  # fmt: skip


def processor_seconds() -> float:
    """Processor time of this process and of its children that still run."""
    seconds, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        seconds += (int(fields[11]) + int(fields[12])) / tick
    return seconds


def private_mib() -> list[float]:
    """Memory of every worker that it shares with nobody."""
    found = []
    for child in active_children():
        lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        found.append(sum(int(line.split()[1]) for line in lines if line[:7] == "Private") / 1024)
    return found


def with_workers(pipelines: dict[str, Callable[[], Iterable]], batch: int, batches: int) -> None:
    """Run one pipeline after the other and print wall time and processor time."""
    print(f"{'pipeline':10} {'samples/s':>10} {'samples/s of processor time':>28}")
    for name, make in pipelines.items():
        number = max(4, batches // 8) if name in ("usual", "crop") else batches
        iterator = iter(make())
        for _ in range(number // 4):  # the start, and what was made ahead meanwhile
            next(iterator)
        wall, busy = time.perf_counter(), processor_seconds()
        for _ in range(number):
            next(iterator)
        wall, busy = time.perf_counter() - wall, processor_seconds() - busy
        print(f"{name:10} {number * batch / wall:10.0f} {number * batch / busy:28.0f}", flush=True)
        del iterator  # ends the workers
        for child in active_children():
            child.join()


def long_run(batches: Iterable, batch: int, number: int) -> None:
    """Print the memory of the workers early and at the end."""
    iterator = iter(batches)
    for step in range(1, number + 1):
        next(iterator)
        if step in (number // 8, number // 2, number):
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            each = ", ".join(f"{mib:.0f}" for mib in private_mib())
            print(f"after {step * batch:7,} samples: {each} MiB in the workers, "
                  f"peak of the main process {own:.0f} MiB", flush=True)  # fmt: skip


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=48, help="turns in one process")
    parser.add_argument("--workers", type=int, default=2, help="0: skip what needs workers")
    parser.add_argument("--long", type=int, default=400, help="batches of the long run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--interpolation", choices=get_args(Interpolation), default="bicubic")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths, images = make_shards(Path(folder), args.samples)
        index = f"{folder}/index.parquet"
        index_shards(paths, index, kind="text", progress=False)
        size = sum(map(len, images)) / len(images)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
              f"torchvision {torchvision.__version__}, {size / 1000:.1f} kB a JPEG")  # fmt: skip

        def pipelines(workers: int) -> dict[str, Callable[[], Iterable]]:
            return {
                "decode": partial(decode, images, workers, args.batch),
                "usual": partial(usual, paths, workers, args.batch, True),
                "crop": partial(usual, paths, workers, args.batch, False),
                "stream": partial(stream, index, workers, args.batch, 2, args.interpolation),
                "stream1": partial(stream, index, workers, args.batch, 1, args.interpolation),
            }

        made = {name: make() for name, make in pipelines(0).items()}
        report_turns(in_turns(made, args.batch, args.rounds))
        if args.workers:
            print(f"\n{args.workers} workers, load {os.getloadavg()[0]:.1f}")
            with_workers(pipelines(args.workers), args.batch, 32 * args.workers)
            print()
            long_run(pipelines(args.workers)["stream"](), args.batch, args.long)


if __name__ == "__main__":
    main()
