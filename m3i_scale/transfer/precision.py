"""The precision in which trained networks are evaluated, stated with every result.

| | weights and activations | products |
| --- | --- | --- |
| bf16 | bf16, as in training | bf16 with float32 sums |
| tf32 | float32 | inputs rounded to 10 bits of mantissa: fast on GPUs since Ampere |
| fp32 | float32 | float32 |

Features are compared, and probes fitted, in float32 on the CPU whatever they were computed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from m3i_scale.objective.m3i import M3I

Precision = Literal["bf16", "tf32", "fp32"]
AMPERE = (8, 0)  # the first compute capability with TF32


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """The precision to compute in; "auto" is bf16 on a GPU that has it, and fp32 elsewhere.

    Raises:
        ValueError: the device cannot compute in what was asked for.
    """
    gpu = device.type == "cuda"
    has_bf16 = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if gpu and has_bf16 else "fp32"
    if wanted == "tf32" and not (gpu and _has_tf32(device)):
        raise ValueError(
            f"--precision tf32: {_name(device)} has no TF32; leave out --precision, or take fp32"
        )
    if wanted == "bf16" and not has_bf16:
        raise ValueError(
            f"--precision bf16: {_name(device)} has no bf16; leave out --precision, or take fp32"
        )
    return wanted


def prepare(networks: Mapping[str, M3I], device: torch.device, precision: Precision) -> None:
    """Move all networks to where and how they compute, in the layout that convolutions like.

    Sets how torch multiplies float32 tensors from now on.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for model in networks.values():
        model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _has_tf32(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= AMPERE


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
