"""Weights in a file, a folder or on the Hub, read tensor by tensor; nothing in them is executed.

Known are safetensors (one file, or several with an index), files of `torch.save` that hold tensors
only, and beside them a config.json. On the Hub a name is OWNER/NAME, or OWNER/NAME@REVISION.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3i_scale.models.weights import load_published

INDEX = "model.safetensors.index.json"
# In the order in which they are preferred.
NAMES = ("model.safetensors", INDEX, "pytorch_model.bin")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Entry(NamedTuple):
    """One tensor that can be read."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass
class Stored:
    """Weights somewhere, none of them read yet.

    path       the file or folder, for messages
    entries    the tensors by the names that they have there
    config     config.json beside them; empty without one
    metadata   of a safetensors file
    files      what was opened
    """

    path: Path
    entries: Mapping[str, Entry]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def open_weights(source: str, also: Sequence[str] = ()) -> Stored:
    """Find the weights that a path or a name on the Hub means.

    Args:
        source: the path or name.
        also: names of further files that a repository of the Hub may have.

    Raises:
        ValueError: there are none, or they cannot be read without executing something.
    """
    path = Path(source)
    if not path.exists():
        if not HUB_NAME.fullmatch(source):
            raise ValueError(
                f"there is no file or folder {source}, and it is no name on the Hub (OWNER/NAME)"
            )
        path = _download(source, also)
    if path.is_file():
        return _open_files(path, [path], {})
    return _open_folder(path)


def _open_folder(folder: Path) -> Stored:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    found = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if found is None:
        files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth", ".bin"))
        if len(files) != 1:
            run = "; of a run, export the backbone first (m3i export)"
            raise ValueError(
                f"{folder} holds {len(files)} files of weights and none of {', '.join(NAMES)}"
                f"{run if (folder / 'checkpoints').is_dir() else '; name the file'}"
            )
        found = files[0]
    if found.name != INDEX:
        return _open_files(folder, [found], config)
    parts = read_json(found).get("weight_map")
    if not isinstance(parts, dict) or not all(_is_plain(name) for name in parts.values()):
        raise ValueError(f"{found} has no weight_map of file names in this folder")
    return _open_files(folder, [folder / name for name in sorted(set(parts.values()))], config)


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _open_files(path: Path, files: list[Path], config: dict[str, Any]) -> Stored:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            more, metadata = _open_safetensors(file)
        else:
            more = {name: _held(value) for name, value in load_published(file).items()}
        entries |= more
    if not entries:
        raise ValueError(f"{path} holds no tensor")
    return Stored(path, entries, config, metadata, files)


def _held(value: Tensor) -> Entry:
    return Entry(tuple(value.shape), lambda: value)


def _open_safetensors(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error})") from None

    def entry(name: str) -> Entry:
        shape = tuple(opened.get_slice(name).get_shape())
        return Entry(shape, lambda: opened.get_tensor(name))

    return {name: entry(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; ValueError where it does not."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def _download(source: str, also: Sequence[str]) -> Path:
    """Fetch config.json and the weights of a repository to the Hub's cache; the folder there."""
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = source.partition("@")
    try:
        there = set(HfApi().list_repo_files(name, revision=revision or None))
        chosen = next((file for file in NAMES if file in there), None)
        wanted = ["config.json", *also, *([chosen] if chosen else [])]
        if chosen == INDEX:
            wanted.append("*.safetensors")
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # of the network, the Hub or the cache; none is the program's
        try:
            return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        except Exception:
            raise ValueError(
                f"there is no file or folder {source}, and the Hub does not give it: "
                f"{str(error).splitlines()[0]}; where nodes have no network, download it before"
            ) from None
