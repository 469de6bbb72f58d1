"""One safetensors file per model, written piece by piece from a sharded checkpoint.

The format (github.com/huggingface/safetensors): 8 bytes, little-endian, the length of the header;
the header, JSON padded with spaces, `{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`;
then the tensors without gaps, in the order of their offsets. All offsets follow from the shapes, so
the header is written first and the weights pass through memory in pieces of a few megabytes,
whatever the size of the model or of its largest tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3i_scale.config import Config
from m3i_scale.models.backbone import Backbone, build_backbone
from m3i_scale.models.weights import load_published, load_weights
from m3i_scale.transfer.loading import Weights, Which, stored_kinds

Part = Literal["backbone", "all"]
BACKBONE = "student.backbone."
PIECE = 1 << 22  # elements that are in memory at once: 16 MB in fp32
_DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16")}


class Entry(NamedTuple):
    """One tensor of the file."""

    kind: str  # where the checkpoint has it
    name: str  # what the checkpoint calls it
    shape: list[int]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


def export(
    weights: Weights,
    config: Config,
    path: str | os.PathLike[str],
    *,
    which: Which = "student",
    part: Part = "backbone",
    dtype: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write one model of a checkpoint to a safetensors file.

    Tensors of the backbone have the published names (those of `InternImage` or `ViT`); with
    part="all" all networks are there under the names of `m3i_scale.objective.m3i.M3I`. The metadata
    holds, as JSON, the backbone's name and options and the whole configuration of the run.

    Args:
        weights: the checkpoint.
        config: of the run.
        path: the file to write; it appears complete or not at all.
        which: "student", or "teacher" for the averages of the image encoder.
        part: "backbone", or "all" networks.
        dtype: "fp32" as stored, or "bf16", rounded to nearest.
        progress: called with the number of bytes after each piece.

    Raises:
        ValueError: the run has no averages, the checkpoint no backbone, or the folder is missing.
        OSError: the file cannot be written.
    """
    entries = _entries(weights, config, which, part)
    kind, code = _DTYPES[dtype]
    header = _header(entries, code, kind.itemsize, _metadata(weights, config, which, part))
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for entry in entries.values():
                for piece in _pieces(weights, entry):
                    progress(_write(file, piece.to(kind)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def size(weights: Weights, config: Config, *, part: Part = "backbone", dtype: str = "fp32") -> int:
    """Bytes of tensors that `export` will write."""
    entries = _entries(weights, config, "student", part)
    return sum(entry.elements for entry in entries.values()) * _DTYPES[dtype][0].itemsize


def load_backbone(path: str | os.PathLike[str]) -> Backbone:
    """Build the backbone that an exported file describes, with its weights, in float32.

    The pooling keeps its initialisation where the file has none: a run whose targets are all dense
    does not train it.

    Raises:
        ValueError: the file is not one that `export` wrote with part="backbone", or does not fit.
    """
    metadata = read_metadata(path)
    if metadata.get("part") != "backbone":
        raise ValueError(
            f"{path} does not describe a backbone; write it with `m3i export --part backbone`"
        )
    description = json.loads(metadata["backbone"])
    backbone = build_backbone(description["name"], **description["options"])
    state = {name: tensor.float() for name, tensor in load_published(path).items()}
    load_weights(backbone, state, fresh=_untrained(backbone, state))  # type: ignore[arg-type]
    return backbone


def _untrained(backbone: Backbone, state: Mapping[str, Tensor]) -> list[str]:
    """The pooling, where the run never trained it: its objective had dense targets only."""
    modules = backbone.named_modules()  # type: ignore[attr-defined]
    (name,) = (name for name, module in modules if module is backbone.pooling)
    return [] if any(key.startswith(f"{name}.") for key in state) else [name]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, empty if it has none.

    Raises:
        ValueError: it is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


def _entries(weights: Weights, config: Config, which: Which, part: Part) -> dict[str, Entry]:
    """The tensors of the file by their names in it."""
    prefix = BACKBONE if part == "backbone" else ""
    shapes = {name: shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
    if not shapes:
        raise ValueError(f"{weights.path} holds no parameter named {prefix}*")
    kinds = stored_kinds(shapes, which, has_teacher=config.objective.has_teacher)
    return {
        name.removeprefix(prefix): Entry(kinds[name], name, list(shape))
        for name, shape in shapes.items()
    }


def _metadata(weights: Weights, config: Config, which: Which, part: Part) -> dict[str, str]:
    return {
        "format": "pt",
        "part": part,
        "which": which,
        "step": str(weights.state["step"]),
        "backbone": json.dumps(config.model.backbone.model_dump(mode="json")),
        "config": json.dumps(config.model_dump(mode="json")),
    }


def _header(
    entries: Mapping[str, Entry], code: str, itemsize: int, metadata: Mapping[str, str]
) -> bytes:
    content: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.elements * itemsize
        content[name] = {"dtype": code, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _pieces(weights: Weights, entry: Entry) -> Iterator[Tensor]:
    for start in range(0, entry.elements, PIECE):
        yield weights.slice(entry.kind, entry.name, start, min(start + PIECE, entry.elements))


def _write(file: BinaryIO, piece: Tensor) -> int:
    return file.write(piece.contiguous().view(torch.uint8).numpy().data)
