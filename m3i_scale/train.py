"""Pre-train: `deepspeed m3i_scale/train.py --config configs/demo.yaml [a.b=value ...]`.

Also started by torchrun, by srun (see slurm/), or by plain python on one device.
Exit codes: 0 finished; 2 something is wrong and the last line says what; 85 saved and stopped,
because a signal asked for it.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3i_scale.config import Config, ConfigError, load_config
from m3i_scale.config import schema as tree

if TYPE_CHECKING:
    from m3i_scale.data import Storage, Stream

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


def build_stream(config: Config) -> Stream:
    """The stream of samples that the configuration describes.

    Raises:
        ConfigError: a tokenizer or an index is missing or does not fit.
    """
    from m3i_scale import data
    from m3i_scale.models.tokenizer import load_tokenizer
    from m3i_scale.objective.masks import PatchMask

    spec, text, masking = config.data, config.model.text, config.objective.input
    side = spec.image_size // masking.patch
    augmentation: dict[str, Any] = spec.augmentation.model_dump()
    for view in ("view_a", "view_b"):
        augmentation[view] = data.Photometric(**augmentation[view])
    try:
        tokenizer = load_tokenizer(text.tokenizer) if text else None
        if tokenizer and text and tokenizer.vocab_size > text.vocab_size:
            raise ValueError(
                f"the tokenizer {text.tokenizer} has {tokenizer.vocab_size} tokens; set "
                f"model.text.vocab_size to that or more (it is {text.vocab_size})"
            )
        stream = data.Stream(
            [data.Source(**source.model_dump()) for source in spec.sources],
            seed=config.seed,
            image_size=spec.image_size,
            augmentation=data.Augmentation(**augmentation),
            tokenize=(
                functools.partial(tokenizer, max_length=text.max_length)
                if tokenizer and text
                else no_tokens
            ),
            mask_sampler=PatchMask(side, side, masking.ratio, masking.mask),
            lanes=spec.lanes or config.optimizer.global_batch_size,
            chunk_bytes=round(spec.chunk_mebibytes * 2**20),
            max_pixels=spec.max_pixels,
            max_bad_rate=spec.max_bad_rate,
            bad_window=spec.bad_window,
            storage=_storage(spec.storage),
        )
        stream.require_categories(config.model.categories)
        return stream
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def _storage(spec: tree.Storage) -> Storage:
    from m3i_scale.data import Storage
    from m3i_scale.data.cache import DiskCache

    cache = DiskCache(spec.cache, round(spec.cache_gibibytes * 2**30)) if spec.cache else None
    return Storage(
        attempts=spec.retries + 1, options=spec.options, cache=cache, allow_pipe=spec.allow_pipe
    )


def no_tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (B, 0) and mask (B, 0) of an objective without texts."""
    ids = torch.zeros(len(texts), 0, dtype=torch.int64)
    return ids, torch.zeros_like(ids, dtype=torch.bool)


def run(options: argparse.Namespace, config: Config) -> int:
    """Build, train, and say how it ended."""
    from m3i_kernels import set_backend

    from m3i_scale.cluster import launch

    world = launch.start(
        config.engine.device, config.engine.precision, config.seed, config.engine.timeout_minutes
    )
    launch.setup_logging(world.rank)
    # These import deepspeed, which then fixes its accelerator: the one that `start` has chosen.
    from m3i_scale.engine import metrics, session, stop
    from m3i_scale.planner import dry_run

    flag = stop.StopFlag()
    set_backend(config.engine.kernels)
    stream = build_stream(config)
    ready = session.open_run(
        config, world, stream, epoch_samples=stream.samples, resume=options.resume
    )
    if options.dry_run:
        if world.is_main:
            print(dry_run.describe(ready, stream.describe()), end="", flush=True)
        launch.finish()
        return 0
    record = metrics.MetricLog(
        ready.folder,
        is_main=world.is_main,
        total=ready.schedule.total,
        first=ready.progress.step,
        tensorboard=config.logging.tensorboard,
    )
    finished = session.pretrain_through(ready, flag, record)
    record.close()
    launch.finish()
    return 0 if finished else stop.STOPPED


def main() -> int:
    """Run, and turn what a user can mend into one sentence."""
    options = parse(sys.argv[1:])
    try:
        return run(options, load_config(options.config, options.overrides))
    except Exception as error:
        if not getattr(error, "for_users", False):
            raise
        if os.environ.get("RANK", "0") == "0" or getattr(error, "on_one_rank", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
