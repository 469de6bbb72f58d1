"""The command `m3i doctor`: what this machine has for training, what is missing, and what to do.

It looks at one machine, without a process group; `node_check` looks at the nodes of a job.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import m3i_scale

DESCRIPTION = """Say what this machine has for training, what is missing, and what to do about it.

Exit codes: 0 training can start here (advice may remain); 2 something is missing."""

SHARED_MEMORY = 170e6  # bytes that the data workers of a rank hand over through (node_check)
LEAST_DISK, LEAST_CACHE = 20 * 2**30, 2**30  # bytes
LEAST_FILES = 4096  # open at once: shards, sockets and pipes of the data workers
FREE_GPU_MEMORY = 0.9
COMPILERS = ("cc", "gcc", "clang")


class Finding(NamedTuple):
    """One line: what there is, and what to do if it is not good."""

    name: str
    value: str
    state: Literal["ok", "advice", "missing"] = "ok"
    remedy: str = ""


Findings = Iterator[Finding]


def register(subparsers: Any) -> None:
    """Add the command to an `ArgumentParser.add_subparsers()`; it sets `run(args) -> int`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has for training, what is missing, and what to do",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where runs shall be (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`m3i doctor`."""
    found = examine(options.folder)
    missing = [one for one in found if one.state == "missing"]
    if options.json:
        content = {"ready": not missing, "findings": [one._asdict() for one in found]}
        print(json.dumps(content, indent=1))
    else:
        for one in found:
            remedy = f"\n{'':8}-> {one.remedy}" if one.remedy else ""
            print(f"{one.state:8}{one.name}: {one.value}{remedy}")
        print(f"{len(missing)} missing" if missing else "Training can start here.")
    return 2 if missing else 0


def examine(folder: Path) -> list[Finding]:
    """All findings; a check that fails itself is one, too."""
    found: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed speaks there as it is imported
                found += check(folder)
        except Exception as error:  # whatever a broken installation may raise
            words = " ".join(f"{type(error).__name__}: {error}".split())
            remedy = "install what is named again; see the other lines for what fits"
            found.append(Finding(name, words, "missing", remedy))
    return found


# --------------------------------------------------------------------------------------- software


def _python(_: Path) -> Findings:
    good = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Finding(
        "python", f"{platform.python_version()}, {sys.executable}", "ok" if good else "missing",
        "" if good else "make an environment with Python 3.10, 3.11 or 3.12",
    )  # fmt: skip


def _packages(_: Path) -> Findings:
    """What the package requires, against what is installed."""
    from packaging.requirements import Requirement

    version, remedy = (
        m3i_scale.__version__,
        "pip install -e . in the checkout, or install the wheel",
    )
    try:
        required = importlib.metadata.requires("m3i-scale") or []
        listed = importlib.metadata.version("m3i-scale")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("m3i-scale", f"{version}, not installed as a package", "advice", remedy)
        return
    if listed == version:
        yield Finding("m3i-scale", version)
    else:
        yield Finding("m3i-scale", f"{version}, installed as {listed}", "advice", remedy)
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield _package(requirement, "not installed", "missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield _package(requirement, version, "missing")
        elif requirement.name in ("torch", "deepspeed", "triton", "transformers"):
            yield Finding(requirement.name, version)


def _package(requirement: Any, value: str, state: Literal["missing"]) -> Finding:
    words = f"{requirement.name}{requirement.specifier}"
    return Finding(requirement.name, value, state, f"pip install '{words}'")


def _deepspeed(_: Path) -> Findings:
    from deepspeed.accelerator import get_accelerator

    asked = os.environ.get("DS_ACCELERATOR")
    name = get_accelerator().device_name()
    gpus = _gpu_count()
    odd = gpus and name != "cuda"
    yield Finding(
        "DeepSpeed's accelerator", name + (f" (DS_ACCELERATOR={asked})" if asked else ""),
        "advice" if odd else "ok",
        "unset DS_ACCELERATOR: `deepspeed` starts one rank for each GPU then" if odd else "",
    )  # fmt: skip


def _compiler(_: Path) -> Findings:
    """Triton compiles a launcher in C for each kernel."""
    named = os.environ.get("CC")
    found = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if found:
        yield Finding("C compiler", found)
        return
    what = f"CC={named} is no program" if named else "none of " + ", ".join(COMPILERS)
    remedy = "install gcc, or name a compiler in CC; Triton cannot start kernels without one"
    yield Finding("C compiler", what, "missing" if _gpu_count() else "advice", remedy)


# ------------------------------------------------------------------------------------------ devices


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def driver() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else text.split("\n")[0]


def _gpus(_: Path) -> Findings:
    import torch

    version, built, count = driver(), torch.version.cuda, _gpu_count()
    if version:
        yield Finding("NVIDIA driver", version)
    if not count:
        yield _no_gpu(version, built)
        return
    yield Finding("CUDA of PyTorch", str(built))
    yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    for number in range(count):
        yield _gpu(number)


def _no_gpu(version: str | None, built: str | None) -> Finding:
    if version is None:
        return Finding("GPU", "none; training runs on the CPU here")
    remedy = (
        f"the driver {version} may be too old for CUDA {built}, or CUDA_VISIBLE_DEVICES hides the "
        "GPUs: see nvidia-smi"
        if built
        else "this PyTorch is built for CPUs: install one for CUDA (pytorch.org)"
    )
    return Finding("GPU", "a driver is there, and PyTorch sees no GPU", "missing", remedy)


def _gpu(number: int) -> Finding:
    import torch

    from m3i_scale.cluster.node_state import gpu_problem

    properties = torch.cuda.get_device_properties(number)
    what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_" + (
        f"{properties.major}{properties.minor}"
    )
    problem = gpu_problem(number, FREE_GPU_MEMORY)
    if problem is None:
        return Finding(f"GPU {number}", what)
    return Finding(f"GPU {number}", what, "missing", problem)


# ---------------------------------------------------------------------------- memory, disk, limits


def _shared_memory(_: Path) -> Findings:
    from m3i_scale.cluster import node_state

    ranks = max(1, _gpu_count())
    problem = node_state.shared_memory_problem(SHARED_MEMORY * ranks, node_state.SHARED_MEMORY)
    state: Literal["ok", "missing"] = "missing" if problem else "ok"
    yield Finding("shared memory", _space(node_state.SHARED_MEMORY), state, problem or "")


def _space(place: Path) -> str:
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return f"{place}: {error.strerror}"
    return f"{usage.free / 2**30:,.1f} of {usage.total / 2**30:,.1f} GiB free at {place}"


def _disks(folder: Path) -> Findings:
    yield _disk("run folder", folder, LEAST_DISK, "a checkpoint takes 16 bytes a parameter")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    finding = _disk("Triton's cache", cache, LEAST_CACHE, "set TRITON_CACHE_DIR to a local disk")
    place = _existing(cache)
    if finding.state == "ok" and os.statvfs(place).f_flag & os.ST_NOEXEC:
        remedy = "set TRITON_CACHE_DIR to a folder from which programs may be loaded"
        finding = finding._replace(state="missing", remedy=f"{place} is mounted noexec: {remedy}")
    yield finding


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _disk(name: str, path: Path, least: float, why: str) -> Finding:
    place = _existing(path)
    if not place.is_dir():
        return Finding(name, str(place), "missing", f"{place} is no folder; remove or rename it")
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, str(place), "missing", f"{place} cannot be written; choose another")
    if shutil.disk_usage(place).free < least:
        remedy = f"make room: {least / 2**30:.0f} GiB or more; {why}"
        return Finding(name, _space(place), "advice", remedy)
    return Finding(name, _space(place))


def _limits(_: Path) -> Findings:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < LEAST_FILES
    remedy = f"ulimit -n {LEAST_FILES} in the shell or batch script (the hard limit is {hard})"
    yield Finding("open files", _limit(soft), "advice" if low else "ok", remedy if low else "")
    locked, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    tight = bool(_infiniband()) and locked != resource.RLIM_INFINITY
    remedy = "ulimit -l unlimited (limits.conf, Slurm's PropagateResourceLimits): NCCL needs it "
    remedy += "for InfiniBand"
    yield Finding(
        "locked memory", _limit(locked), "advice" if tight else "ok", remedy if tight else ""
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


# ------------------------------------------------------------------------------------------ network

INTERFACES, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")


def _infiniband() -> list[str]:
    return sorted(path.name for path in INFINIBAND.glob("*"))


def _network(_: Path) -> Findings:
    states = {path.name: _link(path) for path in sorted(INTERFACES.glob("*"))}
    shown = ", ".join(f"{name} ({state})" for name, state in states.items())
    yield Finding("network interfaces", shown or "none are shown here")
    cards = _infiniband()
    if cards:
        yield Finding("InfiniBand", ", ".join(cards))
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable)
        if wanted and states:
            yield _interface(variable, wanted, list(states))


def _link(path: Path) -> str:
    try:
        return (path / "operstate").read_text().strip()
    except OSError:
        return "unknown"


def _interface(variable: str, wanted: str, names: list[str]) -> Finding:
    """Whether a variable names an interface; NCCL takes beginnings, `=name` and `^not`."""
    words = [word.lstrip("=") for word in wanted.split(",") if word]
    if wanted.startswith("^") or any(name.startswith(word) for name in names for word in words):
        return Finding(variable, wanted)
    return Finding(
        variable, f"{wanted}, which is none of the interfaces", "missing",
        f"set it to one of {', '.join(names)}, or unset it",
    )  # fmt: skip


CHECKS: dict[str, Callable[[Path], Findings]] = {
    "python": _python,
    "packages": _packages,
    "GPUs": _gpus,
    "DeepSpeed": _deepspeed,
    "C compiler": _compiler,
    "shared memory": _shared_memory,
    "disks": _disks,
    "limits": _limits,
    "network": _network,
}
