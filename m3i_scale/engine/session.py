"""From a configuration to a run that is ready to start or to go on."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from m3i_scale.cluster.launch import RankError, World, from_rank_0, gather_objects
from m3i_scale.config import ConfigError, Duration, RunConfig
from m3i_scale.engine import agreement, run_folder, stages
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.events import EventLog, Start, new_name
from m3i_scale.engine.lineage import Lineage
from m3i_scale.engine.lock import RunLock
from m3i_scale.engine.loop import Run, UnstableError, train_to_end
from m3i_scale.engine.metrics import (
    MetricLog,
    Speed,
    peak_flops,
    write_initial,
    write_provenance,
)
from m3i_scale.engine.remembered import remembered_flops
from m3i_scale.engine.saver import Saver, any_rank, newest_good
from m3i_scale.engine.schedules import make_schedule, split_batch
from m3i_scale.engine.state import restore, start_from
from m3i_scale.engine.stop import StopFlag
from m3i_scale.engine.task import InitialWeights, Stream, Task
from m3i_scale.engine.tracker_backends import Opening
from m3i_scale.engine.trackers import Trackers
from m3i_scale.engine.zero import build, deepspeed_config

T = TypeVar("T")
log = logging.getLogger(__name__)


def train(run: Run, stop: StopFlag) -> bool:
    """Train with a record of it; False if it stopped before its end because it was asked to.

    Raises:
        as `loop.train_to_end`.
    """
    record = MetricLog(
        run.folder,
        is_main=run.world.is_main,
        total=run.schedule.total,
        first=run.progress.step,
        trackers=open_trackers(run.config, run.saver.lineage, run.progress.step),
        attempt=run.events.attempt if run.events else "",
        picture=run.task.picture,
    )
    try:
        return train_through(run, stop, record)
    finally:
        if run.events is not None:
            run.events.checkpoint_wait = run.saving.take()
        record.close()


def open_trackers(config: RunConfig, line: Lineage | None, first: int) -> Trackers | None:
    """The trackers of a run that trains, on rank 0, which alone knows its lineage."""
    if line is None:
        return None
    opening = Opening(
        folder=config.run_folder, name=config.run, identity=line.run,
        project=config.logging.project, settings=config.model_dump(mode="json"), first=first,
    )  # fmt: skip
    return Trackers(config.logging.trackers, opening)


def train_through(run: Run, stop: StopFlag, record: MetricLog) -> bool:
    """Train to the end; an unstable run goes back and steps over the data, `rollbacks` times.

    Returns and raises as `loop.train_to_end`.
    """
    for left in reversed(range(run.config.engine.rollbacks + 1)):
        try:
            return train_to_end(run, stop, record)
        except UnstableError as error:
            if not left or run.saver.last_good is None:
                raise
            if run.world.is_main:
                log.warning("%s; going back, %d more allowed", error, left - 1)
            rewind(run, skip_to=run.progress.position + run.split.batch)
    raise AssertionError  # the last turn returned or raised


def rewind(run: Run, skip_to: int) -> None:
    """Load the last good checkpoint and go on at stream position `skip_to`, past the bad data."""
    run.saver.finish()
    assert run.saver.last_good is not None
    reader = CheckpointReader(run.saver.last_good)
    skipped = run.progress.skipped
    run.progress = restore(reader, run.sharded, run.world, run.task)
    run.progress.position, run.progress.skipped = skip_to, skipped
    reader.close()
    begin(run, rollback=True)


def open_run(
    task: Task,
    world: World,
    stream: Stream,
    *,
    epoch_samples: int,
    resume: str,
    accept: Sequence[str] = (),
    sources: Sequence[Mapping[str, Any]] = (),
    write: bool = True,
    events: EventLog | None = None,
    stop: StopFlag | None = None,
) -> Run:
    """Build networks and optimiser, and load the newest good checkpoint if there is one.

    Args:
        task: what is trained.
        world: this rank.
        stream: where batches come from.
        epoch_samples: samples in one pass over all sources.
        resume: "auto", "never", or the path of a checkpoint, of a folder of them, or of a run.
        accept: keys of `Task.statement` that may differ from the checkpoint's.
        sources: what each source is (`data.Stream.identities`), for the same statement.
        write: make the run folder this run's. False to look only: nothing is written.
        events: told of the parts of the start-up, and when training begins.
        stop: ends what is computed before the first step.

    Raises:
        ConfigError: the batch, the schedule or the checkpoint asked for is impossible, the
            checkpoint is of another order, the initial weights do not fit, or the folder cannot be
            written.
        CheckpointError: the checkpoint is of other networks, or none is undamaged.
        StoppedEarly: the run was asked to stop before its first step.
    """
    config = task.config
    spec = config.optimizer
    split = split_batch(spec.global_batch_size, spec.max_micro_batch, world.size, even=task.even)
    schedule = make_schedule(spec, epoch_samples)
    task.require(world.size)

    def steps(length: Duration) -> int:
        return length.steps(batch=spec.global_batch_size, epoch_samples=epoch_samples)

    keep_every, evaluation = config.checkpoint.keep_every, task.evaluation
    saver = Saver(
        config.run_folder / "checkpoints",
        world,
        keep_last=config.checkpoint.keep_last,
        keep_every=keep_every and steps(keep_every),
        background=config.checkpoint.background,
    )
    _load_frozen(task, world)
    stated = {"order": task.statement(sources), **task.facts(split, world.size)}
    enter = events.enter if events else _say_nothing
    enter("checkpoint")
    reader = newest_good(saver.folder, resume, world, events.passed_over if events else None)
    if reader is not None:
        _compare(
            reader, stated["order"], accept, task.moved(reader.state, split, world.size), world
        )
    weights, started = _open_initial(task, world) if reader is None else (None, {})
    write = write and (reader is None or reader.state["step"] < schedule.total)
    if events is not None and write:
        events.start()
        saver.on_damage, saver.on_failure = events.fault, events.unsaved
    if write and task.precomputes:
        enter("data")
        task.precompute(world, lambda: stop is not None and stop.raised_by is not None)
    enter("networks")
    sharded = build(task, world, split)
    run = Run(
        task=task,
        world=world,
        stream=stream,
        sharded=sharded,
        split=split,
        schedule=schedule,
        saver=saver,
        save_every=steps(config.checkpoint.every),
        evaluate_every=steps(evaluation.every) if evaluation and evaluation.every else None,
        stated=stated,
        initial=weights,
        speed=_speed(task, world, write=write) if world.is_main else None,
        events=events,
    )
    if reader is not None:
        enter("checkpoint")
        run.progress = restore(reader, sharded, world, task)
        saver.last_good = reader.path
        reader.close()
        log.info("resumed from %s at step %d", reader.path, run.progress.step)
    if weights is not None:
        start_from(weights, sharded, started)
        log.info("started from %s: %s", task.init, "; ".join(weights.lines()))
    if write:  # else there is nothing to do
        begin(run)
    return run


def _speed(task: Task, world: World, *, write: bool) -> Speed:
    flops = remembered_flops(task.config.run_folder, task.config, task.flops_by_kind, write=write)
    return Speed(flops, peak_flops(world.device, task.config.engine.precision))


def _open_initial(task: Task, world: World) -> tuple[InitialWeights | None, Mapping[str, str]]:
    """Weights to start from, and names of parameters with what they are called there (collective).

    Those of a run are of all its networks, all others of a backbone.
    """
    if task.init is None:
        return None, {}
    path = Path(task.init)
    if any_rank(stages.is_run(path), world):
        stage = task.open_stage(stages.open_run(path, task.config.run_folder, world))
        return stage, {name: name for name in stage.names}
    weights = _rank_0_first(task.open_initial, path, world)
    return weights, task.initial_names(weights.names)


def _load_frozen(task: Task, world: World) -> None:
    """Load frozen networks, and require the same on all ranks (a collective)."""
    sums = _rank_0_first(lambda: task.load_frozen(world.device), task.config.run_folder, world)
    for rank, own in enumerate(gather_objects(sums, world) if sums else []):
        differing = [name for name, value in own.items() if value != sums[name]]
        if differing:
            raise ConfigError(
                f"{differing[0]} has other weights on rank {rank} than on "
                f"rank {world.rank}; give all nodes the same files"
            )


def _rank_0_first(action: Callable[[], T], folder: Path, world: World) -> T:
    """`action` on all ranks, on rank 0 before the others, for it may download (a collective).

    `folder` is what is named where the system does not say of which file it speaks.
    """
    found: list[T] = []
    from_rank_0(world, lambda: found.append(action()), folder)
    try:
        return found[0] if found else action()
    except ConfigError as error:  # of this rank alone: its node has no such file, say
        raise RankError(str(error)) from None


def _say_nothing(_part: str) -> None:
    """In the place of `EventLog.enter`."""


def begin(run: Run, *, rollback: bool = False) -> None:
    """Make the run folder this run's: lineage, provenance, other lineages set aside (collective).

    Raises:
        ConfigError: the folder cannot be written.
    """
    saver, config = run.saver, run.config
    clip_norm = config.optimizer.clip_norm
    settings = deepspeed_config(config.engine, run.split, clip_norm=clip_norm)

    def work() -> None:
        saver.lineage = run_folder.begin(run.folder, saver.last_good, run.progress.step)
        if run.events is not None:
            run.events.begin(run.progress.step, saver.lineage.run, rollback=rollback)
        write_provenance(run.folder, config, settings)
        if saver.last_good is None:
            write_initial(run.folder, run.initial.record() if run.initial else None)

    from_rank_0(run.world, work, run.folder)


@contextlib.contextmanager
def hold(folder: Path, world: World, start: Start | None = None) -> Iterator[EventLog]:
    """Own a run folder, on rank 0 for all ranks, and record the attempt there (a collective).

    Args:
        folder: the run folder.
        world: this rank.
        start: what has happened in this process so far.

    Raises:
        ConfigError: another start owns it, or it cannot be written.
    """
    lock = RunLock(folder)
    with contextlib.ExitStack() as stack:
        from_rank_0(world, lambda: _enter(stack, lock), folder)
        attempt, hosts = _introduce(world)
        yield stack.enter_context(
            EventLog(folder, world.rank, attempt, hosts, start or Start(), lock.last_sign)
        )


def _enter(stack: contextlib.ExitStack, lock: RunLock) -> None:
    stack.enter_context(lock)


def _introduce(world: World) -> tuple[str, list[str]]:
    """A name for the attempt, the same on all ranks, and the host of each rank (a collective)."""
    every = gather_objects((new_name(), socket.gethostname()), world)
    return every[0][0], [host for _, host in every]


def _compare(
    reader: CheckpointReader,
    order: dict[str, Any],
    accept: Sequence[str],
    moved: str | None,
    world: World,
) -> None:
    """Refuse a checkpoint of another order; say what differs and is accepted, and what `moved`."""
    said = agreement.require_agreement(reader.path, reader.state.get("order"), order, accept)
    if world.is_main:
        for phrase in [*said, *filter(None, [moved])]:
            log.warning("%s", phrase)
