"""Errors that nobody sees, made on purpose: one flipped bit, where and when a test wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from m3i_scale.engine import loop
from m3i_scale.engine.communication import Recorder
from m3i_scale.engine.passes import Passes

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flip(tensor: Tensor, element: int = 0, bit: int = 1) -> None:
    """Flip a bit of an element, in place: bit 1 is one of the lowest of a mantissa."""
    words = tensor.detach().view(-1).view(INTEGERS[tensor.element_size()])
    words[element] ^= 1 << bit


@contextlib.contextmanager
def in_pass(number: int, work: Callable[[], None], *, before: bool = False) -> Iterator[None]:
    """Do something before or after the `number`-th run of a step's passes."""
    original, runs = Passes.run, 0

    def run(self: Passes, batches: Iterator[Any]) -> Any:
        nonlocal runs
        runs += 1
        if before and runs == number:
            work()
        passed = original(self, batches)
        if not before and runs == number:
            work()
        return passed

    with mock.patch.object(Passes, "run", run):
        yield


@contextlib.contextmanager
def in_output_of(module: torch.nn.Module, number: int) -> Iterator[None]:
    """The `number`-th output of a module has one wrong bit: a device that computes wrongly."""
    calls = 0

    def hook(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls != number:
            return output
        wrong = output.detach().clone()
        flip(wrong, bit=6)
        return output + (wrong - output).detach()

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def in_collective(name: str, number: int, size: int = 0) -> Iterator[list[str]]:
    """The `number`-th collective of a name, of those beyond a size, gives a wrong bit here."""
    original, calls = Recorder.call, 0
    done: list[str] = []

    def call(self: Recorder, called: str, function: Any, args: Any, kwargs: Any) -> Any:
        def wrong(*inner: Any, **options: Any) -> Any:
            nonlocal calls
            result = function(*inner, **options)
            output = inner[0] if inner else options.get("tensor")
            if called == name and isinstance(output, Tensor) and output.numel() > size:
                calls += 1
                if calls == number:
                    flip(output)
                    done.append(called)
            return result

        return original(self, called, wrong, args, kwargs)

    with mock.patch.object(Recorder, "call", call):
        yield done


def storages(run: loop.Run) -> dict[str, Tensor]:
    """What must not change between two updates, by kind: one tensor of each."""
    shards, teacher = run.sharded.shards, run.sharded.teacher
    master = shards.masters[0]
    states = shards.optimizer.optimizer.state[master]
    found = {
        "master weights": master,
        "exp_avg": states["exp_avg"],
        "exp_avg_sq": states["exp_avg_sq"],
        "weights": shards.flat_weights()[0][0],
    }
    if teacher is not None:
        found["averages"] = teacher.flat
        if teacher.whole:
            found["teacher's weights"] = teacher.whole[0]
    return found


def gradient(run: loop.Run) -> Tensor:
    """Storage of a reduced gradient of this rank."""
    group = run.sharded.shards.optimizer.averaged_gradients[0]
    flat = getattr(group, "flat_partition", None)
    return max(group, key=torch.numel) if flat is None else flat
