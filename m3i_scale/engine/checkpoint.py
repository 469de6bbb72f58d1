"""Checkpoints: exact, elastic, crash-safe, and nothing in them to unpickle.

    checkpoints/
      step-00001000/                      complete, by atomic rename of
      step-00001000.partial/              a write in progress, or what a crash left of one, which
                                          the next start removes
        rank-00000-of-00002.safetensors   this rank's slices of the flattened tensors, no padding
        rank-00000-of-00002.json          size and SHA-256 of that file, checksums of tensors
        state.json                        step, shapes, ranks, counters
        complete.json                     lineage and the list of files, written last
      lineage.json                        which of these are the run; see lineage.py

Tensors are named `weight/<parameter>` (fp32 master), `exp_avg/<parameter>`,
`exp_avg_sq/<parameter>`, `teacher/<parameter>` (fp32 average), `buffer/<buffer>` and
`rng/<device>`. Slice r of W holds the elements `[r * k, (r + 1) * k)`, `k = ceil(N / W)`; a reader
with another number of ranks takes the byte ranges it needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m3i_scale.config import ConfigError
from m3i_scale.engine import lineage
from m3i_scale.engine.checksums import additive
from m3i_scale.engine.lineage import UNREADABLE, Lineage

log = logging.getLogger(__name__)

FORMAT = 2  # 1: before the names student and teacher
# Of tensors, in the file beside a rank's.
SUMS, SUMS_DIGEST = "checksums", "checksums_sha256"
_STEP = re.compile(r"step-\d+")
_MOST_ELEMENTS = 1 << 48  # of a tensor


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete or of another run."""

    for_users = True


class Extent(NamedTuple):
    """Where a shard lies in its flattened parameter."""

    start: int
    stop: int


def extent(elements: int, rank: int, ranks: int) -> Extent:
    """The real part of a rank's shard of a parameter with `elements` elements."""
    size = -(-elements // ranks)
    start = min(rank * size, elements)
    return Extent(start, min(start + size, elements))


def rank_file(rank: int, ranks: int) -> str:
    """Name of one rank's tensors."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def all_complete(folder: Path) -> list[Path]:
    """Complete checkpoints of any lineage, by step."""
    found = [path.parent for path in folder.glob("step-*/complete.json")]
    return sorted((path for path in found if _STEP.fullmatch(path.name)), key=step_of)


def current_lineage(folder: Path) -> Lineage:
    """The lineage of the run whose checkpoints lie here.

    That of `lineage.json`; without one (another version wrote here, or somebody copied checkpoints)
    that of the newest checkpoint.
    """
    known = lineage.read_file(folder / lineage.FILE)
    found = (lineage.of_checkpoint(path) for path in reversed(all_complete(folder)))
    return known or next((line for line in found if line), lineage.LEGACY)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of the run's lineage, oldest first."""
    line = current_lineage(folder)
    return [path for path in all_complete(folder) if belongs(path, line)]


def belongs(path: Path, line: Lineage) -> bool:
    """Whether a checkpoint is of a lineage; one that does not say so is taken for it."""
    own = lineage.of_checkpoint(path)
    return own is None or line.holds(own.attempt, step_of(path))


def strangers(folder: Path) -> list[Path]:
    """Complete checkpoints that lie here and are of another lineage, by step."""
    line = current_lineage(folder)
    return [path for path in all_complete(folder) if not belongs(path, line)]


def remains(folder: Path) -> list[Path]:
    """What a crash left of checkpoints that it cut short, in being written or removed."""
    complete = set(all_complete(folder))
    return [path for path in sorted(folder.glob("step-*")) if path not in complete]


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The number of steps that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


# ------------------------------------------------------------------------------------------ writing


class Write(NamedTuple):
    """One checkpoint being written by this rank."""

    step: int
    partial: Path
    thread: threading.Thread
    failure: list[str]
    changed: list[str]  # names of tensors that were written differently than they were copied

    @property
    def done(self) -> bool:
        """Whether this rank's part has ended, well or not."""
        return not self.thread.is_alive()


def begin_write(
    folder: Path,
    step: int,
    rank: int,
    ranks: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    sums: Mapping[str, int] | None = None,
) -> Write:
    """Start writing this rank's tensors in the background.

    `sums` are their checksums (`checksums.additive`) when they were copied: the file must read back
    with the same, and the file beside it keeps them for whoever loads it.

    `tensors` must be private copies in CPU memory: training goes on meanwhile. Rank 0 also writes
    `state`. When all ranks are `done` without failure, rank 0 calls `publish`.
    """
    partial = step_folder(folder, step).with_suffix(".partial")
    failure: list[str] = []
    changed: list[str] = []

    def work() -> None:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            path = partial / rank_file(rank, ranks)
            save_file(tensors, path)
            _sync(path)
            changed.extend(_changed(path, sums or {}))
            if changed:
                raise OSError(
                    f"{path.name}: {', '.join(changed[:3])} ({len(changed)} tensors) read back "
                    "differently than they were copied: the host's memory or the disk has changed "
                    "bits"
                )
            text = json.dumps(dict(sums or {}))
            stated = {SUMS: text, SUMS_DIGEST: hashlib.sha256(text.encode()).hexdigest()}
            _write_json(path.with_suffix(".json"), _fingerprint(path) | (stated if sums else {}))
            if rank == 0:
                _write_json(partial / "state.json", {"format": FORMAT, **state})
        except (OSError, SafetensorError) as error:
            failure.append(f"{partial}: {error}")

    thread = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
    thread.start()
    return Write(step, partial, thread, failure, changed)


def _changed(path: Path, sums: Mapping[str, int]) -> list[str]:
    """Names of the tensors of a file whose checksums are others."""
    with safe_open(path, framework="pt") as file:
        return [n for n, known in sums.items() if int(additive(file.get_tensor(n))) != known]


def publish(write: Write, ranks: int, line: Lineage | None = None) -> Path:
    """Make a fully written checkpoint the newest complete one (rank 0, after all ranks are done).

    Args:
        write: this rank's part.
        ranks: their number.
        line: the lineage that the checkpoint belongs to; None: the folder's.

    Raises:
        CheckpointError: the marker cannot be written (disk full, folder gone).
    """
    final = write.partial.with_suffix("")
    try:
        files = [
            json.loads((write.partial / rank_file(r, ranks)).with_suffix(".json").read_text())
            for r in range(ranks)
        ]
        for entry in files:  # each rank's stay in its file
            entry.pop(SUMS, None)
            entry.pop(SUMS_DIGEST, None)
        files.append(_fingerprint(write.partial / "state.json"))
        line = line or current_lineage(final.parent)
        marker = {"lineage": line.as_json(), "files": files}
        _write_json(write.partial / "complete.json", marker)
        _sync(write.partial)
        remove(final)  # there, if the run went back before it and has reached it again
        os.rename(write.partial, final)
        _sync(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot complete the checkpoint: {error}") from None
    return final


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove the run's complete checkpoints but the last ones and multiples of `keep_every`.

    Those of another lineage are neither removed nor counted.
    """
    for path in complete_checkpoints(folder)[:-keep_last]:
        if keep_every is None or step_of(path) % keep_every:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, its marker first: half of one must not pass for a damaged one."""
    with contextlib.suppress(OSError):  # not there
        (path / "complete.json").unlink()
    shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename cannot outrun what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------ reading


def verify(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """Check sizes and checksums of every `shares`-th file; what is wrong, or None."""
    try:
        listed = json.loads((path / "complete.json").read_text())["files"]
        found = [entry["file"] for entry in listed]
        ranks = len(found) - 1
        # Nothing else is opened: what a damaged list names may be a device that never ends.
        if found != [*(rank_file(rank, ranks) for rank in range(ranks)), "state.json"]:
            return f"{path / 'complete.json'} lists other files than those of a checkpoint"
        for entry in listed[share::shares]:
            if _fingerprint(path / entry["file"]) != entry:
                return f"{path / entry['file']} does not match its checksum"
    except UNREADABLE as error:
        return f"{path}: {error or type(error).__name__}"
    return None


class CheckpointReader:
    """Reads slices of a complete checkpoint, whatever number of ranks wrote it.

    Raises:
        CheckpointError: it cannot be read, or is of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text())
        except UNREADABLE as error:
            raise CheckpointError(f"{path}: no readable checkpoint ({error})") from None
        found = self.state.get("format") if isinstance(self.state, dict) else None
        if found != FORMAT:
            raise CheckpointError(
                f"{path}: checkpoint format {found}, this version reads {FORMAT}; "
                "train on with the version that wrote it, or start another run"
            )
        problem = _contradiction(path, self.state)
        if problem:
            raise CheckpointError(f"{path / 'state.json'} is damaged: {problem}")
        self.ranks: int = self.state["ranks"]
        self.shapes: dict[str, list[int]] = self.state["shapes"]
        self.buffers: dict[str, list[int]] = self.state.get("buffers", {})
        self._files: dict[int, Any] = {}

    def close(self) -> None:
        """Release the files."""
        self._files.clear()

    def sums(self, share: int, shares: int) -> dict[str, int] | None:
        """Checksums of tensors, added up over every `shares`-th file; None: not all have them."""
        found: dict[str, int] = {}
        for rank in range(share, self.ranks, shares):
            beside = (self.path / rank_file(rank, self.ranks)).with_suffix(".json")
            try:
                stated = json.loads(beside.read_text())
                if SUMS not in stated:
                    return None
                if hashlib.sha256(stated[SUMS].encode()).hexdigest() != stated[SUMS_DIGEST]:
                    raise ValueError("its list does not match its checksum")
                for name, value in json.loads(stated[SUMS]).items():
                    found[name] = found.get(name, 0) + int(value)
            except UNREADABLE as error:
                log.warning("%s: %s; what is loaded is not compared with it", beside, error)
                return None
        return found

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole tensor in its own shape; raises as `slice`."""
        shape = self._shape(name)
        return self.slice(kind, name, 0, _elements(shape)).reshape(shape)

    def slice(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened tensor.

        Raises:
            CheckpointError: a file cannot be read, or has not what the state says.
        """
        elements = _elements(self._shape(name))
        parts = []
        for rank in range(self.ranks):
            own = extent(elements, rank, self.ranks)
            low, high = max(start, own.start), min(stop, own.stop)
            if low < high:
                with self._damage_named(rank):
                    part = self._open(rank).get_slice(f"{kind}/{name}")
                    if part.get_shape() != [own.stop - own.start]:
                        raise ValueError(f"{kind}/{name} has the shape {part.get_shape()}")
                    parts.append(part[low - own.start : high - own.start])
        return torch.cat(parts) if parts else torch.empty(0)

    def _shape(self, name: str) -> list[int]:
        for known in (self.shapes, self.buffers):
            if name in known:
                return known[name]
        raise CheckpointError(f"{self.path} holds no tensor named {name}")

    def generator_states(self, rank: int) -> dict[str, Tensor]:
        """Random generator states that this rank saved, by device kind."""
        with self._damage_named(rank):
            file = self._open(rank)
            names = [key for key in file.keys() if key.startswith("rng/")]  # noqa: SIM118
            return {key.removeprefix("rng/"): file.get_tensor(key) for key in names}

    @contextlib.contextmanager
    def _damage_named(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            path = self.path / rank_file(rank, self.ranks)
            raise CheckpointError(f"{path} is damaged: {error}") from None

    def _open(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.path / rank_file(rank, self.ranks), framework="pt")
        return self._files[rank]


def _contradiction(path: Path, state: dict[str, Any]) -> str | None:
    """What in a state cannot be, as far as reading tensors relies on it; None where nothing."""
    for name, least in (("step", 0), ("position", 0), ("skipped", 0), ("adam_step", 0),
                        ("ranks", 1)):  # fmt: skip
        value = state.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 62:
            return f"{name} is {value!r}"
    if "ranks" not in state or "step" not in state:
        return "it does not say how many steps and ranks"
    if _STEP.fullmatch(path.name) and step_of(path) != state["step"]:
        return f"it is of step {state['step']}"
    for shapes in (state.get("shapes"), state.get("buffers", {})):
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            return "its shapes are none"
    return None


def _is_shape(value: Any) -> bool:
    whole = isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
    return whole and math.prod(value) < _MOST_ELEMENTS


def _elements(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def candidates(folder: Path, resume: str) -> Iterator[Path]:
    """Checkpoints to try, best first, for `--resume auto|never|PATH`.

    PATH is a checkpoint, a folder of them, or a run folder.

    Raises:
        ConfigError: a path was named and holds no complete checkpoint.
    """
    if resume == "never":
        return
    if resume == "auto":
        yield from reversed(complete_checkpoints(folder))
        return
    path = Path(resume)
    if not (path / "complete.json").is_file():
        inside = complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")
        if not inside:
            raise ConfigError(f"--resume {resume}: no complete checkpoint there (no complete.json)")
        path = inside[-1]
    yield path
