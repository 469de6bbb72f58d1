"""Facts about processes of this machine, from /proc; where there is none, from signals."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Programs and modules that start ranks and outlive them. A shell or a terminal is none: what it has
# started in the background shall live on.
PROGRAMS = ("deepspeed", "torchrun", "mpirun", "mpiexec", "orted", "prted", "hydra_pmi_proxy")
MODULES = ("deepspeed.launcher", "torch.distributed", "slurmstepd")


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if there is none, or no /proc."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def began(pid: int) -> float | None:
    """When a process started, seconds since 1970 to a hundredth; None where it cannot be known."""
    ticks = start_time(pid)
    if ticks is None:
        return None
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - max(0.0, running)


def parent(pid: int) -> int:
    """The parent's process id; 0 if it cannot be known."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def is_running(pid: int, born: int | None) -> bool:
    """Whether the process with this id and start time runs (a zombie does not)."""
    if pid <= 0:
        return False
    fields = _stat(pid)
    if fields:
        return fields[0] not in "ZX" and (born is None or int(fields[19]) == born)
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def machine() -> str:
    """Where a process id means the same process: one boot, one namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def launchers() -> dict[int, int | None]:
    """The launchers above this process, nearest first: process id -> start time."""
    found: dict[int, int | None] = {}
    pid = os.getppid()
    while pid > 1:
        if _is_launcher(pid):
            found[pid] = start_time(pid)
        pid = parent(pid)
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # Program, options and script; what follows are arguments of the training program.
    return any(Path(word).name in PROGRAMS or word.startswith(MODULES) for word in words[:4])
