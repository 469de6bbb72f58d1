"""Starting compiled kernels through the CUDA driver: what the driver would be given."""

import ctypes
import json
import pathlib
from typing import Any

import pytest
import torch
from m3i_kernels.dcnv3.geometry import make_geometry

BENCH = pathlib.Path(__file__).parents[2] / "kernels" / "bench"
PARAMETERS = [["p_x", "*bf16", True], ["s_n", "i32", True], ["far", "i64", False],
              ["scale", "fp32", False]]  # fmt: skip
TYPES = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int64, ctypes.c_float) + 2 * (ctypes.c_uint64,)


class Driver:
    """Stands in for libcuda: reads the parameters back through their addresses."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: dict[str, Any] = {}

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:  # noqa: N802
        self.calls["image"] = image
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        self.calls["entry"] = name
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        self.calls["attribute"] = (attribute, value)
        return 0

    def cuLaunchKernel(self, function: Any, *args: Any) -> int:  # noqa: N802
        *sizes, stream, parameters, extra = args
        cast = [ctypes.cast(p, ctypes.POINTER(t)) for p, t in zip(parameters, TYPES, strict=True)]
        self.calls["launch"] = (sizes, stream.value, [c.contents.value for c in cast], extra)
        return self.code

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"invalid argument"
        return 0


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.syspath_prepend(str(BENCH))
    import cubins

    names = ["p_x", "s_n", "one", "far", "scale", "D"]
    kernel = {"entry": "kernel", "shared": 60 << 10, "names": names, "parameters": PARAMETERS}
    manifest = {"fingerprint": cubins.fingerprint(), "kernels": {"k-D32-num_warps2-one1": kernel}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "k-D32-num_warps2-one1.cubin").write_bytes(b"code")
    stream = type("Stream", (), {"cuda_stream": 77, "synchronize": lambda self: None})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return tmp_path


def test_arguments_reach_the_driver(folder: pathlib.Path) -> None:
    import cubins

    driver, x = Driver(), torch.zeros(64)
    cubins.Kernel("k", folder, driver)[(5,)](x, 32, 1, 1 << 40, 0.5, D=32, num_warps=2)
    assert driver.calls == {
        "image": b"code",
        "entry": b"kernel",
        "attribute": (8, 60 << 10),
        "launch": (
            [5, 1, 1, 64, 1, 1, 60 << 10], 77, [x.data_ptr(), 32, 1 << 40, 0.5, 0, 0], None
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stride", "one", "D", "message"),
    [(33, 1, 32, "s_n is 33.*multiple of 16"), (32, 2, 32, "no cubin"), (32, 1, 16, "no cubin")],
)
def test_other_arguments_than_compiled_for_are_refused(
    folder: pathlib.Path, stride: int, one: int, D: int, message: str
) -> None:
    import cubins

    kernel = cubins.Kernel("k", folder, Driver())
    with pytest.raises(SystemExit, match=message):
        kernel[(5,)](torch.zeros(64), stride, one, 0, 0.5, D=D, num_warps=2)


def test_driver_errors_and_other_sources_are_reported(folder: pathlib.Path) -> None:
    import cubins

    kernel = cubins.Kernel("k", folder, Driver(code=1))
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed: invalid argument"):
        kernel[(5,)](torch.zeros(64), 32, 1, 0, 0.5, D=32, num_warps=2)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"fingerprint": "other"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="compiled from other sources"):
        cubins.Kernel("k", folder, Driver())


def test_installed_cubins_are_chosen_and_started(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shape rule, on a machine whose Triton cannot compile them."""
    import cubins
    from m3i_kernels.dcnv3 import choice, matrix_op

    monkeypatch.setattr(matrix_op, "kernels", matrix_op.kernels)  # put back what is replaced
    monkeypatch.setattr(choice, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(choice, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(cubins.ctypes, "CDLL", lambda _: Driver())
    tensors = [torch.zeros(1, 12, 12, width, dtype=torch.bfloat16) for width in (32, 18, 9)]
    geometry = make_geometry(3, 1, 1, 1, 1, 1.0, False)
    rule = ("auto", *tensors, None, geometry, True)
    assert choice.resolve(*rule) == "gather"
    cubins.install(folder)
    assert choice.resolve(*rule) == "matrix"
    kernels = matrix_op.kernels()
    assert kernels["backward"].name == "dcnv3_matrix_backward_kernel"
    assert any("matrix kernel" in line for line in choice.reported())
