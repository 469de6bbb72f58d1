"""From a configuration to a run that is ready to start or to go on."""

from __future__ import annotations

import logging

from m3i_scale.cluster.launch import World
from m3i_scale.config import Config
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.loop import Run, Stream, UnstableError, pretrain
from m3i_scale.engine.metrics import MetricLog, measure_speed, write_provenance
from m3i_scale.engine.saver import Saver, newest_good
from m3i_scale.engine.schedules import make_schedule, split_batch
from m3i_scale.engine.state import restore
from m3i_scale.engine.stop import StopFlag
from m3i_scale.engine.zero import build, deepspeed_config
from m3i_scale.objective.balance import LossBalance

log = logging.getLogger("m3i")


def pretrain_through(run: Run, stop: StopFlag, record: MetricLog) -> bool:
    """Train to the end; an unstable run goes back and steps over the data, `rollbacks` times.

    Returns and raises as `loop.pretrain`.
    """
    for left in reversed(range(run.config.engine.rollbacks + 1)):
        try:
            return pretrain(run, stop, record)
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
    run.progress = restore(reader, run.sharded, run.world, run.balance, run.config.seed)
    run.progress.position, run.progress.skipped = skip_to, skipped
    reader.close()


def open_run(
    config: Config, world: World, stream: Stream, *, epoch_samples: int, resume: str
) -> Run:
    """Build networks and optimiser, and load the newest good checkpoint if there is one.

    Args:
        config: the whole configuration.
        world: this rank.
        stream: where batches come from.
        epoch_samples: samples in one pass over all sources.
        resume: "auto", "never", or the path of a checkpoint or of a folder of them.

    Raises:
        ConfigError: the batch, the schedule or the checkpoint asked for is impossible.
        CheckpointError: the checkpoint is of other networks.
    """
    spec = config.optimizer
    split = split_batch(spec.global_batch_size, spec.max_micro_batch, world.size)
    schedule = make_schedule(spec, epoch_samples)
    keep_every = config.checkpoint.keep_every
    saver = Saver(
        config.run_folder / "checkpoints",
        world,
        keep_last=config.checkpoint.keep_last,
        keep_every=keep_every
        and keep_every.steps(batch=spec.global_batch_size, epoch_samples=epoch_samples),
        background=config.checkpoint.background,
    )
    reader = newest_good(saver.folder, resume, world)
    sharded = build(config, world, split)
    balance = config.objective.balance
    weighing = LossBalance(active=False)
    if balance is not None:
        weighing = LossBalance(balance.gamma, balance.decay)
    run = Run(
        config=config,
        world=world,
        stream=stream,
        sharded=sharded,
        split=split,
        schedule=schedule,
        balance=weighing,
        saver=saver,
        save_every=config.checkpoint.every.steps(
            batch=spec.global_batch_size, epoch_samples=epoch_samples
        ),
        speed=measure_speed(config, world.device) if world.is_main else None,
    )
    if reader is not None:
        run.progress = restore(reader, sharded, world, run.balance, config.seed)
        saver.last_good = reader.path
        reader.close()
        log.info("resumed from %s at step %d", reader.path, run.progress.step)
    if world.is_main:
        write_provenance(run.folder, config, deepspeed_config(config, split))
    return run
