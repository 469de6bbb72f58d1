"""Writing tensors of a checkpoint to a safetensors file, piece by piece.

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
from torch import Tensor

from m3i_scale.transfer.loading import Weights

Dtype = Literal["fp32", "bf16"]
PIECE = 1 << 22  # elements that are in memory at once: 16 MB in fp32
_DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16")}


class Entry(NamedTuple):
    """A tensor of the file that is a tensor of the checkpoint, or consecutive rows of one."""

    kind: str  # where the checkpoint has it
    name: str  # what the checkpoint calls it
    shape: list[int]
    start: int = 0  # its first element in the flattened tensor of the checkpoint

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


# The tensors of a file by their names in it: of the checkpoint, or as they are.
Tensors = Mapping[str, Entry | Tensor]


def write(
    path: Path,
    weights: Weights,
    tensors: Tensors,
    *,
    dtype: Dtype,
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a file; it appears complete or not at all.

    Args:
        path: the file to write, in a folder that exists.
        weights: the checkpoint.
        tensors: of the file, in their order.
        dtype: "fp32", or "bf16", rounded to nearest.
        metadata: of the file.
        progress: called with the number of bytes after each piece.

    Raises:
        OSError: the file cannot be written.
    """
    kind, code = _DTYPES[dtype]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(_header(tensors, code, kind.itemsize, metadata))
            for entry in tensors.values():
                for piece in _pieces(weights, entry):
                    progress(_write(file, piece.to(kind)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tensor_bytes(tensors: Tensors, dtype: Dtype) -> int:
    """Bytes of tensors that `write` will write."""
    return sum(map(_elements, tensors.values())) * _DTYPES[dtype][0].itemsize


def _elements(entry: Entry | Tensor) -> int:
    return entry.numel() if isinstance(entry, Tensor) else entry.elements


def _header(tensors: Tensors, code: str, itemsize: int, metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, entry in tensors.items():
        end = offset + _elements(entry) * itemsize
        content[name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _pieces(weights: Weights, entry: Entry | Tensor) -> Iterator[Tensor]:
    if isinstance(entry, Tensor):
        yield from entry.detach().cpu().flatten().split(PIECE)
        return
    stop = entry.start + entry.elements
    for start in range(entry.start, stop, PIECE):
        yield weights.slice(entry.kind, entry.name, start, min(start + PIECE, stop))


def _write(file: BinaryIO, piece: Tensor) -> int:
    return file.write(piece.contiguous().view(torch.uint8).numpy().data)
