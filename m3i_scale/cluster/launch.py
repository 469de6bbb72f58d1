"""Ranks, devices, process group: from the environment of deepspeed, torchrun, srun or none."""

from __future__ import annotations

import datetime
import logging
import os
import random
import socket
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from m3i_scale.cluster.numerics import prepare_allocator
from m3i_scale.config import ConfigError

log = logging.getLogger("m3i")


class World(NamedTuple):
    """This process among its peers."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for this process.

    Taken as they are under `deepspeed` or `torchrun`; derived from Slurm's variables under `srun`
    (which sets none of them); a world of one otherwise.

    Raises:
        ConfigError: several Slurm tasks but no address to meet at.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        found = {name: environment[name] for name in names if name in environment}
        return {"LOCAL_RANK": environment.get("LOCAL_RANK", "0"), **found}
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
            raise ConfigError(
                "started by srun with several tasks but MASTER_ADDR or MASTER_PORT is not set; "
                "export them in the batch script as slurm/pretrain_internimage_h.sbatch does"
            )
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "MASTER_ADDR": environment["MASTER_ADDR"],
            "MASTER_PORT": environment["MASTER_PORT"],
        }
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def choose_device(wanted: str, precision: str, local_rank: int) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: a GPU was asked for and there is none for this rank, or fp16 on a CPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not gpus:
        raise ConfigError(
            "engine.device is cuda but PyTorch sees no GPU; check the driver with nvidia-smi, or "
            "set engine.device=cpu"
        )
    if wanted != "cpu" and gpus:
        if local_rank >= gpus:
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own, this node shows {gpus}; start one "
                "task per GPU"
            )
        return torch.device("cuda", local_rank)
    if precision == "fp16":
        raise ConfigError("engine.precision fp16 needs a GPU; set engine.precision=bf16 or fp32")
    return torch.device("cpu")


def choose_accelerator(kind: str) -> None:
    """Have DeepSpeed work on "cpu" or "cuda", whatever the machine has and DS_ACCELERATOR says.

    Raises:
        RuntimeError: deepspeed was imported before, when it chose another one for good.
    """
    os.environ["DS_ACCELERATOR"] = kind
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != kind:
        raise RuntimeError(
            f"deepspeed was imported before the device was chosen and works on {chosen}, this rank "
            f"on {kind}; import what needs deepspeed after `launch.start`"
        )


def start(device: str, precision: str, seed: int, timeout_minutes: float) -> World:
    """Join the process group and seed this rank's generators.

    Raises:
        ConfigError: as `rank_variables` and `choose_device`.
    """
    os.environ.update(rank_variables(os.environ))
    rank, local_rank, size = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    chosen = choose_device(device, precision, local_rank)
    choose_accelerator(chosen.type)
    import deepspeed

    # On a CPU DeepSpeed compiles an all-reduce for inference, which training never calls. A rank
    # killed meanwhile would leave a lock in PyTorch's cache of extensions, and every later start
    # would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if chosen.type == "cuda":
        prepare_allocator()
        torch.cuda.set_device(chosen)
    deepspeed.init_distributed(
        dist_backend="nccl" if chosen.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    seed_rank(seed, rank)
    return World(rank, local_rank, size, chosen)


def seed_rank(seed: int, rank: int) -> None:
    """Seed every generator a module may draw from (drop-path, dropout); differs between ranks."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def finish() -> None:
    """Leave the process group in step; a rank that left early would abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def setup_logging(world_rank: int, level: int = logging.INFO) -> None:
    """Log to standard error: rank 0 from `level`, the others warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {world_rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level if world_rank == 0 else logging.WARNING)
    log.propagate = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
