"""The training loop: batch, forward, backward, step, momentum, balance, log, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from m3i_scale.cluster.launch import World
from m3i_scale.config import Config, Objective
from m3i_scale.engine.checkpoint import CheckpointError
from m3i_scale.engine.events import EventLog
from m3i_scale.engine.health import Health, RunningMean
from m3i_scale.engine.metrics import Figures, MetricLog, Speed, machine_values, memory
from m3i_scale.engine.pictures import save_mixes
from m3i_scale.engine.saver import Saver
from m3i_scale.engine.schedules import BatchSplit, Schedule, momentum_ends
from m3i_scale.engine.state import (
    InitialWeights,
    Progress,
    generator_states,
    set_generator_states,
    snapshot,
)
from m3i_scale.engine.stop import StopFlag
from m3i_scale.engine.watchdog import Watchdog
from m3i_scale.engine.zero import Sharded, module_stack_kept, set_learning_rate
from m3i_scale.models.precision import DTYPES
from m3i_scale.objective.balance import LossBalance
from m3i_scale.objective.inputs import MixedBatch, build_input
from m3i_scale.objective.momentum import ema_coefficient
from m3i_scale.objective.step_loss import StepLoss

log = logging.getLogger(__name__)


class Stream(Protocol):
    """What the loop needs of a stream of samples: batches from any global position on."""

    def loader(
        self,
        *,
        start: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int,
        end: int | None,
        pin_memory: bool,
    ) -> Iterable[Any]:
        """Micro-step t of rank r starts at `start + (t * world_size + r) * micro_batch`."""


@dataclass
class Run:
    """Everything a training run consists of."""

    config: Config
    world: World
    stream: Stream
    sharded: Sharded
    split: BatchSplit
    schedule: Schedule
    balance: LossBalance
    saver: Saver
    save_every: int
    stated: dict[str, Any] = field(default_factory=dict)  # about itself, in every checkpoint
    initial: InitialWeights | None = None  # what it starts from; None: drawn, or a checkpoint
    speed: Speed | None = None  # on rank 0, which writes the metrics
    stop: StopFlag | None = None  # of this rank
    health: Health = field(default_factory=Health)
    stopping: bool = False  # whether any rank was asked to stop, when the last step ended
    saving: Stopwatch = field(default_factory=lambda: Stopwatch())  # training waits for checkpoints
    events: EventLog | None = None  # of this attempt
    progress: Progress = field(default_factory=Progress)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run_folder


class UnstableError(RuntimeError):
    """Too many steps in a row without a finite gradient."""

    for_users = True


class CategoryError(ValueError):
    """A sample's category is beyond the classifier."""

    for_users = True
    on_one_rank = True


def pretrain(run: Run, stop: StopFlag, metrics: MetricLog) -> bool:
    """Train to the end of the schedule; False if it stopped before because it was asked to.

    Raises:
        UnstableError: `engine.max_nonfinite_steps` steps in a row had non-finite gradients, or
            the loss rose above `engine.spike_factor` times its average.
        CategoryError: a sample has a category beyond `model.categories`.
        CheckpointError: the last checkpoint could not be written.
    """
    run.saver.remove_leftovers()
    watchdog = Watchdog(
        run.folder, run.world.rank, 60 * run.config.engine.stall_minutes,
        on_stall=run.events.stalled if run.events else None,
    )  # fmt: skip
    try:
        return _train(run, stop, metrics, watchdog)
    finally:
        watchdog.stop()


def _train(run: Run, stop: StopFlag, metrics: MetricLog, watchdog: Watchdog) -> bool:
    config, progress = run.config, run.progress
    run.stop = stop
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
        for warning in run.health.warnings(values, progress):
            if run.world.is_main:
                log.warning("step %d: %s", progress.step, warning)
        metrics.write(progress.step, values, show=progress.step % config.logging.every == 0)
        watchdog.beat()
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
        run.events.ending = ("stopped", stop.raised_by or "asked on another rank")
    if stop.raised_by is not None:
        log.warning("asked to stop by %s, saving step %d", stop.raised_by, run.progress.step)
    elif run.world.is_main:
        log.warning("another rank was asked to stop, saving step %d", run.progress.step)


def train_step(run: Run, batches: Timed) -> tuple[dict[str, float], bool]:
    """One optimiser step on the next micro-batches: batch, forward, backward, step, teacher update.

    Returns:
        The step's figures, and whether the weights were updated (not when a gradient was not
        finite). `run.progress` is the caller's to move.
    """
    engine = run.sharded.engine
    started, figures = time.perf_counter(), Figures()
    rate = run.schedule.learning_rate(run.progress.step)
    set_learning_rate(engine, rate)
    weight = run.balance.supervised_weight  # lambda
    skipped_before, alone, step, held = engine.skipped_steps, 0.0, None, []
    if run.config.objective.runs_twice(run.split.accumulation):
        held = [next(batches) for _ in range(run.split.accumulation)]
        alone = time.perf_counter() - started  # from here on ranks wait for each other
        step, states = _compare(run, held)
    for number in range(run.split.accumulation):
        begun = time.perf_counter()
        view = _prepare(run, held[number] if held else next(batches))
        alone += time.perf_counter() - begun
        if step is not None:
            set_generator_states(states[number], run.world)
        with module_stack_kept():
            outputs = engine(view, weight, step=step)
            engine.backward(outputs["loss"])
        engine.step()  # updates at the end of the accumulation only
        figures.add(_figures(run, outputs, weight))
    updated = engine.skipped_steps == skipped_before
    device = run.world.device
    asked = run.stop is not None and run.stop.raised_by is not None
    norm = engine.get_global_grad_norm()  # the same on all ranks; read with the other figures
    machine = [alone, batches.take_wait(), *memory(device)]
    values, own = figures.reduce(run.world, [*machine, float(asked), 0.0 if norm is None else norm])
    run.stopping = bool(own[:, -2].any())
    values["gradient/all_parameters"] = float(own[run.world.rank, -1])
    values |= machine_values(own[:, :-2], device) | _step_values(run, values, rate, weight)

    if updated:
        for parameter, maximum in run.sharded.model.upper_bounds():
            run.sharded.shards.clamp(parameter, maximum)
        coefficient = _teacher_momentum(run)
        if run.sharded.teacher is not None:
            run.sharded.teacher.update(coefficient)
        run.balance.update(values["gradient/ssp"], values["gradient/sp"])
        values["teacher_momentum"] = coefficient
    return values | _speed(run, started), updated


def _compare(run: Run, held: Sequence[Any]) -> tuple[StepLoss, list[dict[str, Tensor]]]:
    """The first pass over a step's micro-batches, without gradient, and the loss of all of them.

    Returns:
        What the second pass needs: that loss, and how the random generators stood before each
        micro-batch. (Our networks draw by stream position; others may have dropout.)
    """
    sharded, model = run.sharded, run.sharded.model
    step, states = StepLoss(run.config.objective), []
    with torch.no_grad(), sharded.first_pass():
        for batch in held:
            states.append(generator_states(run.world))
            with module_stack_kept():
                sharded.engine(_prepare(run, batch), step=step)
    step.close(model.queues, model.running_centres)
    return step, states


def save(run: Run) -> None:
    """Start a checkpoint of where the run stands, after the one before has ended."""
    copy = run.config.checkpoint.background
    state = snapshot(
        run.sharded, run.world, run.progress, run.balance, stated=run.stated, copy=copy
    )
    run.saver.save(run.progress.step, *state)


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
        workers=run.config.data.workers,
        end=progress.position + steps_left * split.batch,
        pin_memory=run.world.device.type == "cuda",
    )


def _prepare(run: Run, batch: Any) -> MixedBatch:
    """Move a batch to the device, distort and mix it there."""
    config = run.config
    _require_categories(batch, config.objective, config.model.categories)
    prepared = build_input(
        batch.to(run.world.device),
        config.objective.input,
        mean=config.data.mean,
        std=config.data.std,
        dtype=DTYPES[config.engine.precision],
        seed=config.seed,
    )
    picture = run.folder / "mixes.png"
    if config.logging.pictures and run.world.is_main and not picture.exists():
        save_mixes(
            picture, prepared, config.data.mean, config.data.std, config.objective.input.patch
        )
    return prepared


def _require_categories(batch: Any, objective: Objective, categories: int) -> None:
    """Refuse a label that the classifier has no row for, while the batch is on the CPU.

    On a GPU it would end in an assertion of the device, without a name.
    """
    if "category" not in objective.representations or not len(batch):
        return
    labels = batch.category.numpy()
    largest = int(labels.max())
    if largest >= categories:
        key = batch.key[int(labels.argmax())]
        raise CategoryError(
            f"sample {key} has category {largest}, but model.categories is {categories}, for "
            f"categories 0 to {categories - 1}; set model.categories={largest + 1} or more before "
            "the first start of the run, or mend the labels"
        )


def _figures(run: Run, outputs: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """This micro-step's (sum, count) pairs, the balance's gradient norms among them."""
    squares = run.sharded.model.probe.squares(weight)
    one = torch.ones_like(squares[0])
    pairs = {name: value for name, value in outputs.items() if name != "loss"}
    pairs["loss/total"] = torch.stack([outputs["loss"].detach().float(), one])
    pairs["gradient_square/ssp"] = torch.stack([squares[0], one])
    pairs["gradient_square/sp"] = torch.stack([squares[1], one])
    return pairs


def _step_values(run: Run, means: dict[str, float], rate: float, weight: float) -> dict[str, float]:
    """Derived figures of one step."""
    # The norm at the features of the whole batch of the step's mean loss: each micro-batch's loss
    # is divided by their number, and so is its gradient.
    parts = run.world.size * run.split.accumulation
    return {
        "gradient/ssp": math.sqrt(means.pop("gradient_square/ssp") / parts),
        "gradient/sp": math.sqrt(means.pop("gradient_square/sp") / parts),
        "balance/lambda": weight,
        "learning_rate": rate,
    }


def _speed(run: Run, started: float) -> dict[str, float]:
    # The figures were read from the device, and the momentum update waited for it.
    seconds = time.perf_counter() - started
    rate = run.split.batch / seconds
    machine = run.speed.values(rate, run.world.size) if run.speed else {}
    return {"images_per_second": rate, "step_seconds": seconds, **machine}


def _teacher_momentum(run: Run) -> float:
    ends = momentum_ends(run.config.optimizer, run.schedule.total)
    return ema_coefficient(run.progress.step, run.schedule.total, *ends)


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
