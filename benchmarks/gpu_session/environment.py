"""Part 1: what the machine has: GPU, driver, compiler, headers, shared memory, versions."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import rows
import torch


def main() -> int:
    """Write the report; 1 where PyTorch sees no GPU although this is no rehearsal."""
    if not rows.REHEARSE and not torch.cuda.is_available():
        print(rows.output("nvidia-smi") or "there is no nvidia-smi")
        print("error: PyTorch sees no GPU; check the driver, or rehearse on CPUs with --rehearse")
        return 1
    print(rows.output("nvidia-smi") or "there is no nvidia-smi")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    memory = shutil.disk_usage("/dev/shm")
    rows.write(
        "setup",
        "environment",
        python=platform.python_version(),
        executable=sys.executable,
        packages={name: rows.version(name) for name in rows.PACKAGES},
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        gcc=shutil.which("gcc"),
        nvcc=shutil.which("nvcc"),
        python_h=str(header) if header.exists() else None,
        shm_gib=memory.total / 2**30,
        shm_free_gib=memory.free / 2**30,
        cores=len(os.sched_getaffinity(0)),
        host_memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        gpu_memory_gib=None if rows.REHEARSE else _gpu_memory(),
    )
    return 0


def _gpu_memory() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30


if __name__ == "__main__":
    sys.exit(main())
