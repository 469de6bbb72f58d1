"""docs/tasks/use_elsewhere.md: its Python runs, and its doors are those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "tasks" / "use_elsewhere.md"


def test_the_python_of_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, object] = {}
        with torch.device("meta"):
            exec(block, names)
        model = names["model"]
        assert isinstance(model, torch.nn.Module)
        assert sum(p.numel() for p in model.parameters()) > 25e6
