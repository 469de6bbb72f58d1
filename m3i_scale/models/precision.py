"""The precisions of a configuration as dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def at_least_float32(values: Tensor) -> Tensor:
    """The same in float32, where the dtype is narrower."""
    return values if values.dtype == torch.float64 else values.float()
