"""How the device computes: precision, determinism, memory formats, allocator; set here, with reasons.

| setting | value | why |
| --- | --- | --- |
| allocator | `expandable_segments:True` | gathered parameters come in all sizes; whole pages that can be joined leave no holes between them |
| float32 products | full ("highest") | the networks run in bf16; what is left in float32 are losses and, with `engine.precision: fp32`, all that was asked for in fp32 |
| convolutions in float32 | full, no TF32 | the same |
| `cudnn.benchmark` | on, unless deterministic | shapes never change within a run, so that the fastest algorithm is searched once |
| memory format | (N, H, W, C), views of it where a convolution wants (N, C, H, W) | the blocks of InternImage work on (N, H, W, C): nothing is transposed |
| `engine.deterministic` | off | steps and resumed runs are then equal bit for bit on CPUs only: on GPUs atomics add in another order each time; steps that are computed twice (`engine.verify`) switch it on for themselves |
"""  # noqa: E501  rows of a table

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ALLOCATOR = "expandable_segments:True"
CUBLAS = ":4096:8"  # of the two settings with which cuBLAS is deterministic, the faster one


def prepare_allocator() -> None:
    """Before the first tensor on a GPU: choose how memory is cut; what the user has set stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATOR


def set_numerics(*, deterministic: bool, at_times: bool = False) -> None:
    """Before the networks are built: set everything else of this module's table.

    `at_times` leaves everything ready for `deterministic_inside`.

    With `deterministic`, the same steps give the same bits on the same number and kind of GPUs:
    DCNv3 sums in integers, `gather` and indexing add in a fixed order, cuDNN and cuBLAS choose
    deterministic algorithms. An operator that has no deterministic form raises and is named.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # The kernels of this project ask torch for this mode.
    torch.use_deterministic_algorithms(deterministic)
    # It would also fill every empty tensor: a cost, and what is read is written before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic or at_times:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)


@contextlib.contextmanager
def deterministic_inside(device: torch.device) -> Iterator[None]:
    """Inside, GPUs compute deterministically; an operator that cannot warns and computes.

    CPUs always do. Attention is torch's own products and softmax: where operators only warn, the
    fused kernels (cuDNN, flash, memory-efficient) add in any order in their backward pass.
    """
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark, cudnn.deterministic = before
