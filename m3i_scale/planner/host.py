"""Host time of a step: what Python needs to launch it, whatever the GPU does.

Python visits modules, parameter tensors and collectives, and takes about the same time for each:

    seconds = A (a module visits + b tensors) + c collectives x ranks,    A: micro-steps
    seconds = A (a module visits + d tensors)                 at ZeRO stages 1 and 2

- A module is visited in the forward pass, again where its block is computed again, and in the
  backward pass where it has gradients.
- The tensors are those that ZeRO-3 gathers, reduces and releases; a whole teacher's are not.
- A collective copies one slice of each rank.
- At stages 1 and 2 the tensors are those that are trained, each with a gradient to be added up and
  reduced; the collectives, some ten a step, move flat tensors as they are.

`SECONDS` are fitted to measurements of `benchmarks/host_time.py` by `benchmarks/host_fit.py`. They
are CPU seconds of one core; a GPU's host takes longer, since launching a kernel costs more than
calling the CPU's: `Assumptions.host` is that factor.
"""

from __future__ import annotations

from typing import NamedTuple

from m3i_scale.profiling.record import Trace


class Work(NamedTuple):
    """What Python visits in one optimiser step."""

    modules: int  # visits
    tensors: int
    slices: int  # collectives x ranks
    gradients: int = 0  # tensors of stages 1 and 2


# Seconds of each, in the order of `Work`.
SECONDS = (5.22e-05, 3.65e-04, 9.31e-06, 1.84e-04)


def step_work(
    traced: Trace,
    *,
    ranks: int,
    accumulation: int,
    collectives: int,
    whole_teacher: bool,
    stage: int,
    checkpointed: bool | None = None,
    first_pass: int = 0,
) -> Work:
    """Count the visits of one optimiser step.

    Args:
        traced: the networks.
        ranks: of the run.
        accumulation: micro-steps.
        collectives: of the step.
        whole_teacher: the teacher lies outside of ZeRO.
        stage: of ZeRO.
        checkpointed: all blocks or none; None as configured.
        first_pass: modules that a micro-batch visits in a pass without gradient before.
    """
    forward = sum(call.enter for call in traced.calls)
    backward = sum(call.enter and call.grad for call in traced.calls)
    again = sum(
        sum(traced.calls[position].enter for position in block.calls)
        for block in traced.blocks
        if (block.recomputed if checkpointed is None else checkpointed)
    )
    visits = accumulation * (forward + backward + again + first_pass)
    if stage < 3:
        return Work(visits, 0, 0, accumulation * sum(w.trained for w in traced.weights))
    tensors = sum(w.trained or not (whole_teacher and w.of_teacher) for w in traced.weights)
    return Work(
        visits,
        accumulation * tensors,
        collectives * ranks if ranks > 1 else 0,
    )


def seconds(work: Work) -> float:
    """CPU seconds of one core."""
    return sum(count * each for count, each in zip(work, SECONDS, strict=True))
