"""Run by test_gpu_session.py in its own process: rows made of what other programs print."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import host
import kernel_names
import matrix
import rows
import training_step

ELEMENTWISE = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
    "CUDAFunctor_add<c10::BFloat16> >(at::TensorIteratorBase&, at::native::CUDAFunctor_add<c10::"
    "BFloat16> const&)::{lambda(int)#1}>(int, at::native::gpu_kernel_impl_nocast<at::native::"
)
NAMES = {
    ELEMENTWISE: "elementwise_kernel CUDAFunctor_add BFloat16",
    ELEMENTWISE[:110]: "elementwise_kernel CUDAFunctor_add",  # cut by the profiler
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::"
    "TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(double)#1}, std::array<char*, "
    "2ul>, 4>(int)": "unrolled_elementwise_kernel direct_copy_kernel_cuda double",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::"
    "BinaryFunctor<c10::Half, c10::Half, c10::Half, at::native::binary_internal::MulFunctor<float>"
    " > > >(int)": "elementwise_kernel MulFunctor Half",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, "
    "false>(int, float)": "vectorized_layer_norm_kernel BFloat16",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
    "namespace)::FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::"
    "FusedAdamMathFunctor<float, 4> >(int)": "multi_tensor_apply_kernel FusedAdamMathFunctor float",
    "nvjet_sm90_tst_64x3_coopB_TNT": "nvjet_sm90_tst_64x3_coopB_TNT",
    "dcnv3_backward_kernel": "dcnv3_backward_kernel",
    "Memcpy DtoD (Device -> Device)": "Memcpy",
}  # fmt: skip
HOST = {"ranks": 160, "device": "cuda", "ok": None, "name": "x", "part": "y", "commit": "z",
        "seconds_per_step": 1.5}  # fmt: skip


def host_time() -> None:
    """The keys of host_time.py, and any other, do not clash with those of a row."""
    output = rows.FOLDER / "host.json"
    output.write_text(json.dumps(HOST | {"config": f"{rows.ROOT}/configs/a.yaml"}))
    done = subprocess.Popen([sys.executable, "-c", ""])
    assert host.account("160 ranks", done, output, 160, time.monotonic() + 60) == 0


def main(recorded: str) -> None:
    """Write the rows of all parts that read another program's output."""
    assert {name: kernel_names.short(name) for name in NAMES} == NAMES
    host_time()
    out = rows.FOLDER / "step_4"
    out.mkdir()
    kernel = {"name": ELEMENTWISE, "calls": 2, "milliseconds": 1.5, "micro_batch": 1, "part": "z"}
    row = {"step_ms_p50": 1.0, "note": "theirs", "exit_code": 7, "steps": 3, "warmup": 2}
    (out / "step_x.json").write_text(json.dumps({"row": row, "kernels": [kernel]}))
    training_step.account(out, 4, 0)
    assert training_step.plan(training_step.configuration()) == 0
    with Path(recorded).open() as lines:
        matrix.account(lines)


if __name__ == "__main__":
    main(sys.argv[1])
