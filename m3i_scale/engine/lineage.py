"""Which checkpoints of a folder are one run: identity, attempts, and where each attempt began.

Step numbers alone do not order checkpoints: a run that went back to step 4 has two checkpoints of
step 6, and one that began anew has the old ones above its own. Every start of training is therefore
an *attempt*; a lineage lists the attempts that led to where the run stands, each with the step that
it began from. A checkpoint belongs to the lineage if its attempt is listed and had got no further
than the next one's beginning.

    checkpoints/lineage.json       the lineage of the run, written when training starts
    step-NNNNNNNN/complete.json    holds the lineage of that checkpoint

Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m3i_scale.engine.files import write_whole

FILE = "lineage.json"
# What reading a JSON file and taking it apart may raise.
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError,
)  # fmt: skip
BEFORE = ""  # the attempt of checkpoints that were written before lineages were


class Attempt(NamedTuple):
    """One start of training, or one rollback within it."""

    name: str
    first: int  # step that it began from


class Lineage(NamedTuple):
    """The attempts that led to where a run stands, oldest first."""

    run: str  # identity; a run that begins anew in the same folder has another one
    attempts: tuple[Attempt, ...]
    parent: str | None = None  # path of the checkpoint that the last attempt began from
    job: str | None = None  # of the last attempt: Slurm's job, or torchrun's run

    @property
    def attempt(self) -> str:
        """The last attempt."""
        return self.attempts[-1].name

    def holds(self, attempt: str, step: int) -> bool:
        """Whether a checkpoint that `attempt` wrote after `step` steps belongs to this lineage."""
        ends = [*(later.first for later in self.attempts[1:]), math.inf]
        return any(
            known.name == attempt and step <= end
            for known, end in zip(self.attempts, ends, strict=True)
        )

    def branch(self, step: int, parent: Path) -> Lineage:
        """The lineage of a new attempt that begins from this one's checkpoint of `step`."""
        passed = tuple(known for known in self.attempts if known.first <= step)
        attempts = (*passed, Attempt(_name(), step))
        return Lineage(self.run or _name(), attempts, str(parent), this_job())

    def as_json(self) -> dict[str, Any]:
        """As `read` takes it."""
        content = {
            "run": self.run,
            "attempts": [list(attempt) for attempt in self.attempts],
            "parent": self.parent,
            "job": self.job,
        }
        return {**content, "check": _check(content)}


LEGACY = Lineage("", (Attempt(BEFORE, 0),))


def begin_anew(step: int = 0, parent: Path | None = None) -> Lineage:
    """The lineage of a new run, which starts from nothing or from another run's checkpoint."""
    name = _name()
    return Lineage(
        name, (Attempt(name, step),), None if parent is None else str(parent), this_job()
    )


def read(content: Mapping[str, Any]) -> Lineage:
    """From JSON.

    Raises:
        any of UNREADABLE: it is something else, or damaged: one wrong letter in a name would make
            strangers of all checkpoints. Versions before this one wrote no check.
    """
    if "check" in content:
        rest = {key: value for key, value in content.items() if key != "check"}
        if content["check"] != _check(rest):
            raise ValueError("the lineage does not match its checksum")
    attempts = tuple(Attempt(str(name), int(first)) for name, first in content["attempts"])
    if not attempts:
        raise ValueError("a lineage without attempts")
    return Lineage(str(content["run"]), attempts, content.get("parent"), content.get("job"))


def read_file(path: Path) -> Lineage | None:
    """The lineage in a run's `lineage.json`; None where there is none that can be read."""
    try:
        return read(json.loads(path.read_text()))
    except UNREADABLE:
        return None


def of_checkpoint(path: Path) -> Lineage | None:
    """The lineage of a complete checkpoint; None where its marker cannot be read."""
    try:
        content = json.loads((path / "complete.json").read_text())
        return read(content["lineage"]) if "lineage" in content else LEGACY
    except UNREADABLE:
        return None


def write_file(path: Path, lineage: Lineage) -> None:
    """Write `lineage.json`, whole or not at all."""
    write_whole(path, json.dumps(lineage.as_json(), indent=1))


def this_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """What all restarts of one submission have in common; None for a start by hand."""
    return environment.get("SLURM_JOB_ID") or environment.get("TORCHELASTIC_RUN_ID")


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often this submission has been restarted by itself."""
    counts = (environment.get("SLURM_RESTART_COUNT"), environment.get("TORCHELASTIC_RESTART_COUNT"))
    return max(int(count) if count and count.isdigit() else 0 for count in counts)


def _check(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _name() -> str:
    return secrets.token_hex(6)
