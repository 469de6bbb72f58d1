"""Reading published weights by name. Reading never executes a file's content."""

import contextlib
import io
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Where `.pth` files keep the weights, and the prefix of each name in files from the Hub.
WEIGHT_KEYS = ("model", "module")
HUB_PREFIX = "model."
_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}
_LONGEST_NAME = 300  # letters of a class
_PICKLES = 5  # before the tensors in a file of the older format
_LONGEST_PICKLES = 1 << 26  # bytes at the beginning of a file of the older format
_MOST_UNPACKED = 4  # bytes of an archive, for each of the file
# What Hub files call the layer scale of a block, with which the names of `InternImage` come back.
_HUB_SCALE = re.compile(r"\.layer_scale([12])$")


def hub_name(name: str) -> str:
    """What a Hub file calls the tensor that `InternImage` calls `name`."""
    return HUB_PREFIX + re.sub(r"\.gamma([12])$", r".layer_scale\1", name)


def plain_name(name: str) -> str:
    """What `InternImage` calls the tensor `name` of a Hub file: `hub_name` the other way."""
    return _HUB_SCALE.sub(r".gamma\1", name.removeprefix(HUB_PREFIX))


def load_published(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict of a published InternImage, on the CPU, under the names of `InternImage`.

    `.safetensors` files and `.pth`, `.pt`, `.bin` files (weights under `model` or `module`, or
    bare) are read; names of Hub files become those of `InternImage`. Raises ValueError for
    anything else, including pickles that hold more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}: there is no such file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return {plain_name(name): value for name, value in state.items()}


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, fresh: Sequence[str] = ()
) -> list[str]:
    """Copy `state` into `model`, strictly but for the submodules named in `fresh`.

    `fresh` lists dotted names of submodules, `("head", "fc_norm")` say, for which the file may have
    tensors that are missing, superfluous or of another shape: what does not fit is left out and
    keeps its initialisation. Returns the names in `model` that did so. Raises ValueError, before
    anything is copied, listing every other name that is missing, unexpected or of another shape.
    """
    require_fit(model, state, fresh=fresh)
    own = model.state_dict()
    fits = {name for name in state if name in own and state[name].shape == own[name].shape}
    model.load_state_dict({name: state[name] for name in fits}, strict=False)
    return [name for name in own if name not in fits]


def require_fit(
    model: nn.Module, state: Mapping[str, Tensor], *, fresh: Sequence[str] = ()
) -> None:
    """Raise ValueError as `load_weights`; the model may be on the meta device."""
    own = model.state_dict()
    fits = {name for name in state if name in own and state[name].shape == own[name].shape}
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in state
            if name in own and name not in fits
        ],
    }
    _raise_faults(
        {kind: [n for n in names if not _under(n, fresh)] for kind, names in faults.items()}
    )


def _under(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _raise_faults(faults: Mapping[str, Sequence[str]]) -> None:
    lines = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in faults.items() if names]
    if lines:
        raise ValueError("weights do not fit the model; " + "; ".join(lines))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _refuse_long_names(path: Path) -> None:
    """Refuse pickles that name a class of thousands of letters, which only damaged ones do.

    torch looks through the name again and again for its message: minutes for a few kilobytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            streams: list[BinaryIO] = [io.BytesIO(archive.read(name)) for name in names]
    except (OSError, ValueError, NotImplementedError, zlib.error, zipfile.BadZipFile):
        streams = [io.BytesIO(path.read_bytes()[:_LONGEST_PICKLES])]  # several, one by one
    longest = max(map(_longest_name, streams), default=0)
    if longest > _LONGEST_NAME:
        raise ValueError(f"{path} is damaged: it names a class of {longest:,} letters")


def _longest_name(stream: BinaryIO) -> int:
    """Bytes of the longest line that names a class in the pickles at a stream's beginning."""
    longest = pickles = 0
    with contextlib.suppress(Exception):  # damaged: the reader says so
        while pickles < _PICKLES:
            operation = _OPERATIONS[stream.read(1).decode("latin-1")]
            pickles += operation.name == "STOP"
            if operation.name in ("GLOBAL", "INST"):  # pickletools would decode the lines
                longest = max(longest, len(stream.readline()), len(stream.readline()))
            elif operation.arg is not None:
                operation.arg.reader(stream)
    return longest


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to far more than it weighs: `torch.save` packs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # the older format, or damaged, which the reader says
    if size > _MOST_UNPACKED * path.stat().st_size:
        raise ValueError(
            f"{path} unpacks to {size:,} bytes, more than {_MOST_UNPACKED} times its own; weights "
            "do not pack so well: fetch it again from where it comes from"
        )


def _read_torch(path: Path) -> dict[str, Tensor]:
    _refuse_bomb(path)
    _refuse_long_names(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the restricted reader raises depends on the bytes it meets
        # torch's own message tells how to load such a file all the same: not to be passed on.
        raise ValueError(
            f"{path} cannot be read as plain tensors: it is damaged, no file of weights, or holds "
            "other objects, which are refused, since loading them would run code; name a "
            ".safetensors file, or a .pth file with nothing but a state dict"
        ) from error
    for key in WEIGHT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise ValueError(f"{path} holds no state dict, neither bare nor under {WEIGHT_KEYS}")
    return dict(content)
