"""Kernels compiled on one machine and started on another, whose Triton cannot compile them.

`save` compiles recorded launches for sm_90 into a folder; nothing there needs a GPU. `Kernel`
starts them through the CUDA driver (libcuda.so.1, by ctypes), with the arguments as Triton's own
launcher passes them: the parameters that are not constants, then two pointers to scratch memory.
"""

import ctypes
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import m3i_kernels
import torch

_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
_SHARED_BYTES, _DEFAULT_SHARED = 8, 48 << 10  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def fingerprint() -> str:
    """Hash the sources of the matrix kernels: cubins of other sources are refused."""
    folder = pathlib.Path(m3i_kernels.__file__).parent / "dcnv3"
    sources = (folder / f"{name}.py" for name in ("matrix", "matrix_backward", "matrix_op"))
    return hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]


def save(launches: Iterable[Any], folder: pathlib.Path) -> None:
    """Compile launches (of `compile_only.record_matrix`) for sm_90 and write them to a folder."""
    import compile_only  # needs Triton 3.8, which the other machine lacks

    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for launch in launches:
        source = compile_only.source(launch)
        compiled = compile_only.compiled_for(launch, "sm_90")
        if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
            raise SystemExit("a kernel needs scratch memory, which this launcher does not provide")
        names = launch.kernel.arg_names
        parameters = [
            (n, source.signature[n], bool(source.attrs.get((i,))))
            for i, n in enumerate(names)
            if source.signature[n] != "constexpr"
        ]
        _check_ptx(compiled.asm["ptx"], [kind for _, kind, _ in parameters])
        constants = {n: launch.arguments[n] for n in names if source.signature[n] == "constexpr"}
        key = _key(launch.kernel.__name__, {**constants, "num_warps": compiled.metadata.num_warps})
        (folder / f"{key}.cubin").write_bytes(compiled.asm["cubin"])
        entries[key] = {
            "entry": compiled.metadata.name,
            "shared": compiled.metadata.shared,
            "names": names,
            "parameters": parameters,
        }
        print(f"{key}: {len(compiled.asm['cubin']) >> 10} KiB", flush=True)
    manifest = {"fingerprint": fingerprint(), "kernels": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _check_ptx(ptx: str, kinds: list[str]) -> None:
    """Compare the parameters of the compiled entry with those that will be passed."""
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param \.([usfb]\d+)", entry[: entry.index(")")])
    expected = [_PTX_TYPES.get(kind, "u64") for kind in kinds] + ["u64", "u64"]
    if found != expected:
        raise SystemExit(f"the compiled kernel takes {found}, not {expected}")


def _key(name: str, constants: dict[str, Any]) -> str:
    return "-".join([name, *(f"{k}{int(v)}" for k, v in sorted(constants.items()))])


def install(folder: pathlib.Path) -> None:
    """Have DCNv3's matrix kernels start from a folder's cubins, whatever Triton is installed.

    The shape rule then chooses as with a Triton that compiles them.
    """
    from m3i_kernels.dcnv3 import choice, matrix_op

    kernels = {d: Kernel(f"dcnv3_matrix_{d}_kernel", folder) for d in ("forward", "backward")}
    matrix_op.kernels = lambda: kernels  # type: ignore[assignment]
    choice.triton_version = lambda: choice.OLDEST_TRITON


class Kernel:
    """Starts the cubins of one kernel: `Kernel(name, folder)[(programs,)](*args, **constants)`."""

    def __init__(self, name: str, folder: pathlib.Path, driver: Any = None) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["fingerprint"] != fingerprint():
            raise SystemExit(
                f"the cubins in {folder} were compiled from other sources: compile them again "
                "with matrix_check.py --compile"
            )
        own = {k: v for k, v in manifest["kernels"].items() if k.startswith(f"{name}-")}
        self.name, self.folder, self.kernels = name, folder, own
        self.driver = driver or ctypes.CDLL("libcuda.so.1")
        self.functions: dict[str, ctypes.c_void_p] = {}
        self.last = ""  # key of the last launch

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, num_warps, **constants: self._start(
            grid[0], args, num_warps, constants
        )

    def find(self, args: tuple[Any, ...], num_warps: int, constants: dict[str, Any]) -> str:
        """Return the key of the cubin for these arguments, after checking its assumptions."""
        names = next(iter(self.kernels.values()))["names"]
        values = dict(zip(names, args, strict=False)) | constants
        for key, kernel in self.kernels.items():
            kept = {name for name, _, _ in kernel["parameters"]}
            fixed = {n: values[n] for n in names if n not in kept}
            if key == _key(self.name, {**fixed, "num_warps": num_warps}):
                break
        else:
            raise SystemExit(f"{self.folder} has no cubin of {self.name} for {constants}")
        for name, _, aligned in kernel["parameters"]:
            value = values[name]
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if aligned and number % 16:
                raise SystemExit(f"{name} is {number}, but {key} needs a multiple of 16")
        return key

    def _start(
        self, programs: int, args: tuple[Any, ...], num_warps: int, constants: dict[str, Any]
    ) -> None:
        self.last = key = self.find(args, num_warps, constants)
        kernel = self.kernels[key]
        values = dict(zip(kernel["names"], args, strict=False))
        packed = [_pack(values[name], kind) for name, kind, _ in kernel["parameters"]]
        packed += [ctypes.c_void_p(0), ctypes.c_void_p(0)]
        pointers = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(p) for p in packed))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self._function(key)
        sizes = (programs, 1, 1, 32 * num_warps, 1, 1, kernel["shared"])
        self._call("cuLaunchKernel", function, *sizes, stream, pointers, None)

    def blocks_per_sm(self) -> int:
        """Ask the driver how many programs of the last launch fit on one SM."""
        count, shared = ctypes.c_int(), ctypes.c_size_t(self.kernels[self.last]["shared"])
        threads = 32 * int(self.last.rpartition("num_warps")[2])
        self._call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            ctypes.byref(count), self._function(self.last), threads, shared,
        )  # fmt: skip
        return count.value

    def _function(self, key: str) -> ctypes.c_void_p:
        if key not in self.functions:
            torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            image = (self.folder / f"{key}.cubin").read_bytes()
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), image)
            entry = self.kernels[key]["entry"].encode()
            self._call("cuModuleGetFunction", ctypes.byref(function), module, entry)
            shared = self.kernels[key]["shared"]
            if shared > _DEFAULT_SHARED:
                self._call("cuFuncSetAttribute", function, _SHARED_BYTES, shared)
            self.functions[key] = function
        return self.functions[key]

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self.driver, name)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed: {(text.value or b'unknown').decode()}")


def _pack(value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return _TYPES[kind](value)
