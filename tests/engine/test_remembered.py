"""FLOPs are counted once in the life of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_scale.config import Data, Source
from m3i_scale.engine.remembered import FLOPS, remembered_flops

CONFIG = Data(sources=[Source(name="s", index="i", kind="text")])
OTHER = CONFIG.model_copy(update={"image_size": 64})


class Count:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, float]:
        self.times += 1
        return {"": 7.0 * self.times}


def test_they_are_counted_once_for_each_configuration(tmp_path: Path):
    count = Count()
    assert [remembered_flops(tmp_path / "run", CONFIG, count) for _ in range(3)] == [{"": 7.0}] * 3
    assert remembered_flops(tmp_path / "run", OTHER, count) == {"": 14.0}
    assert remembered_flops(tmp_path / "run", OTHER, count) == {"": 14.0}


def test_a_start_that_only_looks_writes_nothing(tmp_path: Path):
    assert remembered_flops(tmp_path / "run", CONFIG, Count(), write=False) == {"": 7.0}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "[" * 100_000, '{"of": 3}', '{"flops": 7.0}', '{"flops": {"": -1.0}}']
)
def test_what_is_damaged_is_counted_again(tmp_path: Path, text: str):
    remembered_flops(tmp_path, CONFIG, Count())
    (tmp_path / FLOPS).write_text(text)
    assert remembered_flops(tmp_path, CONFIG, Count()) == {"": 7.0}
    assert remembered_flops(tmp_path, CONFIG, Count()) == {"": 7.0}
