"""What ZeRO-3 gathers in a training step, and how much of it lives at once.

A replay of DeepSpeed's parameter coordinator (0.19: `partitioned_param_coordinator.py`) once it
knows the order of modules, that is from the third step on: parameters are gathered when a module
is entered or, ahead of it, within the prefetch bucket, and released when it is left, unless they
are small (persistent) or their next use is nearer than the reuse distance.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from m3i_scale.profiling.record import Trace, Weight, is_teachers


class Settings(NamedTuple):
    """DeepSpeed's settings that decide what is gathered when, in elements."""

    persistence_threshold: int
    prefetch_bucket: int
    max_live_parameters: int
    max_reuse_distance: int

    @classmethod
    def of(cls, deepspeed: dict[str, Any]) -> Settings:
        """From DeepSpeed's configuration; what it does not say is DeepSpeed's default."""
        zero = deepspeed["zero_optimization"]
        return cls(
            int(zero["stage3_param_persistence_threshold"]),
            int(zero["stage3_prefetch_bucket_size"]),
            int(zero["stage3_max_live_parameters"]),
            int(zero.get("stage3_max_reuse_distance", 1e9)),
        )


class Use(NamedTuple):
    """A module's parameters are needed (`fetch`) or not any longer."""

    module: str
    fetch: bool
    phase: str  # "forward" or "backward"


@dataclass
class Gathers:
    """What is gathered in one micro-step, and how much of it lives at once.

    `elements` counts, for "teacher", "forward" and "backward", parameters by their size;
    `local` those that hpZ gathers inside a node.
    """

    elements: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    local: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    collectives: int = 0
    live: int = 0  # most elements at once, prefetched ones included
    at_turn: int = 0  # elements alive between forward and backward


def uses(traced: Trace, *, checkpointed: bool | None = None, teacher: bool = True) -> list[Use]:
    """One micro-step: the forward pass, and the backward pass with what it recomputes.

    `checkpointed` None follows the configuration; `teacher` False leaves out the teacher,
    which is not ZeRO's where it is whole. A backward pass runs through the modules in the opposite
    order; the one of a checkpointed block begins with its forward pass, which ends before the block
    is left. Inside of a leaf nothing is gathered or released.
    """
    watched = [teacher or not is_teachers(c.module) for c in traced.calls]
    watched = [
        w and leaf_of(c.module, traced) is None for w, c in zip(watched, traced.calls, strict=True)
    ]
    forward = [
        Use(call.module, call.enter, "forward")
        for call, counts in zip(traced.calls, watched, strict=True)
        if counts
    ]
    blocks = {
        block.calls.stop - 1: block.calls
        for block in traced.blocks
        if (block.recomputed if checkpointed is None else checkpointed)
    }
    backward: list[Use] = []
    for position in reversed(range(len(traced.calls))):
        call = traced.calls[position]
        if position in blocks:
            again = [p for p in blocks[position] if watched[p]]
            if call.module in traced.leaves:
                again.remove(position)
            backward += [
                Use(traced.calls[p].module, traced.calls[p].enter, "backward") for p in again
            ]
        if call.grad and watched[position]:
            backward.append(Use(call.module, not call.enter, "backward"))
    return forward + backward


def leaf_of(module: str, traced: Trace) -> str | None:
    """The leaf that a module lies in, itself not counted."""
    parts = module.split(".")
    outer = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((name for name in outer if name in traced.leaves), None)


class Replay:
    """The coordinator's state while it goes through the uses of one micro-step."""

    def __init__(
        self,
        weights: list[Weight],
        steps: list[Use],
        settings: Settings,
        *,
        traced: Trace,
        hpz: bool = False,
    ) -> None:
        self._settings, self._steps, self._hpz = settings, steps, hpz
        self._sizes = {w.name: w.elements for w in weights}
        self._of: dict[str, list[str]] = defaultdict(list)
        for weight in weights:
            self._of[leaf_of(weight.module, traced) or weight.module].append(weight.name)
        self._persistent = {w.name for w in weights if w.elements <= settings.persistence_threshold}
        order = [use.module for use in steps if use.fetch]
        self._order = [
            (name, step) for step, module in enumerate(order) for name in self._of[module]
        ]
        sizes = (sum(self._sizes[name] for name in self._of[module]) for module in order)
        self._before = [0, *itertools.accumulate(sizes)]  # elements in the modules before a step
        self._needed_at: dict[str, list[int]] = defaultdict(list)
        for name, step in self._order:
            self._needed_at[name].append(step)
        self._secondary: set[str] = set()

    def micro_step(self, available: set[str]) -> Gathers:
        """Replay one micro-step that starts with these parameters gathered.

        With hpZ, parameters that were released once are gathered inside the node from then on, in
        later calls too.
        """
        self._found, self._available = Gathers(), set(available)
        self._users: dict[str, set[str]] = defaultdict(set)
        self._queue = deque(self._order)
        self._fetched_for: dict[str, float] = defaultdict(lambda: -1e10)
        self._step = self._live = 0
        phases = itertools.pairwise([*self._steps, Use("", True, "")])
        for use, following in phases:
            if use.fetch:
                self._enter(use)
            else:
                self._leave(use.module)
            if use.phase != "backward" and following.phase == "backward":
                self._found.at_turn = self._live
        return self._found

    def _enter(self, use: Use) -> None:
        needed = self._of[use.module]
        self._gather([name for name in needed if name not in self._available], use.phase)
        for name in needed:
            self._users[name].add(use.module)
        waiting = {name for name in needed if self._fetched_for[name] < self._step}
        while self._queue and waiting:
            name, step = self._queue.popleft()
            self._fetched_for[name] = step
            waiting.discard(name)
        self._gather(list(self._prefetch()), use.phase)
        self._step += 1

    def _prefetch(self) -> Iterator[str]:
        settings = self._settings
        room = min(settings.max_live_parameters - self._live, settings.prefetch_bucket)
        chosen: set[str] = set()
        size = 0
        while self._queue and size < room:
            name, step = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for[name], step)
            if name not in self._available and name not in chosen:
                chosen.add(name)
                size += self._sizes[name]
                yield name

    def _gather(self, names: list[str], phase: str) -> None:
        for hop, counters in ((False, self._found.elements), (True, self._found.local)):
            group = [name for name in names if (name in self._secondary) == hop]
            for name in group:
                # The student networks' first weights are prefetched during the encoder's last.
                encoder = is_teachers(name)
                counters["teacher" if encoder else phase][self._sizes[name]] += 1
            self._found.collectives += bool(group)
        self._available.update(names)
        self._live += sum(self._sizes[name] for name in names)
        self._found.live = max(self._found.live, self._live)

    def _leave(self, module: str) -> None:
        for name in self._of[module]:
            self._users[name].discard(module)
            if name in self._persistent or name not in self._available or self._users[name]:
                continue
            if self._fetched_for[name] > self._step or self._soon_again(name):
                continue
            self._available.discard(name)
            self._live -= self._sizes[name]
            if self._hpz:
                self._secondary.add(name)

    def _soon_again(self, name: str) -> bool:
        """Whether the next use begins less than the reuse distance from here."""
        steps = self._needed_at[name]
        following = bisect.bisect_left(steps, self._step)
        if following == len(steps):
            return False
        distance = self._before[steps[following]] - self._before[self._step]
        return distance < self._settings.max_reuse_distance
