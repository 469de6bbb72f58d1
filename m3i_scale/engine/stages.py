"""Another run's checkpoint as the start of this one: `model.init` that names a run.

It is found and checked as a run finds its own: the newest that is whole, by all ranks together.
"""

from __future__ import annotations

from pathlib import Path

from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.engine import checkpoint
from m3i_scale.engine.checkpoint import CheckpointError, CheckpointReader
from m3i_scale.engine.saver import newest_good, problems_of_ranks


def is_run(path: Path) -> bool:
    """Whether it is a run folder, a folder of checkpoints, or a checkpoint."""
    inside = (path / "complete.json", path / "checkpoints")
    return any(one.exists() for one in inside) or bool(checkpoint.all_complete(path))


def open_run(path: Path, own: Path, world: World) -> CheckpointReader:
    """Open the checkpoint that a path means: itself, or the newest good one of a run (collective).

    Args:
        path: as `is_run`.
        own: the folder of the run that starts from it.
        world: this rank.

    Raises:
        ConfigError: there is none, it is damaged, or it is the run's own.
    """
    single = (path / "complete.json").exists()
    folder = path.parent if single else path
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if folder.resolve() == (own / "checkpoints").resolve():
        raise ConfigError(
            f"model.init {path} is this run itself; give the stage that starts from it another "
            "name (run)"
        )
    if single:
        words = problems_of_ranks(checkpoint.verify(path, world.rank, world.size) or "", world)
        if words:
            raise ConfigError(
                f"model.init {path} is damaged ({words}); name another checkpoint, or the run"
            )
        return CheckpointReader(path)
    try:
        reader = newest_good(folder, "auto", world)
    except CheckpointError:
        raise ConfigError(
            f"model.init {path}: all its checkpoints are damaged, as said above; name another run"
        ) from None
    if reader is None:
        raise ConfigError(f"model.init {path} has no complete checkpoint; name another run")
    return reader
