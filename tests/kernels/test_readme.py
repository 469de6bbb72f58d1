"""The examples of the kernels' README run as they stand there."""

import pathlib
import re

import torch

README = pathlib.Path(__file__).parents[2] / "kernels" / "README.md"


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, torch.Tensor] = {"center_scale": None}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (2, 12, 12, 64)
    assert names["y"].isfinite().all()
    assert names["ready"].shape == names["mixed"].mix.shape == (4, 3, 64, 64)
