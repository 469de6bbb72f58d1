"""The operator's golden cases: inputs follow a rule, outputs and gradients are stored."""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "dcnv3_op.json").read_text())


def normal(name: str, *shape: int) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Return (float64 inputs with output gradient, keywords of dcnv3, expected tensors)."""
    case = CASES[name]
    stored = np.load(FOLDER / "dcnv3_op.npz")
    expected = {
        k: torch.from_numpy(stored[f"{name}.{k}"]).double()
        for k in ("output", "grad_input", "grad_offset", "grad_mask")
    }
    N, Ho, Wo, C = expected["output"].shape
    G, K = case["group"], case["kernel"] ** 2 - case["remove_center"]
    logits = torch.from_numpy(normal("m" + name, N, Ho, Wo, G, K))
    inputs = {
        "x": torch.from_numpy(normal("x" + name, N, case["H"], case["W"], C)),
        "offset": torch.from_numpy(normal("o" + name, N, Ho, Wo, G * K * 2))
        * case["offset_magnitude"],
        "mask": logits.softmax(-1).flatten(-2),
        "grad": torch.from_numpy(normal("g" + name, N, Ho, Wo, C)),
    }
    keywords = {
        "kernel_size": case["kernel"],
        "stride": case["stride"],
        "padding": case["pad"],
        "dilation": case["dilation"],
        "groups": G,
        "offset_scale": case["offset_scale"],
        "remove_center": bool(case["remove_center"]),
    }
    return inputs, keywords, expected
