"""Run Gluon kernels on the CPU with torch, one program after the other.

Triton's interpreter does not run Gluon. This emulates what the kernels here use of it: values,
integer widths, masks, shared memory (uninitialised memory is NaN or noise), atomics and inline PTX.
Layouts and barriers have no meaning here. Every access is checked for its bounds.

    with emulated():                      # stand-ins for triton.experimental.gluon
        module = importlib.import_module(...)
    Emulated(module.kernel)[(programs,)](tensors and numbers..., **constants)
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

Raw = torch.Tensor


class DType:
    """An element type: integers are held as int64 and wrapped to their width after each step."""

    def __init__(self, name: str, storage: torch.dtype) -> None:
        self.name, self.storage = name, storage
        self.integer = "int" in name and name != "int1"
        self.unsigned = name.startswith("u")
        self.bits = int(re.sub(r"\D", "", name.replace("bfloat", "")))

    def wrap(self, raw: Raw) -> Raw:
        """Bring a result into the range and precision of this type."""
        if not self.integer:
            return raw.to(self.storage)
        if self.unsigned:
            return raw.to(torch.int64) & ((1 << self.bits) - 1)
        return raw.to(self.storage).to(torch.int64)


int1 = DType("int1", torch.bool)
int16, int32, int64 = (DType(f"int{b}", getattr(torch, f"int{b}")) for b in (16, 32, 64))
uint32 = DType("uint32", torch.int64)
float32, bfloat16 = DType("float32", torch.float32), DType("bfloat16", torch.bfloat16)
_ORDER = [int1, int16, int32, uint32, int64, bfloat16, float32]
_OF = {t.storage: t for t in _ORDER if t is not uint32}


class Value:
    """A tensor of the kernel, or a scalar of no dimensions."""

    def __init__(self, raw: Raw, dtype: DType) -> None:
        self.raw, self.dtype = dtype.wrap(raw), dtype

    @property
    def shape(self) -> list[int]:
        """Return the sizes."""
        return list(self.raw.shape)

    def to(self, dtype: DType, bitcast: bool = False) -> "Value":
        """Convert as the GPU does: floats to integers saturate, and NaN becomes zero."""
        if bitcast:
            return _bitcast(self, dtype)
        raw = self.raw
        if dtype.integer and raw.is_floating_point():
            top = (1 << (dtype.bits - 1)) - 1
            raw = torch.nan_to_num(raw.double(), nan=0.0, posinf=top, neginf=-top - 1)
            raw = raw.clamp(-top - 1, top).trunc()
        return Value(raw, dtype)

    def reshape(self, shape: list[int]) -> "Value":
        """Change the sizes."""
        return Value(self.raw.reshape(shape), self.dtype)

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.raw[index], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __index__(self) -> int:
        return int(self.raw)

    def __neg__(self) -> "Value":
        return Value(-self.raw, self.dtype)

    def __invert__(self) -> "Value":
        return Value(~self.raw, self.dtype)


def _binary(name: str, compute: Callable[[Raw, Raw], Raw], compares: bool = False) -> None:
    def forward(a: Value, b: Any) -> Any:
        if isinstance(b, Pointer):
            return NotImplemented
        x, y = _together(a, b)
        return Value(compute(x.raw, y.raw), int1 if compares else x.dtype)

    def reflected(b: Value, a: Any) -> Value:
        x, y = _together(a, b)
        return Value(compute(x.raw, y.raw), x.dtype)

    setattr(Value, f"__{name}__", forward)
    if not compares:
        setattr(Value, f"__r{name}__", reflected)


for _name in ("add", "sub", "mul", "truediv", "and_", "or_", "xor"):
    _binary(_name.rstrip("_"), getattr(torch, {"and_": "bitwise_and", "or_": "bitwise_or",
            "xor": "bitwise_xor", "truediv": "div"}.get(_name, _name)))  # fmt: skip
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _binary(_name, getattr(torch, _name), compares=True)
_binary("floordiv", lambda a, b: torch.div(a, b, rounding_mode="trunc"))
_binary("mod", torch.fmod)
_binary("lshift", torch.bitwise_left_shift)
_binary("rshift", torch.bitwise_right_shift)


def _lift(a: Any, like: Value | None = None) -> Value:
    if isinstance(a, Value):
        return a
    if isinstance(a, bool):
        return Value(torch.tensor(a), int1)
    if isinstance(a, int):
        return Value(
            torch.tensor(a), like.dtype if like is not None and like.dtype is not int1 else int32
        )
    return Value(torch.tensor(a, dtype=torch.float64), float32)


def _together(a: Any, b: Any) -> tuple[Value, Value]:
    x = _lift(a, b if isinstance(b, Value) else None)
    y = _lift(b, x)
    dtype = max(x.dtype, y.dtype, key=_ORDER.index)
    return x.to(dtype), y.to(dtype)


def _bitcast(value: Value, dtype: DType) -> Value:
    if value.dtype.integer and dtype.integer:
        return Value(value.raw, dtype)
    stored = int32 if value.dtype is uint32 else value.dtype
    raw = stored.wrap(value.raw).to(stored.storage).contiguous()
    return Value(raw.view(dtype.storage), dtype)


class Pointer:
    """Addresses into one flat tensor of global memory."""

    def __init__(self, memory: Raw, offset: Raw) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + _lift(other).raw.to(torch.int64))

    def at(self, mask: Any) -> tuple[Raw, Raw]:
        """Return (addresses, mask), of one shape; those not masked are inside."""
        on = _lift(True if mask is None else mask).raw
        offset, on = torch.broadcast_tensors(self.offset, on)
        bad = on & ((offset < 0) | (offset >= self.memory.numel()))
        assert not bad.any(), "access to global memory out of bounds"
        return offset, on


def load(p: Pointer, mask: Any = None, other: Any = 0) -> Value:
    """Read global memory."""
    offset, on = p.at(mask)
    read = p.memory[torch.where(on, offset, 0)]
    return Value(torch.where(on, read, torch.tensor(other, dtype=read.dtype)), _OF[read.dtype])


def store(p: Pointer, value: Value, mask: Any = None) -> None:
    """Write global memory."""
    offset, on = p.at(mask)
    raw = torch.broadcast_to(value.raw.to(p.memory.dtype), offset.shape)
    p.memory[offset[on]] = raw[on]


class Shared:
    """A view of shared memory."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw

    def store(self, value: Value) -> None:
        """Write all of it."""
        assert list(self.raw.shape) == value.shape
        assert _OF[self.raw.dtype] is value.dtype
        self.raw.copy_(value.raw)

    def load(self, layout: object = None) -> Value:
        """Read all of it."""
        return Value(self.raw.clone(), _OF[self.raw.dtype])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        """View part of one dimension."""
        return Shared(self.raw.narrow(dim, start, length))

    def index(self, i: int) -> "Shared":
        """View one entry of the first dimension."""
        return Shared(self.raw[int(i)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        """View with dimensions exchanged."""
        return Shared(self.raw.permute(*order))

    def _reinterpret(self, dtype: DType, shape: list[int], layout: object) -> "Shared":
        return Shared(self.raw.view(-1).view(dtype.storage).view(shape))

    def _indices(self, indices: Value, axis: int) -> Raw:
        inside = (indices.raw >= 0) & (indices.raw < self.raw.shape[axis])
        assert inside.all(), "access to shared memory out of bounds"
        return indices.raw

    def gather(self, indices: Value, axis: int) -> Value:
        """Read scattered elements."""
        return Value(self.raw.gather(axis, self._indices(indices, axis)), _OF[self.raw.dtype])

    def scatter(self, values: Value, indices: Value, axis: int) -> None:
        """Write scattered elements."""
        i, v = torch.broadcast_tensors(self._indices(indices, axis), values.raw)
        self.raw.scatter_(axis, i, v.to(self.raw.dtype))

    def atomic_scatter_add(self, values: Value, indices: Value, axis: int) -> None:
        """Add to scattered elements."""
        i, v = torch.broadcast_tensors(self._indices(indices, axis), values.raw)
        self.raw.scatter_add_(axis, i, v.to(self.raw.dtype))


def allocate_shared_memory(dtype: DType, shape: list[int], layout: object) -> Shared:
    """Allocate memory that holds NaN or noise."""
    if dtype.integer:
        return Shared(torch.randint(-(2**14), 2**14, shape).to(dtype.storage))
    return Shared(torch.full(shape, torch.nan, dtype=dtype.storage))


def _async_load(m: Shared, p: Pointer, mask: Any = None) -> None:
    m.store(load(p, mask))


# -- inline PTX: registers are int64 tensors of 32 bits ----------------------------------------


def _float_of(register: Raw) -> Raw:
    return int32.wrap(register).to(torch.int32).view(torch.float32)


def _register_of(value: Raw) -> Raw:
    return value.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _prmt(a: Raw, b: Raw, selector: Raw) -> Raw:
    a, b, selector = torch.broadcast_tensors(a, b, selector)
    parts = torch.stack([(r >> (8 * i)) & 255 for r in (a, b) for i in range(4)])
    picked = [parts.gather(0, ((selector >> (4 * i)) & 7)[None])[0] << (8 * i) for i in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def _bf16x2(upper: Raw, lower: Raw) -> Raw:
    halves = [_float_of(r).to(torch.bfloat16).view(torch.int16) for r in (upper, lower)]
    upper, lower = (h.to(torch.int64) & 0xFFFF for h in halves)
    return (upper << 16) | lower


_PTX: dict[str, Callable[..., Raw]] = {
    "prmt.b32": _prmt,
    "shl.b32": lambda a, n: (a << n) & 0xFFFFFFFF,
    "cvt.rn.f32.u32": lambda a: _register_of(a.double()),
    "cvt.rn.bf16x2.f32": _bf16x2,
}


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Any], dtype: DType, is_pure: bool, pack: int
) -> Value:
    """Run PTX text; with pack = 2 two neighbouring 16-bit values share a register."""
    values = [_lift(a) for a in args]
    registers = {f"${i + 1}": _to_register(v, pack) for i, v in enumerate(values)}
    for statement in re.split(r"[;{}]", asm):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operands = [registers[w] if w in registers else torch.tensor(int(w)) for w in words[2:]]
        registers[words[1]] = _PTX[words[0]](*operands)
    out = registers["$0"]
    if pack == 1:
        return _bitcast(Value(out, int32), dtype)
    halves = torch.stack((out & 0xFFFF, out >> 16), -1).flatten(-2)
    return Value(int16.wrap(halves).to(torch.int16).view(dtype.storage), dtype)


def _to_register(value: Value, pack: int) -> Raw:
    if pack == 1:
        return _bitcast(value, int32).raw & 0xFFFFFFFF
    pairs = (value.raw & 0xFFFF).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 16)


# -- the modules ---------------------------------------------------------------------------------


def _where(condition: Value, a: Any, b: Any) -> Value:
    x, y = _together(a, b)
    return Value(torch.where(condition.raw, x.raw, y.raw), x.dtype)


def _fma(a: Value, b: Value, c: Value) -> Value:
    return Value(a.raw.double() * b.raw.double() + c.raw.double(), float32)


def _pairwise(compute: Callable[[Raw, Raw], Raw]) -> Callable[[Any, Any], Value]:
    def apply(a: Any, b: Any) -> Value:
        x, y = _together(a, b)
        return Value(compute(x.raw, y.raw), x.dtype)

    return apply


def _mma_v2(a: Value, b: Value, c: Value) -> Value:
    assert a.dtype is bfloat16
    assert b.dtype is bfloat16
    return Value(c.raw + a.raw.float() @ b.raw.float(), float32)


_LAYOUTS = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout",
            "SwizzledSharedLayout")  # fmt: skip
_program = 0
_SIZED: dict[str, Callable[..., Any]] = {
    "arange": lambda a, b, layout=None: Value(torch.arange(a, b), int32),
    "full": lambda shape, v, dtype, layout=None: Value(torch.full(shape, v), dtype),
    "zeros": lambda shape, dtype, layout=None: Value(torch.zeros(shape), dtype),
    "zeros_like": lambda a: Value(torch.zeros_like(a.raw), a.dtype),
}
_LANGUAGE: dict[str, Any] = {
    **{t.name: t for t in _ORDER},
    **_SIZED,
    "constexpr": lambda value: value,
    "static_range": range,
    "program_id": lambda axis: Value(torch.tensor(_program), int32),
    "load": load,
    "store": store,
    "allocate_shared_memory": allocate_shared_memory,
    "shared_memory_descriptor": Shared,
    "inline_asm_elementwise": inline_asm_elementwise,
    "where": _where,
    "fma": _fma,
    "maximum": _pairwise(torch.fmax),  # as on the GPU, a number wins over NaN
    "minimum": _pairwise(torch.fmin),
    "floor": lambda a: Value(torch.floor(a.raw), a.dtype),
    "exp2": lambda a: Value(torch.exp2(a.raw), a.dtype),
    "sum": lambda a, axis: Value(a.raw.sum(axis), a.dtype),
    "convert_layout": lambda a, layout, assert_trivial=False: a,
    "barrier": lambda: None,
    **dict.fromkeys(_LAYOUTS, lambda *_, **__: None),
}


def _jit(function: Any = None, **_: object) -> Any:
    return function if function is not None else lambda f: f


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Put stand-ins for Gluon into `sys.modules`, for what is imported inside."""
    root = "triton.experimental.gluon"
    names = (root, *(f"{root}.language{n}" for n in ("", ".nvidia", ".nvidia.ampere")))
    modules = {name: ModuleType(name) for name in names}
    modules[root].__dict__.update(jit=_jit, language=modules[names[1]])
    modules[names[1]].__dict__.update(_LANGUAGE)
    copying = SimpleNamespace(
        async_load=_async_load, commit_group=lambda: None, wait_group=lambda n: None
    )
    modules[names[3]].__dict__.update(mma_v2=_mma_v2, async_copy=copying)
    import triton.experimental

    before = {name: sys.modules.get(name) for name in names}
    attribute = getattr(triton.experimental, "gluon", None)
    sys.modules.update(modules)
    triton.experimental.gluon = modules[root]
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        del triton.experimental.gluon
        if attribute is not None:
            triton.experimental.gluon = attribute


class Emulated:
    """Launches a kernel that was imported under `emulated()`."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, num_warps, **constants: self._run(grid[0], args, constants)

    def _run(self, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        global _program
        arguments = [_argument(a) for a in args]
        for _program in range(programs):  # read by program_id
            self.kernel(*arguments, **constants)


def _argument(a: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        return _lift(a)
    reach = 1 + sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True))
    return Pointer(a.as_strided((max(0, reach),), (1,)), torch.tensor(0))
