"""The configurations that the package brings along, by name.

`m3i:pretrain_internimage_h` is configs/pretrain_internimage_h.yaml, `m3i:methods/mim_pixel` a file
below. An installed package holds the folder inside itself, a checkout beside itself.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from m3i_scale.config.types import ConfigError

PREFIX = "m3i:"


def folder() -> Path:
    """Where the files are."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """All names, without `m3i:`."""
    files = folder().rglob("*.yaml")
    return sorted(str(path.relative_to(folder()).with_suffix("")) for path in files)


def locate(name: str, beside: Path) -> Path:
    """The file that a name means: `m3i:NAME`, or a path relative to the folder `beside`.

    Raises:
        ConfigError: there is no configuration of that name.
    """
    if not name.startswith(PREFIX):
        return beside / name
    wanted = name.removeprefix(PREFIX).removesuffix(".yaml")
    known = names()
    if wanted in known:
        return folder() / f"{wanted}.yaml"
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    hint = f"did you mean {PREFIX}{near[0]}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"the package has no configuration {name!r}; {hint}")
