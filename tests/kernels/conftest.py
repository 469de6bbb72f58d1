"""Kernel tests run natively on a CUDA device and in Triton's interpreter without one."""

import os

import torch

# Before the first import of a kernel: Triton decides at decoration time.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
