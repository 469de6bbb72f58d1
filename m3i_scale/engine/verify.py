"""Steps that are computed twice, from the same inputs, and compared bit for bit.

Both passes run deterministically. Each rank compares with itself, in the order of the computation:

1. what it gave to every collective and what it got, and the loss of every micro-step;
2. its shards of the reduced gradients.

An error spreads to all ranks with the next collective. The ranks to blame are therefore those whose
first difference comes first: in what they computed themselves, or else in what a collective gave
them, although all had given it the same. (Weights are gathered by collectives that go on
while others run, in no fixed order; what they do wrong shows in the loss.)

A fault that repeats bit for bit is not seen here; the check of the nodes compares with known
answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3i_scale.cluster.launch import gather_objects
from m3i_scale.cluster.numerics import deterministic_inside
from m3i_scale.engine.checksums import INTEGERS, quick, tensors_in
from m3i_scale.engine.communication import RECORDER, Entry
from m3i_scale.engine.corruption import CorruptionError, listed, places
from m3i_scale.engine.passes import Passed, Passes
from m3i_scale.engine.shards import trained
from m3i_scale.engine.state import generator_states, set_generator_states

log = logging.getLogger(__name__)

# Share of a GPU's memory that may be used at once; the rest is for what the allocator cannot join.
_USED = 0.95

# Where in an entry of a tape the first difference is, in the order of time.
INPUT, SENT, RECEIVED, GRADIENT = range(4)


class Difference(NamedTuple):
    """The first difference between two passes on one rank."""

    entry: int  # number of the entry of the tape; one more than there are: the gradients
    part: int
    words: str


class _Pass(NamedTuple):
    """What one pass gave; gradients are where there is room for them."""

    names: list[str]
    sums: list[tuple[int, int]]  # sent, received
    gradients: list[Tensor]
    passed: Passed


class Recomputation:
    """Computes steps twice.

    Args:
        passes: a step's passes.
        always_exact: the passes are deterministic anyway: on CPUs, or because it was asked for.

    Attributes:
        steps: how many were computed twice.
        possible: False after a step has shown that the networks cannot repeat themselves.
    """

    def __init__(self, passes: Passes, *, always_exact: bool) -> None:
        self._passes = passes
        self._always_exact = always_exact
        self.steps, self.possible = 0, True

    def run(self, batches: Iterator[Any]) -> tuple[Passed, CorruptionError | None]:
        """Both passes of a step (a collective), and the error that they show.

        The step goes on with what the last pass has given.
        """
        world = self._passes.world
        held = self._passes.hold(batches)
        before = _input_sums(held)
        kept = _Kept(self._passes)
        with deterministic_inside(world.device):
            first = self._pass(held)
            kept.restore()
            found = self._changed_input(held, before)
            second = self._pass(held, first)
            found = found or self._changed_input(held, before) or self._compare(first, second)
            every = self._all(found)
            if any(every):
                third = self._third(every, kept, held, second)
                if third is None:
                    return second.passed, self._error(every)
                self._give_up(every)
                return third, None
        self.steps += 1
        return second.passed, None

    def _pass(self, held: Sequence[Any], before: _Pass | None = None) -> _Pass:
        """A pass; its gradients go where those of the one before it are."""
        sharded = self._passes.sharded
        sharded.shards.drop_gradients(sharded.model)
        with RECORDER.tape() as tape:
            passed = self._passes.run(iter(held))
        if self._passes.world.device.type == "cuda":
            torch.cuda.synchronize()  # collectives run on streams of their own
        place = before.gradients[0].device if before else self._room()
        gradients = sharded.shards.reduced_gradients(place)
        return _Pass([entry.name for entry in tape], _read(tape), gradients, passed)

    def _room(self) -> torch.device:
        """Where copies of this rank's gradients go: two are compared, of three there may be need.

        Copying them to host memory takes seconds for a thousand million parameters: on a GPU they
        stay where the most that was ever allocated leaves room for them.
        """
        device = self._passes.world.device
        if device.type == "cpu":
            return device
        size = sum(master.nbytes for master in self._passes.sharded.shards.masters)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        most = torch.cuda.max_memory_allocated(device)
        return device if most + 3 * size < _USED * free else torch.device("cpu")

    def _changed_input(self, held: Sequence[Any], before: list[int]) -> Difference | None:
        if _input_sums(held) == before:
            return None
        return Difference(-1, INPUT, "the batch changed in host memory while it was computed on")

    def _compare(self, one: _Pass, two: _Pass) -> Difference | None:
        if one.names != two.names:
            other = next(
                (
                    f"{b} instead of {a}"
                    for a, b in zip(one.names, two.names, strict=False)
                    if a != b
                ),
                f"{len(two.names)} collectives instead of {len(one.names)}",
            )
            return Difference(0, SENT, f"the second pass took another way than the first: {other}")
        for number, (name, a, b) in enumerate(zip(one.names, one.sums, two.sums, strict=True)):
            for part, words in ((SENT, "before"), (RECEIVED, "after")):
                if a[part - SENT] != b[part - SENT]:
                    where = f"{name} differs" if " " in name else f"data {words} {name} differ"
                    return Difference(number, part, f"{where}{self._worst(one, two)}")
        worst = self._worst(one, two)
        return Difference(len(one.names), GRADIENT, worst.removeprefix("; ")) if worst else None

    def _worst(self, one: _Pass, two: _Pass) -> str:
        """Which parameter's gradient differs most, on this rank."""
        largest, name, count = -1.0, "", 0
        if all(map(_equal_bits, one.gradients, two.gradients)):
            return ""
        shards, model = self._passes.sharded.shards, self._passes.sharded.model
        for candidate, parameter in trained(model):
            (group, begin), own = shards.place(parameter), shards.extent(parameter)
            length = own.stop - own.start
            a, b = (p.gradients[group].narrow(0, begin, length) for p in (one, two))
            if not _equal_bits(a, b):
                count += 1
                # inf - inf is not a number; the difference is then as large as it can be
                away = torch.nan_to_num((a.double() - b.double()).abs(), nan=torch.inf).max().item()
                if away > largest:
                    largest, name = away, candidate
        if not count:
            return "; the padding of gradients differs"
        return (
            f"; the gradient of {name} differs by up to {largest:.3g} ({count} parameters differ)"
        )

    def _all(self, found: Difference | None) -> list[Difference | None]:
        """What each rank has found (a collective)."""
        return gather_objects(found, self._passes.world)

    def _third(
        self, every: Sequence[Difference | None], kept: _Kept, held: Sequence[Any], second: _Pass
    ) -> Passed | None:
        """A third pass that differs again on all ranks, where that may be; None: it is an error.

        On a GPU an operator without a deterministic form differs everywhere, every time.
        """
        if self._always_exact or any(one is None or one.part == INPUT for one in every):
            return None
        kept.restore()
        third = self._pass(held, second)
        again = self._all(self._compare(second, third))
        return None if any(one is None for one in again) else third.passed

    def _give_up(self, every: Sequence[Difference | None]) -> None:
        self.possible = False
        if self._passes.world.is_main and every[0] is not None:
            log.warning(
                "no step is computed twice any more: these networks give other bits each time, on "
                "all ranks, even in deterministic mode (%s); set engine.verify.every=null, or "
                "engine.deterministic=true, which names the operator", every[0].words,
            )  # fmt: skip

    def _error(self, every: Sequence[Difference | None]) -> CorruptionError:
        where = places(self._passes.world)
        present = {rank: one for rank, one in enumerate(every) if one is not None}
        first = min((one.entry, one.part) for one in present.values())
        blamed = {r: one for r, one in present.items() if (one.entry, one.part) == first}
        if len(present) > 1 and len(blamed) == len(every) and first[1] == RECEIVED:
            nodes: set[str] = set()  # the network between them
        else:
            nodes = {where[rank].node for rank in blamed}
        said = listed({rank: one.words for rank, one in blamed.items()}, where)
        return CorruptionError(f"a step that was computed twice gave two results: {said}", nodes)


class _Kept:
    """What a pass changes besides gradients, to begin it again."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._buffers = [(b, b.clone()) for b in passes.sharded.model.buffers()]
        self._states = generator_states(passes.world)
        self._micro_steps = passes.sharded.engine.micro_steps
        self._task = dict(vars(passes.task))  # what it collects over a step's micro-batches

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in self._buffers:
            buffer.copy_(value)
        set_generator_states(self._states, self._passes.world)
        self._passes.sharded.engine.micro_steps = self._micro_steps
        vars(self._passes.task).clear()
        vars(self._passes.task).update(self._task)


def _input_sums(held: Sequence[Any]) -> list[int]:
    return [int(quick(tensor)) for batch in held for tensor in tensors_in(batch)]


def _read(tape: Sequence[Entry]) -> list[tuple[int, int]]:
    if not tape:
        return []
    sums = torch.stack([torch.stack([e.sent.cpu(), e.received.cpu()]) for e in tape]).tolist()
    return [(sent, received) for sent, received in sums]


def _equal_bits(one: Tensor, two: Tensor) -> bool:
    """Not-a-numbers are equal if their bits are."""
    if one.shape != two.shape:
        return False
    bits = INTEGERS[one.element_size()]
    return torch.equal(one.view(bits), two.view(bits))
