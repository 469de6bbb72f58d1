"""Uploading an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import glob
import importlib.util
from pathlib import Path
from typing import NamedTuple

from m3i_scale.transfer.export import WEIGHTS
from m3i_scale.transfer.folder import ONNX


class File(NamedTuple):
    """A file that goes to the Hub."""

    name: str  # relative to the folder, with slashes
    size: int  # bytes


def files_of(folder: Path) -> list[File]:
    """The files of an exported folder, hidden ones left out, in the order of their names.

    Raises:
        ValueError: `m3i export` did not write the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; make one with m3i export --format ...")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder): path for path in paths}
    files = [
        File(name.as_posix(), path.stat().st_size)
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    ]
    have = {file.name for file in files}
    if "README.md" not in have or not have & {WEIGHTS, ONNX}:
        raise ValueError(
            f"{folder} is no exported folder: it needs README.md and {WEIGHTS} or {ONNX}; make one "
            "with m3i export --format ..."
        )
    return files


def require_repository(name: str) -> None:
    """Raise ValueError unless `name` is OWNER/NAME as the Hub allows it."""
    _require_hub()
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1:
        raise ValueError(f"repository {name!r}: write OWNER/NAME")
    validate_repo_id(name)  # its error is a ValueError in one sentence


def push(folder: Path, repository: str, files: list[File], *, private: bool = False) -> str:
    """Upload files of a folder, making the repository if there is none. Returns its address.

    Raises:
        ValueError: huggingface_hub is not installed, there is no token, or the Hub refuses.
    """
    require_repository(repository)
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise ValueError(
            "there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token that "
            "may write; --dry-run shows without one what would go"
        )
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(file.name) for file in files],
            commit_message="Upload with m3i push",
        )
    except Exception as error:  # the client lets through errors of its HTTP library
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{repository}: the upload did not succeed ({reason}); files that have arrived are not "
            "sent again by the same command"
        ) from error
    return str(address)


def _require_hub() -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError("m3i push needs huggingface_hub: pip install huggingface_hub")
