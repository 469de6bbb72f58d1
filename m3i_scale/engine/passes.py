"""The forward and backward passes of a step, up to the update."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3i_scale.cluster.launch import World
from m3i_scale.engine.communication import RECORDER
from m3i_scale.engine.metrics import Figures
from m3i_scale.engine.state import generator_states, set_generator_states
from m3i_scale.engine.task import Task
from m3i_scale.engine.zero import Sharded, module_stack_kept


class Passed(NamedTuple):
    """What the passes of a step have given besides gradients."""

    figures: Figures
    alone: float  # seconds before the networks started, in which no rank waits for another


class Passes:
    """One step's passes over its micro-batches.

    Args:
        task: what is trained.
        world: this rank.
        sharded: the networks.
        micro_steps: micro-batches of a step.
    """

    def __init__(self, task: Task, world: World, sharded: Sharded, micro_steps: int) -> None:
        self.task, self.world, self.sharded, self.micro_steps = task, world, sharded, micro_steps

    def hold(self, batches: Iterator[Any]) -> list[Any]:
        """All micro-batches of a step."""
        with RECORDER.apart():
            return [next(batches) for _ in range(self.micro_steps)]

    def run(self, batches: Iterator[Any]) -> Passed:
        """Forward and backward; the last micro-step lacks its `engine.step()`, the update."""
        engine, task, networks = self.sharded.engine, self.task, self.sharded.model
        figures, alone, begun = Figures(), 0.0, time.perf_counter()
        states: list[dict[str, Tensor]] = []
        if task.looks_first(self.micro_steps):
            held = self.hold(batches)
            alone = time.perf_counter() - begun  # from here on ranks wait for each other
            states, batches = self._look(held), iter(held)
        for number in range(self.micro_steps):
            if number:
                engine.step()  # counts; updates at the end of the accumulation only
            begun = time.perf_counter()
            with RECORDER.apart():
                inputs = task.prepare(next(batches), self.world)
            alone += time.perf_counter() - begun
            if states:
                set_generator_states(states[number], self.world)
            with module_stack_kept():
                outputs = task.forward(engine, inputs)
                RECORDER.note(f"the loss of micro-step {number}", outputs["loss"])
                engine.backward(outputs["loss"])
            figures.add(task.figures(networks, outputs))
        return Passed(figures, alone)

    def _look(self, held: Sequence[Any]) -> list[dict[str, Tensor]]:
        """The first pass over a step's micro-batches, without gradient.

        Returns:
            How the random generators stood before each, for the second pass. (Our networks draw by
            stream position; others may have dropout.)
        """
        sharded, states = self.sharded, []
        with torch.no_grad(), sharded.first_pass():
            for batch in held:
                states.append(generator_states(self.world))
                with module_stack_kept():
                    self.task.look(sharded.engine, self.task.prepare(batch, self.world))
        self.task.looked(sharded.model)
        return states
