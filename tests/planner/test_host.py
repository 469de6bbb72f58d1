"""The host's part of a plan: fitted to what was measured, right where it was not fitted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.small import SMALL
from m3i_scale.config import load_config
from m3i_scale.planner import host
from m3i_scale.planner.estimate import Assumptions, Cluster, Plan, make_plan, trace_of
from m3i_scale.planner.gpus import gpu
from m3i_scale.profiling.trace import Trace

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import host_fit


@pytest.fixture(scope="module")
def fitted() -> list[float]:
    return host_fit.fit(host_fit.rows(host_fit.RESULTS))


@pytest.mark.slow
def test_seconds_are_those_of_the_measurements(fitted: list[float]):
    assert list(host.SECONDS) == pytest.approx(fitted, rel=0.01)


def test_sizes_that_were_not_fitted_are_within_30_percent():
    rows = host_fit.rows(host_fit.RESULTS / "held_out")
    names = {row.name for row in rows}
    assert {"internimage_b_64", "internimage_h_160_sharded_teacher"} <= names
    for row in rows:
        assert host.seconds(row.work) == pytest.approx(row.measured, rel=0.3), row.name


def test_too_few_measurements_are_refused():
    few = host_fit.rows(host_fit.RESULTS)[:2]
    with pytest.raises(ValueError, match="measure more sizes"):
        host_fit.fit(few)
    nothing_sent = [row._replace(work=row.work._replace(slices=0)) for row in [*few, *few]]
    with pytest.raises(ValueError, match="measure more sizes"):
        host_fit.fit(nothing_sent)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Trace]:
    path = tmp_path_factory.mktemp("host") / "small.yaml"
    path.write_text(SMALL)
    config = load_config(path, [])
    return str(path), trace_of(config)


def plan_of(seen: tuple[str, Trace], ranks: int = 8, **changes: Any) -> Plan:
    micro, accumulation = changes.pop("micro", 2), changes.pop("accumulation", 1)
    overrides = [
        f"optimizer.max_micro_batch={micro}",
        f"optimizer.global_batch_size={micro * ranks * accumulation}",
        *(f"engine.{key}={value}" for key, value in changes.items() if key == "teacher"),
        f"engine.zero.stage={changes.get('stage', 3)}",
    ]
    config = load_config(seen[0], overrides)
    assumed = Assumptions(host=changes.get("factor", 1.0))
    return make_plan(config, seen[1], Cluster(gpu("h100"), 1, ranks), assumed)


def test_a_step_takes_as_long_as_the_slower_of_device_and_host(seen: tuple[str, Trace]):
    small = plan_of(seen)
    assert small.limited_by_host
    assert small.step == small.on_host > small.on_device
    large = plan_of(seen, micro=100_000_000)
    assert not large.limited_by_host
    assert large.step == large.on_device > large.on_host == small.on_host
    assert plan_of(seen, factor=3.0).on_host == pytest.approx(3 * small.on_host)


def test_what_python_visits(seen: tuple[str, Trace]):
    work = plan_of(seen).work
    weights = seen[1].weights
    assert work.tensors == sum(w.trained for w in weights)
    sharded = plan_of(seen, teacher="sharded").work
    assert sharded.tensors == len([w for w in weights if w.trained or "teacher." in w.name])
    assert sharded.modules == work.modules
    thrice = plan_of(seen, accumulation=3).work
    assert (thrice.modules, thrice.tensors) == (3 * work.modules, 3 * work.tensors)
    assert plan_of(seen, ranks=1).work.slices == 0
    flat = plan_of(seen, stage=1, accumulation=3).work
    assert (flat.modules, flat.tensors, flat.slices) == (thrice.modules, 0, 0)
    assert flat.gradients == thrice.tensors
    assert plan_of(seen, stage=2).on_host < plan_of(seen).on_host
