"""GPUs that a run can be planned for: memory and links; their peaks are in `peaks`."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from m3i_scale.profiling.peaks import dense_bf16_peak


class Gpu(NamedTuple):
    """One GPU among its peers; bandwidths in one direction."""

    name: str
    device: str  # as its driver calls it, for `peaks.dense_bf16_peak`
    memory: float  # bytes
    inside: float  # bytes/s to the GPUs of its node
    across: float  # bytes/s of its share of the node's network

    @property
    def peak(self) -> float:
        """FLOP/s of dense bf16 matrix products."""
        peak = dense_bf16_peak(self.device)
        assert peak is not None, self.device
        return peak


# Memory and links of the data sheets: NVIDIA A100, H100, H200 (SXM), HGX B200, AMD Instinct MI300X.
# NVLink 3, 4, 5: 600, 900, 1800 GB/s both ways; Infinity Fabric of MI300X: 7 links of 128 GB/s both
# ways. Network: one port per GPU, as in DGX A100 (HDR, 200 Gbit/s), DGX H100, H200 and B200 and the
# usual MI300X servers (NDR, 400 Gbit/s); a cluster with less is told with --network.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", "NVIDIA A100-SXM4-40GB", 40 * 2**30, 300e9, 25e9),
        Gpu("a100-80", "NVIDIA A100-SXM4-80GB", 80 * 2**30, 300e9, 25e9),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 80 * 2**30, 450e9, 50e9),
        Gpu("h200", "NVIDIA H200", 141e9, 450e9, 50e9),
        Gpu("b200", "NVIDIA B200", 180e9, 900e9, 50e9),
        Gpu("mi300x", "AMD Instinct MI300X", 192 * 2**30, 448e9, 50e9),
    )
}


def gpu(name: str) -> Gpu:
    """A GPU by its name in `GPUS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name.lower() not in GPUS:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"GPU {name!r} is not known; {hint}known are {', '.join(GPUS)}")
    return GPUS[name.lower()]
