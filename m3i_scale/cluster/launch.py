"""Ranks, devices, process group: from the environment of deepspeed, torchrun, srun or none."""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from m3i_scale.cluster.numerics import prepare_allocator
from m3i_scale.config import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

PACKAGES = ("m3i_scale", "m3i_kernels")  # whose loggers `speak` configures
# Variables that number the tasks of a node: Slurm's, Open MPI's, MPICH's and Intel's, MVAPICH's.
LOCAL_RANKS = (
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
)


class RankError(ConfigError):
    """Something is wrong with this rank, and perhaps with no other."""

    on_one_rank = True


class PortTakenError(RankError):
    """Another program listens where the ranks are to meet."""

    def __init__(self, address: str, port: str) -> None:
        super().__init__(
            f"the ranks cannot meet at {address}:{port}, because another program, perhaps another "
            "training, listens there; choose another port: deepspeed --master_port N, torchrun "
            "--master-port N, or MASTER_PORT=N"
        )
        # A restarted job meets at another port (slurm/common.sh); by hand one has to be given.
        self.exit_code = 1 if "SLURM_JOB_ID" in os.environ else 2


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
        ConfigError: several ranks but no address to meet at, variables that contradict each other,
            or several ranks of which none knows its number on its node.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if len(given) == 2:
        return _launched(environment)
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
    if given == ["RANK"] or (given and environment["WORLD_SIZE"] != "1"):
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ConfigError(
            f"{given[0]} is {environment[given[0]]} but {missing} is not set; a launcher "
            f"sets both: unset {given[0]} to train in one process"
        )
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _launched(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a launcher that has set RANK and WORLD_SIZE."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: environment[name] for name in names if name in environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environment.get(name, "0").isdigit():
            raise RankError(f"{name} is {environment[name]!r}: it must be a whole number")
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    if rank >= size:
        raise RankError(f"RANK is {rank} and WORLD_SIZE is {size}: ranks count from 0")
    # Nobody else has to know the port, and the usual one may be taken; but torchrun's own process
    # serves a store at the one it names, and PyTorch would look for it at ours.
    if size == 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    missing = [name for name in names if name not in found]
    if missing:
        raise RankError(
            f"RANK is {rank} of {size} but {' and '.join(missing)} is not set; export the address "
            "and a free port of rank 0's node on all ranks"
        )
    local = next(
        (n for n in ("LOCAL_RANK", *LOCAL_RANKS) if environment.get(n, "").isdigit()), None
    )
    if local is None and size > 1:
        raise RankError(
            f"RANK is {rank} of {size} but LOCAL_RANK is not set, so that all ranks of a node "
            "would take the same GPU; export LOCAL_RANK, the number of the rank on its node"
        )
    return {"LOCAL_RANK": environment[local] if local else "0", **found}


def choose_device(wanted: str, precision: str, local_rank: int) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: a GPU was asked for and there is none for this rank, or fp16 on a CPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not gpus:
        raise RankError(
            "engine.device is cuda but PyTorch sees no GPU; check the driver with nvidia-smi, or "
            "set engine.device=cpu"
        )
    if wanted != "cpu" and gpus:
        if local_rank >= gpus:
            raise RankError(
                f"local rank {local_rank} has no GPU of its own, this node shows {gpus}; start one "
                "task per GPU"
            )
        return torch.device("cuda", local_rank)
    if precision == "fp16":
        raise RankError("engine.precision fp16 needs a GPU; set engine.precision=bf16 or fp32")
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


def start(
    device: str,
    precision: str,
    seed: int,
    timeout_minutes: float,
    *,
    before_joining: Callable[[], None] = lambda: None,
) -> World:
    """Join the process group and seed this rank's generators.

    `before_joining` is called when everything has been imported and the ranks are to meet.

    Raises:
        ConfigError: as `rank_variables` and `choose_device`, or the port is taken.
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
    # DeepSpeed calls these in every step, and PyTorch says so in every step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\."
    )
    # The device is the one that is set above.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context")
    before_joining()
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if chosen.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            verbose=False,
        )
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise PortTakenError(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) from None
    seed_rank(seed, rank)
    return World(rank, local_rank, size, chosen)


def seed_rank(seed: int, rank: int) -> None:
    """Seed every generator a module may draw from (drop-path, dropout); differs between ranks."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def gather_objects(own: T, world: World) -> list[T]:
    """What each rank has, in the order of ranks, on all of them (a collective)."""
    if world.size == 1:
        return [own]
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, own)
    return every


@contextlib.contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws what the seed says; afterwards its generators go on as if nothing was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def finish() -> None:
    """Leave the process group in step; a rank that left early would abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_rank_0(world: World, action: Callable[[], None], folder: Path) -> None:
    """Run `action` on rank 0; what it raises for users is raised on all ranks (a collective).

    Args:
        world: this rank.
        action: what is to be done once.
        folder: where it writes; named where the system does not say of which file it speaks.

    Raises:
        ConfigError: the action failed for a reason that a user can mend.
    """
    said: list[str] = [""]
    if world.is_main:
        try:
            action()
        except OSError as error:
            said = [os_error_sentence(error, folder)]
        except Exception as error:
            if not getattr(error, "for_users", False):
                raise
            said = [str(error)]
    if world.size > 1:
        dist.broadcast_object_list(said, src=0, device=world.device)
    if said[0]:
        raise ConfigError(said[0])


def os_error_sentence(error: OSError, folder: Path | None = None) -> str:
    """What the operating system refused, and of which file; in `folder` if it does not say."""
    what = error.strerror or str(error) or type(error).__name__
    name = error.filename2 or error.filename or folder
    remedy = {
        errno.ENOSPC: "; make room there or choose another folder",
        errno.EDQUOT: "; make room within your quota or choose another folder",
        errno.EROFS: "; choose a folder that can be written",
        errno.EACCES: "; choose a folder that can be written, or change its permissions",
        errno.EPERM: "; choose a folder that can be written, or change its permissions",
        errno.ENOTDIR: "; a file stands where a folder is needed",
        errno.EEXIST: "; a file stands where a folder is needed",
    }.get(error.errno or 0, "")
    return f"{name}: {what}{remedy}" if name is not None else f"{what}{remedy}"


def setup_logging(world_rank: int, level: int = logging.INFO) -> None:
    """Log to standard error: rank 0 from `level`, the others warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {world_rank}] %(message)s"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers[:] = [handler]
        logger.setLevel(level if world_rank == 0 else logging.WARNING)
        logger.propagate = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
