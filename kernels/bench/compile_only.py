"""Compile kernels for GPUs that are not there, and read what the compiler says about them.

A launch is recorded, not run: the operators' own launch code is called on meta tensors with the
kernel replaced by a recorder. So what is compiled here is what a GPU would be given: the same
signature, constants, alignment hints and options.
"""

import contextlib
import functools
import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from m3i_kernels.dcnv3 import matrix_op
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Launch(NamedTuple):
    """One recorded launch: the kernel, its arguments by name and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    programs: int


class Resources(NamedTuple):
    """What one compiled kernel takes; `in_loops` are the instructions within loops."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    in_loops: int = 0


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._record, math.prod(grid))

    def _record(self, programs: int, *args: Any, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.launches.append(Launch(self.kernel, arguments, options, programs))


@contextlib.contextmanager
def record(module: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of all kernels that `module` imported, instead of running them."""
    launches: list[Launch] = []
    kernels = {k: v for k, v in vars(module).items() if isinstance(v, triton.runtime.JITFunction)}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


@contextlib.contextmanager
def record_matrix() -> Iterator[list[Launch]]:
    """Record the launches of DCNv3's matrix kernels, instead of running them."""
    launches: list[Launch] = []
    kernels = matrix_op.kernels
    recorders = {k: _Recorder(kernel, launches) for k, kernel in kernels().items()}
    try:
        matrix_op.kernels = lambda: recorders  # type: ignore[assignment]
        yield launches
    finally:
        matrix_op.kernels = kernels


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a recorded launch for a target, one of `TARGETS`.

    `num_warps` is what the operator chose for warps of 32 threads; a target with warps of 64 gets
    half as many, as it does at run time.
    """
    gpu = TARGETS[target]
    compiled = compiled_for(launch, target)
    read = read_cubin if gpu.backend == "cuda" else _read_amdgcn
    return read(compiled)


def executed_instructions(cubin: bytes, trips: int) -> int:
    """Count the instructions a warp issues in a kernel whose longest loop runs `trips` times.

    Everything outside of that loop counts once, whichever way its branches go.
    """
    lines = _disassemble(cubin)
    labels: dict[str, int] = {}
    loop, count = 0, 0
    for line in lines:
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = count
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line) and "NOP" not in line:
            count += 1
            target = re.search(r"BRA.*`\((\.L_\w+)\)", line)
            if target and target[1] in labels:
                loop = max(loop, count - labels[target[1]])
    return count + (trips - 1) * loop if loop > 1 else count


def _disassemble(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output(_TOOLS / "nvdisasm", "-c", file.name).splitlines()


def compiled_for(launch: Launch, target: str) -> Any:
    """Compile a recorded launch for a target, as Triton returns it."""
    gpu = TARGETS[target]
    options = dict(launch.options)
    options["num_warps"] = max(1, options["num_warps"] * 32 // gpu.warp_size)
    return triton.compile(source(launch), target=gpu, options=options)


def source(launch: Launch) -> ASTSource:
    """Return what Triton would compile for a launch: signature, constants and alignment hints."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if specialised and aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    if not launch.kernel.is_gluon():
        return ASTSource(launch.kernel, signature, constexprs=constants, attrs=hints)
    from triton.experimental.gluon._runtime import GluonASTSource  # not in the first Tritons

    return GluonASTSource(launch.kernel, signature, constexprs=constants, attrs=hints)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def read_cubin(compiled: Any) -> Resources:
    """Read registers, spills, shared memory and size from a compiled kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output(_TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name)
    fields = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return Resources(
        registers=int(fields["REG"]),
        spilled_bytes=int(fields["STACK"]) + int(fields["LOCAL"]),
        shared_bytes=max(int(fields["SHARED"]), compiled.metadata.shared),
        **_count("\n".join(_disassemble(compiled.asm["cubin"]))),
    )


def _count(sass: str) -> dict[str, int]:
    """Count instructions, all and within loops: from the target of a backward branch to it."""
    labels: dict[str, int] = {}
    inside: set[int] = set()
    n = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_?x?_?\w+):", line):
            labels[label[1]] = n
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            if "NOP" in code[1].split()[:1]:
                continue
            target = re.search(r"BRA.*`\((\.L\w+)\)", code[1])
            if target and labels.get(target[1], n) < n:
                inside.update(range(labels[target[1]], n + 1))
            n += 1
    return {"instructions": n, "in_loops": len(inside)}


def _read_amdgcn(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    field = {k: int(v) for k, v in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return Resources(
        registers=field["vgpr_count"],
        spilled_bytes=field["private_segment_fixed_size"]
        + 4 * (field["vgpr_spill_count"] + field["sgpr_spill_count"]),
        shared_bytes=max(field["group_segment_fixed_size"], compiled.metadata.shared),
        instructions=len(re.findall(r"^\t[vsdbg]\w+_\w+", text, re.MULTILINE)),
    )


def _output(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout
