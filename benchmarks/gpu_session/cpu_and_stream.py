"""Of the audit, what needs images: the real stream onto the device, and train.py on the CPU.

python cpu_and_stream.py FOLDER     compares batches, writes FOLDER/stream.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rows
import torch
from torch import Tensor

STEPS_ON_CPU = 2
BATCHES = 4 if rows.REHEARSE else 30
MICRO_BATCH = 16
PRIME = 1_000_003


def write_data(folder: Path) -> None:
    """Images, captions, categories and the configuration that names them."""
    from helpers.run_folder import captioned_config
    from helpers.shards import write_images
    from m3i_scale.config import dump_config

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    sources = [
        {"name": kind, "index": write_images(data, kind, range(64), kind), "kind": kind}
        for kind in ("text", "category")
    ]
    config = captioned_config(data, {"data.sources": sources})
    (data / "small.yaml").write_text(dump_config(config))


def cpu_command(folder: Path) -> list[str]:
    """train.py on the CPU; nothing but the configuration says so."""
    return [
        str(rows.ROOT / "m3i_scale" / "train.py"),
        "--config",
        str(folder / "data" / "small.yaml"),
        "engine.device=cpu",
        f"optimizer.duration={STEPS_ON_CPU} steps",
        "optimizer.warmup=1 steps",
    ]


def checksums(batch: Any) -> Iterator[Tensor]:
    """One integer per tensor of a batch, of its bytes and their places; exact on any device."""
    batch = vars(batch).values()
    parts = [t for v in batch for t in (v.values() if isinstance(v, dict) else [v])]
    for tensor in parts:
        if isinstance(tensor, Tensor):
            content = tensor.contiguous().view(torch.uint8).flatten().long()
            places = torch.arange(content.numel(), device=content.device) % PRIME
            yield (content * (places + 1)).sum()


def main(arguments: list[str]) -> int:
    """Compare what arrives on the device, while kernels run, with what a CPU alone makes."""
    from m3i_scale.config import load_config
    from m3i_scale.tasks.samples import build_stream

    folder = Path(arguments[0])
    config = load_config(str(folder / "data" / "small.yaml"), [])
    stream = build_stream(config)
    limits: dict[str, Any] = {"start": 0, "micro_batch": MICRO_BATCH, "end": BATCHES * MICRO_BATCH}
    cuda = rows.DEVICE == "cuda"
    load = torch.randn(4096 if cuda else 64, 4096 if cuda else 64, device=rows.DEVICE)
    arrived = []
    for batch in stream.loader(**limits, workers=4, pin_memory=cuda):
        for _ in range(20):  # the copies queue behind these
            load = torch.tanh(load @ load)
        arrived.append(torch.stack(list(checksums(batch.to(rows.DEVICE)))))
    found = [sums.cpu().tolist() for sums in arrived]
    expected = [
        [int(one) for one in checksums(batch)] for batch in stream.loader(**limits, workers=0)
    ]
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    result = {"batches": len(found), "wrong": wrong, "tensors": len(found[0]), "pinned": cuda}
    (folder / "stream.json").write_text(json.dumps(result))
    print(result, flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
