"""The fuzzer finds what it is there for, and a few inputs of every kind are handled as promised."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fuzz() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("fuzz_data")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_every_kind_is_handled_as_promised(fuzz: Any, tmp_path: Path):
    # In this process: what crashes or hangs here is a matter of `pool`.
    outcomes = set()
    for n, kind in enumerate(fuzz.KINDS * 3):
        outcomes.add(kind.run(np.random.default_rng([1234, n]), tmp_path))
    assert outcomes == {"unharmed", "named", "refused"}


def crash(*_: Any) -> str:
    faulthandler.disable()  # no stack in the midst of the tests' output
    os.abort()


def hang(*_: Any) -> str:
    while True:
        time.process_time()


def grow(*_: Any) -> str:
    return "named" if bytearray(os.urandom(1 << 20) * 64) else ""


def shift(*_: Any) -> str:
    from fuzzing.damage import Violation  # type: ignore[import-not-found]

    raise Violation("shifted", "x")


def fail(*_: Any) -> str:
    raise KeyError("x")


def test_the_pool_survives_and_names_what_it_is_given(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fuzz.pool, "CPU_SECONDS", 0.3)
    kinds = [fuzz.Kind(run.__name__, run, 1 << 20) for run in (crash, hang, grow, shift, fail)]
    monkeypatch.setattr(fuzz.pool, "_warm", {kind.name for kind in kinds})
    found = sorted(fuzz.pool.run_all(kinds, range(5), 0, 2, tmp_path))
    assert [result.outcome for result in found] == [
        "crash", "hang", "memory", "shifted", "traceback",
    ]  # fmt: skip
