"""Peak FLOP/s of GPUs, of which model FLOPs utilisation (MFU) is a share."""

from __future__ import annotations

import re

# Dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets (which often print twice
# that, for 2:4 sparsity). Words of the device's name; the first row whose words all occur counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("MI355X", 2516e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI300A", 980.6e12),
    ("MI250X", 191.5e12),  # of one of its two dies, which is what PyTorch calls a device
)


def dense_bf16_peak(device_name: str) -> float | None:
    """Peak FLOP/s of dense bf16 matrix products on one device.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, for instance "NVIDIA H200".

    Returns:
        FLOP/s; None where it is not known: a CPU, a GPU that is not in the table, a MIG slice.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    fitting = (peak for name, peak in _PEAKS if set(name.lower().split()) <= words)
    return next(fitting, None)
