"""Fused operators for large-scale vision pre-training, without a compilation step at install.

Every operator has a pure-torch reference (tests, benchmarks, CPU) and a Triton implementation.
"""

from m3i_kernels._backend import active_backend, set_backend
from m3i_kernels.block_mix import BlockMixed, block_mix
from m3i_kernels.dcnv3 import dcnv3
from m3i_kernels.dcnv3.choice import set_algorithm as set_dcnv3_algorithm
from m3i_kernels.depthwise import depthwise_norm_gelu
from m3i_kernels.photometric import PhotometricParams, photometric

__all__ = [
    "BlockMixed",
    "PhotometricParams",
    "active_backend",
    "block_mix",
    "dcnv3",
    "depthwise_norm_gelu",
    "photometric",
    "set_backend",
    "set_dcnv3_algorithm",
]
