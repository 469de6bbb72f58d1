"""Where a training step waits for the device: never inside of a pass, a few times at its end.

Twice: networks and losses run on fake CUDA tensors, whose values nobody can read, and what is
copied between host and device is listed; and a real step on two ranks is listed for reads of single
values, DeepSpeed's among them, which on a GPU are waits.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from m3i_kernels import active_backend, set_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.ranks import run_ranks
from helpers.small import random_batch
from helpers.training import open_small
from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.engine import loop, metrics
from m3i_scale.objective.inputs import build_input
from m3i_scale.objective.m3i import M3I

READS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}


class Waits(TorchDispatchMode):
    """Operations for which the host waits, by file and line.

    Reads of values, and copies between host and device that are not `non_blocking`; on a CPU, where
    there is no such copy, tensors made of Python numbers on their device.
    """

    def __init__(self, *, constants: bool = False) -> None:
        super().__init__()
        self.reads = READS | ({"lift_fresh"} if constants else set())
        self.paused = False
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(named or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        waits = name in self.reads or _crosses(name, arguments, named or {}, result)
        if waits and not self.paused and not _in_optimiser():
            self.found[f"{_site()} {name}"] += 1
        return result


def _crosses(name: str, arguments: Any, named: dict[str, Any], result: Any) -> bool:
    if name == "copy_":
        target, source, *rest = arguments
        waits = not (named.get("non_blocking") or (rest and rest[0]))
        return waits and target.device.type != source.device.type
    if name == "_to_copy" and isinstance(result, Tensor):
        return arguments[0].device.type != result.device.type and not named.get("non_blocking")
    return False


def _in_optimiser() -> bool:
    """Whether torch's AdamW runs: on a CPU it reads its step counter, the fused one never does."""
    return any("/torch/optim/" in frame.filename for frame in traceback.extract_stack())


def _site() -> str:
    """The innermost line outside of torch and of this file."""
    for frame in reversed(traceback.extract_stack()):
        inside = "/torch/" in frame.filename or frame.filename == __file__
        if not inside:
            return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
    return "?"


def test_nothing_is_read_or_copied_in_a_forward_pass(
    small: Config, monkeypatch: pytest.MonkeyPatch
):
    # The Triton kernels are not called: the operators' CPU forms stand in for them.
    kernels = sys.modules["m3i_kernels.photometric"]
    monkeypatch.setattr(kernels, "photometric_reference", lambda images, *_: images)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "fake")
    before = active_backend()
    set_backend("reference")
    device = torch.device("cuda", 0)
    with torch.device("meta"):
        model = M3I(small.model, small.objective, small.data.image_size).train()
    batch = random_batch(4)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=device)
            with Waits() as waits:
                view = build_input(
                    batch.to(device),
                    small.objective.input,
                    mean=small.data.mean,
                    std=small.data.std,
                    dtype=torch.float32,
                )
                outputs = model(view, 1.0)
    finally:
        set_backend(before)
    assert {value.device for value in outputs.values()} == {device}
    found = {site: n for site, n in waits.found.items() if "/reference.py:" not in site}
    assert not found


def step_waits(world: World, folder: Path, overrides: dict[str, Any]) -> dict[str, int]:
    """Reads of one value in a whole step, and tensors made of numbers."""
    run = open_small(world, folder, overrides, "never")
    assert run.sharded.teacher is not None
    batches = loop.open_batches(run)
    for _ in range(2):  # until DeepSpeed knows the order of modules
        loop.train_step(run, batches)
    waits = Waits(constants=True)
    reduce, update = metrics.Figures.reduce, run.sharded.teacher.update

    def reduced(self: metrics.Figures, *inputs: Any) -> Any:
        result = reduce(self, *inputs)
        waits.found["the table of all figures, read at once"] += 1
        waits.paused = True  # what follows reads that table, in the host's memory
        return result

    def updated(coefficient: float) -> None:
        waits.paused = False
        update(coefficient)

    metrics.Figures.reduce = reduced  # type: ignore[method-assign]
    run.sharded.teacher.update = updated  # type: ignore[method-assign]
    with waits:
        loop.train_step(run, batches)
    return dict(waits.found)


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "micro"), [(3, 4), (3, 2), (1, 2), (2, 2)])
def test_a_step_waits_five_times_at_most_whatever_the_accumulation(
    tmp_path: Path, stage: int, micro: int
):
    overrides = {
        "engine.zero.stage": stage,
        "optimizer.max_micro_batch": micro,
        "engine.zero.persistence_threshold": 500,
        "model.backbone.options.checkpoint_blocks": True,
        "optimizer.global_batch_size": 8,
    }
    for result in run_ranks(2, step_waits, tmp_path, overrides=overrides):
        # The batches are drawn here, and the operators' CPU forms read values as no GPU's do.
        here = (f"{Path(__file__).parents[1]}/", "/m3i_kernels/")
        found = {site: n for site, n in result.items() if not any(part in site for part in here)}
        assert sum(found.values()) <= 5, found
        inside = [site for site in found if "m3i_scale" in site]
        assert not inside, found
