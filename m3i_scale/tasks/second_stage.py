"""A stage of pre-training that starts from another: all its networks, at another image size, say.

`model.init` names the run. Weights go on (student, teacher's averages, decoders, text tower, heads,
temperatures); optimiser, schedule, stream, queues and running centres begin anew. What depends on
the grid of patches is rescaled, and a configuration that would not do so is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_scale.config import Config, ConfigError, load_config
from m3i_scale.engine import lineage
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.state import parameter_shapes
from m3i_scale.integrations import initial
from m3i_scale.integrations.folders import Entry, Stored
from m3i_scale.objective.m3i import M3I

BACKBONE = "student.backbone."
# Modules that hold several parts, each of which is there or not by itself.
_HOLDERS = {"student", "decoders", "linear_decoders", "frozen_heads", "temperatures"}
_ANEW = (
    "begin anew: the optimiser's moments and schedule, the stream of samples, lambda, queues of "
    "keys and running centres"
)


@dataclass(frozen=True)
class FirstStage:
    """The checkpoint of another run, checked against the networks of this one and not yet read.

    source     as the configuration says it
    reader     the checkpoint
    names      parameters that start from it
    new        parameters that it does not have
    left       its parameters that this run does not have
    has_teacher whether it has averages
    notes      what else to know, sentence by sentence
    """

    source: str
    reader: CheckpointReader
    names: Sequence[str]
    new: Sequence[str]
    left: Sequence[str]
    has_teacher: bool
    notes: Sequence[str]

    def part(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """As `engine.task.InitialWeights`; without averages they start as the student."""
        kind = kind if self.has_teacher else "weight"
        return self.reader.slice(kind, name, start, stop)

    def lines(self) -> list[str]:
        """The report of what goes on, what is new and what begins anew."""
        sizes = [torch.Size(self.reader.shapes[name]).numel() for name in self.names]
        lines = [
            f"loaded {len(sizes)} tensors, {sum(sizes) / 1e6:.3f} M weights of step "
            f"{self.reader.state['step']} ({self.reader.path})"
        ]
        lines += [f"new: {_counted(self.new)}"] if self.new else []
        lines += [f"left out: {_counted(self.left)}"] if self.left else []
        return [*lines, *self.notes]

    def record(self) -> dict[str, Any]:
        """The same for a file, with the lineage of the checkpoint and the digests of its files."""
        path = self.reader.path
        listed = json.loads((path / "complete.json").read_text())["files"]
        line = lineage.of_checkpoint(path)
        return {
            "init": self.source,
            "checkpoint": str(path),
            "step": self.reader.state["step"],
            "samples": self.reader.state["position"],
            "lineage": None if line is None else line.as_json(),
            "sha256": {str(path / entry["file"]): entry["sha256"] for entry in listed},
            "loaded": sorted(self.names),
            "new": list(self.new),
            "left": list(self.left),
            "notes": list(self.notes),
        }


def open_first_stage(config: Config, networks: M3I, reader: CheckpointReader) -> FirstStage:
    """Check a checkpoint of another run against this one's networks, on the meta device.

    Raises:
        ConfigError: it does not fit, or the positions would not be those it was trained on.
    """
    source = config.model.init
    assert source is not None
    try:
        first = _configuration(reader)
        notes = [
            *_fit_backbone(source, config, first, reader),
            *_positions(config, first, networks),
        ]
        own, stored = parameter_shapes(networks), reader.shapes
        _require_same(_heads(config, own), _heads(first, stored), reader.path)
        new, left = _fit(own, stored, reader.path)
    except ValueError as error:
        raise ConfigError(f"model.init: {error}") from error
    notes += _text_notes(config, first)
    has_teacher = first.objective.has_teacher
    if config.objective.has_teacher and not has_teacher:
        notes.append("it has no teacher: the averages start as the student")
    names = [name for name in own if name in stored]
    return FirstStage(source, reader, names, new, left, has_teacher, [*notes, _ANEW])


def _configuration(reader: CheckpointReader) -> Config:
    path = reader.path.parent.parent / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"there is no {path}, which says what it was trained as; name the run's "
            "own folder, or copy its config.yaml there"
        )
    return load_config(path)


def _fit_backbone(
    source: str, config: Config, first: Config, reader: CheckpointReader
) -> Iterator[str]:
    """Require the backbone to be of the same options; notes. ValueError if it is not."""

    def entry(name: str) -> Entry:
        return Entry(tuple(reader.shapes[name]), lambda: reader.tensor("weight", name))

    entries = {
        name.removeprefix(BACKBONE): entry(name)
        for name in reader.shapes
        if name.startswith(BACKBONE)
    }
    described = {"backbone": first.model.backbone.model_dump_json()}
    yield from initial.check(
        source, Stored(reader.path, entries, metadata=described), config.model
    ).notes


# ---------------------------------------------------------------------------------- the other parts


def part_of(name: str) -> str:
    """The part of the networks that a parameter belongs to: a whole is there or not."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in _HOLDERS else first


def _fit(
    own: Mapping[str, list[int]], stored: Mapping[str, list[int]], path: Path
) -> tuple[list[str], list[str]]:
    """What is new and what is left out; ValueError where a part has other parameters."""
    new = [name for name in own if name not in stored]
    left = [name for name in stored if name not in own]
    shared = {part_of(name) for name in own} & {part_of(name) for name in stored}
    shared -= {BACKBONE.rstrip(".")}  # `initial.check` has compared it
    differing = [name for name in (*new, *left) if part_of(name) in shared]
    differing += [name for name in own if name in stored and own[name] != stored[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} does not fit: {len(differing)} parameters differ, for instance {name} is "
            f"{stored.get(name, 'absent')} there and {own.get(name, 'absent')} here; set model to "
            "the networks of that run"
        )
    return new, left


def _heads(config: Config, names: Iterable[str]) -> dict[str, int]:
    """Attention heads of the parts that there are, which no shape shows."""
    parts = {name.partition(".")[0] for name in names}
    found = {"model.decoder.heads": config.model.decoder.heads} if "decoders" in parts else {}
    if "text_tower" in parts and config.model.text is not None:
        found["model.text.heads"] = config.model.text.heads
    return found


def _require_same(own: Mapping[str, int], stored: Mapping[str, int], path: Path) -> None:
    for key in own.keys() & stored.keys():
        if own[key] != stored[key]:
            raise ValueError(
                f"{path} was trained with {key}={stored[key]}; set {key}={stored[key]}"
            )


def _text_notes(config: Config, first: Config) -> Iterator[str]:
    own, stored = config.model.text, first.model.text
    if own is not None and stored is not None and own.tokenizer != stored.tokenizer:
        yield f"its texts were read by the tokenizer {stored.tokenizer}: see that it is the same"


def _counted(names: Sequence[str]) -> str:
    counts = Counter(part_of(name) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in counts.items())


# ---------------------------------------------------------------------------------------- positions


def _positions(config: Config, first: Config, networks: M3I) -> Iterator[str]:
    """Require that positions are counted in the grid of the first stage, or on purpose in another.

    Raises:
        ValueError: nothing says so; the settings are named.
    """
    stride, now = networks.stride, networks.grid[0]
    before = first.data.image_size // stride
    said: dict[str, tuple[int | None, int]] = {}
    if any(part_of(name).startswith("decoders.") for name, _ in networks.named_parameters()):
        own, trained = config.model.decoder.position_grid, first.model.decoder.position_grid
        said["model.decoder.position_grid"] = own, trained or before
    if hasattr(networks.student.backbone, "position_grid"):
        options, stored = config.model.backbone.options, first.model.backbone.options
        trained = stored.get("position_grid") or before
        said["model.backbone.options.position_grid"] = options.get("position_grid"), trained
    unsaid = [
        f"{key}={trained}" for key, (own, trained) in said.items() if own is None and trained != now
    ]
    if unsaid:
        raise ValueError(
            f"{config.model.init} was trained on {before} x {before} patches and this run has "
            f"{now} x {now}; set {' '.join(unsaid)}, so that positions are rescaled"
        )
    if first.data.image_size != config.data.image_size:
        yield f"images of {config.data.image_size} pixels, before {first.data.image_size}"
    for key, (own, trained) in said.items():
        side = own or now
        if side != now:
            yield f"{key}: positions of {now} x {now} patches are laid over {side} x {side}"
        if side != trained:
            yield f"{key} is {side}, and it was trained on {trained}"
