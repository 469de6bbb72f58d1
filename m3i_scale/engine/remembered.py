"""A figure that takes seconds to work out and is the same at every restart of a run.

flops.json      FLOPs of a sample by kind of step, and a hash of what they follow from
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from m3i_scale import __version__
from m3i_scale.config import Node
from m3i_scale.engine.files import write_whole
from m3i_scale.engine.lineage import UNREADABLE

FLOPS = "flops.json"


def remembered_flops(
    folder: Path, config: Node, count: Callable[[], Mapping[str, float]], *, write: bool = True
) -> dict[str, float]:
    """FLOPs of a sample by kind of step as `count` gives them, from the run folder if it has them.

    Args:
        folder: of the run.
        config: all that they can depend on; with another one, or by another version of the
            package, they are counted again.
        count: takes seconds.
        write: remember them.
    """
    text = json.dumps([__version__, config.model_dump(mode="json")], sort_keys=True)
    key, path = hashlib.sha256(text.encode()).hexdigest(), folder / FLOPS
    with contextlib.suppress(*UNREADABLE):
        known = json.loads(path.read_text())
        flops = known["flops"]
        if known["of"] == key and flops and all(map(_is_count, flops.values())):
            return dict(flops)
    flops = dict(count())
    if write:
        with contextlib.suppress(OSError):  # the next start counts again
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"flops": flops, "of": key}))
    return flops


def _is_count(value: object) -> bool:
    return isinstance(value, float) and 0 <= value < math.inf
