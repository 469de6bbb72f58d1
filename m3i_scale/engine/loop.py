"""The training loop: batch, forward, backward, step, momentum, balance, log, save."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from m3i_scale.cluster.launch import World
from m3i_scale.config import RunConfig, Verify
from m3i_scale.engine.averages import RunningMean
from m3i_scale.engine.checkpoint import CheckpointError
from m3i_scale.engine.checks import Checks
from m3i_scale.engine.communication import RECORDER
from m3i_scale.engine.corruption import CorruptionError
from m3i_scale.engine.events import EventLog
from m3i_scale.engine.metrics import MetricLog, Speed, machine_values, memory, working_values
from m3i_scale.engine.momentum import WeightAverages
from m3i_scale.engine.passes import Passes
from m3i_scale.engine.saver import Saver
from m3i_scale.engine.schedules import BatchSplit, Schedule
from m3i_scale.engine.state import Progress, generator_states, set_generator_states, snapshot
from m3i_scale.engine.stop import StopFlag
from m3i_scale.engine.task import InitialWeights, Stream, Task, Values
from m3i_scale.engine.watchdog import Watchdog
from m3i_scale.engine.zero import Sharded, module_stack_kept, set_learning_rate

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a training run consists of."""

    task: Task
    world: World
    stream: Stream
    sharded: Sharded
    split: BatchSplit
    schedule: Schedule
    saver: Saver
    save_every: int
    evaluate_every: int | None = None  # None: at the end only, if at all
    stated: dict[str, Any] = field(default_factory=dict)  # about itself, in every checkpoint
    initial: InitialWeights | None = None  # what it starts from; None: drawn, or a checkpoint
    speed: Speed | None = None  # on rank 0, which writes the metrics
    stop: StopFlag | None = None  # of this rank
    stopping: bool = False  # whether any rank was asked to stop, when the last step ended
    saving: Stopwatch = field(default_factory=lambda: Stopwatch())  # training waits for checkpoints
    events: EventLog | None = None  # of this attempt
    checks: Checks | None = None  # of this rank, once it trains
    progress: Progress = field(default_factory=Progress)

    @property
    def config(self) -> RunConfig:
        """The whole configuration."""
        return self.task.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run_folder


class UnstableError(RuntimeError):
    """Too many steps in a row without a finite gradient."""

    for_users = True


def train_to_end(run: Run, stop: StopFlag, metrics: MetricLog) -> bool:
    """Train to the end of the schedule; False if it stopped before because it was asked to.

    Raises:
        UnstableError: `engine.max_nonfinite_steps` steps in a row had non-finite gradients, or
            the loss rose above `engine.spike_factor` times its average.
        CheckpointError: the last checkpoint could not be written.
        CorruptionError: a device, its memory or the network has given a wrong result.
    """
    run.saver.remove_leftovers()
    watchdog = Watchdog(
        run.folder, run.world.rank, 60 * run.config.engine.stall_minutes,
        on_stall=run.events.stalled if run.events else None, where=RECORDER.where,
    )  # fmt: skip
    try:
        return _train(run, stop, metrics, watchdog)
    finally:
        watchdog.stop()


def _train(run: Run, stop: StopFlag, metrics: MetricLog, watchdog: Watchdog) -> bool:
    config, progress = run.config, run.progress
    run.stop, run.checks = stop, None
    open_checks(run)
    batches = open_batches(run)
    skipped_in_a_row, average_loss = 0, RunningMean()
    if progress.step >= run.schedule.total and run.world.is_main:
        log.info(
            "nothing to do: %d steps are done and optimizer.duration asks for %d (%s)",
            progress.step, run.schedule.total, config.optimizer.duration,
        )  # fmt: skip
    while progress.step < run.schedule.total:
        values, updated = train_step(run, batches)
        skipped_in_a_row = 0 if updated else skipped_in_a_row + 1
        progress.skipped += not updated
        values["skipped_steps"] = progress.skipped
        values["checkpoint_wait_seconds"] = run.saving.take()
        for warning in run.task.warnings(values, progress.step):
            if run.world.is_main:
                log.warning("step %d: %s", progress.step, warning)
        if _evaluation_is_due(run) and _is_sound(run):
            values |= _timed_evaluation(run, watchdog.beat)
        metrics.write(progress.step, values, show=progress.step % config.logging.every == 0)
        watchdog.beat()
        _require_sound(run)
        _require_stable(run, skipped_in_a_row, average_loss.ratio(values["loss/total"]))
        progress.step += 1
        progress.position += run.split.batch

        with run.saving:
            run.saver.poll()
        if run.stopping:
            _say_stopping(run, stop)
        last = progress.step >= run.schedule.total
        if run.stopping or last or progress.step % run.save_every == 0:
            with run.saving:
                save(run)
        if run.stopping:
            break
    with run.saving:
        succeeded = run.saver.finish()
    if not succeeded:
        raise CheckpointError("the last checkpoint could not be written; see the messages above")
    return progress.step >= run.schedule.total


def _say_stopping(run: Run, stop: StopFlag) -> None:
    """On rank 0 that the run stops; on the rank that was asked, by what."""
    if run.events is not None:
        run.events.asked(run.progress.step, stop.raised_by or "asked on another rank")
    if stop.raised_by is not None:
        log.warning("asked to stop by %s, saving step %d", stop.raised_by, run.progress.step)
    elif run.world.is_main:
        log.warning("another rank was asked to stop, saving step %d", run.progress.step)


def train_step(run: Run, batches: Timed) -> tuple[Values, bool]:
    """One optimiser step on the next micro-batches: batch, forward, backward, step, teacher update.

    Returns:
        The step's figures, and whether the weights were updated (not when a gradient was not
        finite). `run.progress` is the caller's to move.
    """
    engine, task, networks = run.sharded.engine, run.task, run.sharded.model
    started, world, checks = time.perf_counter(), run.world, run.checks or open_checks(run)
    rate = run.schedule.learning_rate(run.progress.step)
    set_learning_rate(engine, rate)
    skipped_before = engine.skipped_steps
    RECORDER.begin_step(world.device)
    figures, alone = checks.compute(run.progress.step, batches)
    engine.step()
    updated = engine.skipped_steps == skipped_before
    asked = run.stop is not None and run.stop.raised_by is not None
    norm = engine.get_global_grad_norm()  # the same on all ranks; read with the other figures
    machine = [alone, batches.take_wait(), *memory(world.device)]
    others = [RECORDER.take(), float(asked), 0.0 if norm is None else norm, *checks.report()]
    values, own = figures.reduce(world, [*machine, *others])
    working, stopping, norms, *found = own[:, len(machine) :].unbind(1)
    run.stopping = bool(stopping.any())
    values["gradient/all_parameters"] = float(norms[world.rank])
    values |= machine_values(own[:, : len(machine)], world.device) | working_values(working)
    values |= task.step_values(values, world.size * run.split.accumulation)
    values["learning_rate"] = rate
    checks.judge(torch.stack(found, 1))
    values |= checks.values(run.saver.damaged)

    if updated:
        for parameter, maximum in task.upper_bounds(networks):
            run.sharded.shards.clamp(parameter, maximum)
        if run.sharded.teacher is not None:
            coefficient = task.momentum(run.progress.step, run.schedule)
            run.sharded.teacher.update(coefficient)
            values["teacher_momentum"] = coefficient
        task.after_update(values)
    checks.accept()
    return values | _speed(run, started), updated


def _evaluation_is_due(run: Run) -> bool:
    if run.task.evaluation is None:
        return False
    done, every = run.progress.step + 1, run.evaluate_every
    return done == run.schedule.total or (every is not None and done % every == 0)


def _timed_evaluation(run: Run, alive: Callable[[], None]) -> Values:
    started = time.perf_counter()
    values = evaluate(run, alive)
    if run.world.is_main and values:
        figures = (f"{name.partition('/')[2]} {value:.4g}" for name, value in values.items())
        log.info("evaluation after %d steps: %s", run.progress.step + 1, ", ".join(figures))
    return values | {"evaluation_seconds": time.perf_counter() - started}


def evaluate(run: Run, alive: Callable[[], None] = lambda: None) -> Values:
    """The task's figures of the networks as they are, or of their averages (a collective).

    Random generators are left as they were, so that training continues as if nothing had happened.

    Args:
        run: what is trained.
        alive: called whenever the networks begin a forward pass: an evaluation may take longer
            than a rank may stall.
    """
    sharded, states = run.sharded, generator_states(run.world)
    if run.checks is not None:
        run.checks.look_again()
        _require_sound(run)
    in_use: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(sharded.teacher, WeightAverages):
        in_use = sharded.teacher.in_use()

    def begin_forward(*_: Any) -> None:  # what a hook returns would be the networks' input
        alive()

    hook = sharded.engine.register_forward_pre_hook(begin_forward)
    with torch.no_grad(), sharded.first_pass(), in_use, module_stack_kept():
        sharded.engine.eval()
        try:
            found = run.task.evaluate(sharded.engine, run.world)
        finally:
            hook.remove()
            sharded.engine.train()
            set_generator_states(states, run.world)
    if run.checks is not None:
        run.checks.accept()
    return {f"evaluation/{name}": value for name, value in found.items()}


def save(run: Run) -> None:
    """Start a checkpoint of where the run stands, after the one before has ended.

    Raises:
        CorruptionError: the state has changed since the last update.
    """
    copy, sums = run.config.checkpoint.background, dict[str, int]()
    state = snapshot(
        run.sharded, run.world, run.progress, run.task, stated=run.stated, copy=copy, sums=sums
    )
    if run.checks is not None:
        run.checks.look_again()
        _require_sound(run)
    run.saver.save(run.progress.step, *state, sums)


def open_checks(run: Run, spec: Verify | None = None) -> Checks:
    """Check from here on that nothing goes wrong unseen: the state is right now.

    By `spec`, or by the run's configuration.
    """
    passes = Passes(run.task, run.world, run.sharded, run.split.accumulation)
    engine = run.config.engine
    run.checks = Checks(spec or engine.verify, passes, deterministic=engine.deterministic)
    return run.checks


def open_batches(run: Run) -> Timed:
    """This rank's micro-batches, from where the run stands to its end."""
    return Timed(iter(_batches(run)))


def _batches(run: Run) -> Iterable[Any]:
    progress, split = run.progress, run.split
    steps_left = run.schedule.total - progress.step
    return run.stream.loader(
        start=progress.position,
        micro_batch=split.micro,
        rank=run.world.rank,
        world_size=run.world.size,
        workers=run.task.workers,
        end=progress.position + steps_left * split.batch,
        pin_memory=run.world.device.type == "cuda",
    )


def _speed(run: Run, started: float) -> dict[str, float]:
    # The figures were read from the device, and the momentum update waited for it.
    seconds = time.perf_counter() - started
    rate = run.split.batch / seconds
    machine = run.speed.values(rate, run.world.size, run.task.kind) if run.speed else {}
    return {"images_per_second": rate, "step_seconds": seconds, **machine}


def _is_sound(run: Run) -> bool:
    return run.checks is None or run.checks.problem is None


def _require_sound(run: Run) -> None:
    """End the run if a device, its memory or the network was found to be wrong (then collective).

    Raises:
        CorruptionError: it was.
    """
    problem = run.checks.problem if run.checks is not None else None
    if problem is None:
        return
    if run.events is not None:
        run.events.fault(run.progress.step, str(problem), problem.nodes)
    run.saver.finish()  # what is under way is of before
    last = f"the last good checkpoint is {run.saver.last_good or 'none'}"
    raise CorruptionError(f"step {run.progress.step}: {problem}; {last}", problem.nodes)


def _require_stable(run: Run, skipped_in_a_row: int, loss_ratio: float) -> None:
    spike = run.config.engine.spike_factor
    if skipped_in_a_row >= run.config.engine.max_nonfinite_steps:
        what = f"{skipped_in_a_row} steps in a row had non-finite gradients"
    elif spike is not None and loss_ratio > spike:
        what = f"the loss was {loss_ratio:.1f} times its average"
    else:
        return
    raise UnstableError(
        f"{what} (step {run.progress.step}); the last good checkpoint is "
        f"{run.saver.last_good or 'none'}; lower optimizer.learning_rate, check the data at stream "
        f"position {run.progress.position}, or allow engine.rollbacks"
    )


class Stopwatch:
    """Adds up the seconds that are spent inside `with`."""

    def __init__(self) -> None:
        self._started = self._seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Timed(Iterator[Any]):
    """An iterator that remembers how long its consumer has waited."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._waiting = source, Stopwatch()

    def __next__(self) -> Any:
        with self._waiting:
            return next(self._source)

    def take_wait(self) -> float:
        """Seconds waited since the last call."""
        return self._waiting.take()
