"""Part 8: the depthwise branch of InternImage-H in bf16.

First the kernels beside torch's layers, checked before, at all four stages: what decides about
`fused_offset_branch`. Then cuDNN's convolution alone in both layouts, then what torch compiles.
"""

from __future__ import annotations

import sys

import kernel_bench
import rows
import torch
from torch import Tensor
from torch.nn import functional as F

# (channels, side) of the four stages at 192 pixels
STAGES = ((320, 48), (640, 24), (1280, 12), (2560, 6))
SMALL = ((8, 6),)
BATCH, KERNEL = (2, 5) if rows.REHEARSE else (128, 5)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> int:
    """Measure everything; 1 where something failed."""
    failed = branch("triton", "torch eager")
    for channels, side in SMALL if rows.REHEARSE else STAGES:
        for layout in LAYOUTS:
            try:
                measure(channels, side, layout)
            except RuntimeError as error:
                failed = 1
                name = f"{channels} x {side} {layout}"
                rows.write("depthwise", name, ok=False, error=str(error)[:300])
    return failed | branch("torch compiled")


def branch(*implementations: str) -> int:
    """Rows of the whole branch: convolution, LayerNorm, GELU; 1 where something failed."""
    return kernel_bench.bench(
        "depthwise", "depthwise", ["192"], BATCH, torch.bfloat16, implementations
    )


def measure(channels: int, side: int, layout: str) -> None:
    """One row for each direction, with the rate at which the least bytes were moved."""
    shape = (BATCH, channels, side, side)
    x, grad = (_random(shape, layout) for _ in range(2))
    weight = _random((channels, 1, KERNEL, KERNEL), layout)

    def forward() -> Tensor:
        return F.conv2d(x, weight, padding=KERNEL // 2, groups=channels)

    def backward(to_input: bool) -> Tensor:
        both = [KERNEL // 2] * 2
        mask = [to_input, not to_input, False]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], both, [1, 1], False, [0, 0], channels, mask
        )

    calls = {
        "forward": forward,
        "dgrad": lambda: backward(True),
        "wgrad": lambda: backward(False),
    }
    for direction, call in calls.items():
        taken = rows.milliseconds(call)
        rows.write(
            "depthwise",
            f"{channels} x {side} {layout}",
            channels=channels,
            side=side,
            batch=BATCH,
            layout=layout,
            direction=direction,
            implementation="cudnn",
            ms=taken,
            gb_per_s=2 * x.nbytes / taken * 1e-6,
            ok=True,
        )


def _random(shape: tuple[int, ...], layout: str) -> Tensor:
    drawn = torch.randn(shape, device=rows.DEVICE, dtype=torch.bfloat16)
    return drawn.contiguous(memory_format=LAYOUTS[layout])


if __name__ == "__main__":
    sys.exit(main())
