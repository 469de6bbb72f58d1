"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and goes where the block fails.

    Raises:
        ValueError: it cannot be written, for example because the disk is full.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {_reason(error)}; make room or choose another place, "
            "and run the same command again: what is finished is kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
