"""What a rank finds wrong with its own node: disk, shared memory, GPU; a sentence, or None."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

BLOCK = 1 << 20  # bytes that each node writes
SHARED_MEMORY = Path("/dev/shm")


def disk_problem(folder: Path, name: str) -> str | None:
    """Write, sync and read back a small file; what went wrong."""
    path, content = folder / f".preflight-{name}", os.urandom(BLOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            return f"{folder}: what was written reads differently"
        path.unlink()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def shared_memory_problem(needed: float, place: Path = SHARED_MEMORY) -> str | None:
    """Whether a node's data workers have `needed` bytes to hand over batches; what is wrong."""
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return f"{place}: {error.strerror}; data workers hand over their batches through it"
    if usage.free >= needed:
        return None
    return (
        f"{place} has {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free and data "
        f"workers need {needed / 2**20:,.0f}: give the container more (docker run --shm-size, "
        "apptainer with the host's /dev/shm), remove what lies there, or lower data.workers"
    )


def gpu_problem(local_rank: int, free_memory: float) -> str | None:
    """Whether this rank's GPU is there, free and multiplies; what went wrong."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        return f"no GPU for local rank {local_rank}, PyTorch sees {count}"
    try:
        free, total = torch.cuda.mem_get_info(local_rank)
        if free < free_memory * total:
            return (
                f"GPU {local_rank}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; "
                "another process holds the rest"
            )
        ones = torch.ones(2048, 2048, device=f"cuda:{local_rank}", dtype=torch.bfloat16)
        if not bool(((ones @ ones) == 2048).all()):
            return f"GPU {local_rank} multiplies wrongly"
    except RuntimeError as error:
        return f"GPU {local_rank}: {error}"
    return None
