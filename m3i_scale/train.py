"""Pre-train: `deepspeed m3i_scale/train.py --config configs/demo.yaml [a.b=value ...]`.

Also started by torchrun, by srun (see slurm/), or by plain python on one device.
Exit codes: 0 finished, 2 something is wrong and the last line says what, 85 saved and stopped
because a signal asked for it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from m3i_scale.config import Config, ConfigError, load_config

log = logging.getLogger("m3i")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="WHICH",
        help="auto (default: the newest good checkpoint of this run, if any), never, or a path",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, print model size, memory, steps and data, and stop",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="changes to the file")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, config: Config) -> int:
    """Build, train, and say how it ended."""
    from m3i_kernels import set_backend

    from m3i_scale.engine import launch, loop, metrics, session, stop
    from m3i_scale.inputs import build_stream

    world = launch.start(
        config.engine.device, config.engine.precision, config.seed, config.engine.timeout_minutes
    )
    launch.speak(world.rank)
    flag = stop.StopFlag()
    set_backend(config.engine.kernels)
    stream = build_stream(config)
    ready = session.open_run(
        config, world, stream, epoch_samples=stream.epoch_samples, resume=options.resume
    )
    if options.dry_run:
        print(session.describe(ready, stream) if world.leads else "", end="", flush=True)
        launch.finish()
        return 0
    record = metrics.MetricLog(
        ready.folder,
        leads=world.leads,
        total=ready.schedule.total,
        first=ready.progress.step,
        tensorboard=config.logging.tensorboard,
    )
    finished = loop.pretrain(ready, flag, record)
    record.close()
    launch.finish()
    return 0 if finished else stop.STOPPED


def main() -> int:
    """Run, and turn what a user can mend into one sentence."""
    options = parse(sys.argv[1:])
    try:
        return run(options, load_config(options.config, options.overrides))
    except (ConfigError, RuntimeError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
