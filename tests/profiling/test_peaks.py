"""Peaks by device name."""

from __future__ import annotations

import pytest

from m3i_scale.profiling.peaks import dense_bf16_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_known_devices(name: str, teraflops: float):
    assert dense_bf16_peak(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["cpu", "", "Tesla V100-SXM2-16GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G"]
)
def test_unknown_devices_have_none(name: str):
    assert dense_bf16_peak(name) is None
