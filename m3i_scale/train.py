"""Train: `deepspeed m3i_scale/train.py --config configs/demo.yaml [a.b=value ...]`.

Also started by torchrun, by srun (see slurm/), or by plain python on one device.
Exit codes: 0 finished; 2 something is wrong and the last line says what; 85 saved and stopped,
because a signal asked for it; 130 interrupted while starting.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from typing import TYPE_CHECKING

from m3i_scale import __version__

# What takes long to import is imported when the command line has been read: --help answers at once,
# and Ctrl-C ends a start with one line.
if TYPE_CHECKING:
    from m3i_scale.config import RunConfig
    from m3i_scale.engine.events import Start


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; overrides may stand on both sides of options."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    add(
        "--resume",
        default="auto",
        metavar="WHICH",
        help="auto (default: the newest good checkpoint of this run, if any), never, or the path "
        "of a checkpoint or run; a restart of the same job goes on with auto",
    )
    add(
        "--accept-change",
        action="append",
        default=[],
        metavar="KEY,KEY",
        help="keys in which the run may differ from its checkpoint, though order, samples or loss "
        "depend on them; for instance data.lanes,seed",
    )
    says = "build everything, print model size, memory, steps and data, and stop; writes nothing"
    add("--dry-run", action="store_true", help=says)
    add(
        "--print",
        dest="asked",
        choices=("run", "folder", "run_folder"),
        help="print this of the configuration, and stop",
    )
    add("--version", action="version", version=f"m3i-scale {__version__}")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="a.b=value", help="changes to the file")
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace, config: RunConfig, start: Start) -> int:
    """Build, train, and say how it ended."""
    from m3i_kernels import set_backend

    from m3i_scale.cluster import launch

    spec = config.engine
    world = launch.start(
        spec.device, spec.precision, config.seed, spec.timeout_minutes,
        before_joining=lambda: start.enter("nodes"),
    )  # fmt: skip
    launch.setup_logging(world.rank)
    start.enter("imports")
    # These import deepspeed, which then fixes its accelerator: the one that `start` has chosen.
    from m3i_scale.engine import session, stop
    from m3i_scale.planner import dry_run
    from m3i_scale.tasks import task_of

    flag = stop.StopFlag(launchers=start.launchers)
    set_backend(spec.kernels)
    task = task_of(config)  # imports what its networks are made of
    start.enter("data")
    stream = task.open_stream()
    open_run = functools.partial(
        session.open_run,
        task,
        world,
        stream,
        epoch_samples=stream.samples,
        resume=options.resume,
        accept=[key for keys in options.accept_change for key in keys.split(",")],
        sources=stream.identities(),
    )
    gc.freeze()  # DeepSpeed collects garbage; what the libraries hold takes it most of a second
    if options.dry_run:
        ready = open_run(write=False)
        if world.is_main:
            print(dry_run.describe(ready, stream.describe()), end="", flush=True)
        finished = True
    else:
        start.enter("nodes")
        with session.hold(config.run_folder, world, start) as record:
            finished = session.train(open_run(events=record, stop=flag), flag)
    launch.finish()
    return 0 if finished else stop.STOPPED


def main() -> int:
    """Run, and turn what a user can mend into one sentence."""
    from m3i_scale.engine import ending, events, trackers

    ending.end_on_interrupt()
    start = events.Start()  # now: a launcher that dies while libraries load is missed later
    options = parse(sys.argv[1:])
    try:
        from m3i_scale.config import load_run

        config = load_run(options.config, options.overrides)
        if options.asked:
            print(getattr(config, options.asked))
            return 0
        trackers.require_packages(config.logging.trackers)
        return run(options, config, start)
    except Exception as error:
        code = ending.exit_code(error)
        if code is None:
            raise
        ending.explain(error, code)
        return code


if __name__ == "__main__":
    sys.exit(main())
