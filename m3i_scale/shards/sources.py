"""Paths as people write them -> files: {000..127}, globs, folders, typos."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand
from fsspec.core import split_protocol

from m3i_scale.data.storage import StorageClient, is_local, local_path, parent
from m3i_scale.shards.groups import is_hidden

_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")
_CHAINS = ("zip", "tar", "simplecache", "filecache", "blockcache", "libarchive")


def find_files(
    patterns: Sequence[str], endings: Sequence[str], storage: StorageClient
) -> list[str]:
    """Paths and URLs of the files that `patterns` name, each once, in the order of the patterns.

    A pattern is a path or URL, a folder (of files with one of `endings`, or below it where it has
    none itself), a glob, or has braces as in WebDataset: `s3://b/{000..127}.tar`, `{a,b}/*.tar`,
    `one/{0..3}.tar::two/{0..5}.tar`.  What exists by the letter is taken by the letter.

    Raises:
        ValueError: a pattern names nothing, or a compressed tar; the message says what is there.
    """
    found = [
        url
        for pattern in patterns
        for part in _expand(str(pattern))
        for url in _matches(part, endings, storage)
    ]
    compressed = next((url for url in found if url.endswith(_COMPRESSED)), None)
    if compressed:
        raise ValueError(
            f"{compressed} is compressed: samples are read by offset, so unpack it to a .tar"
        )
    return list(dict.fromkeys(found))


def _expand(pattern: str) -> Iterator[str]:
    """The parts of a pattern, as webdataset.shardlists.expand_urls cuts and expands it."""
    if pattern.startswith("pipe:") or (is_local(pattern) and os.path.lexists(local_path(pattern))):
        yield pattern
        return
    chained = split_protocol(pattern)[0] in _CHAINS
    for part in [pattern] if chained else pattern.split("::"):
        if "{" not in part:
            yield part
            continue
        try:
            yield from list(braceexpand(part))
        except ValueError:
            raise ValueError(
                f"{part}: the braces do not match; write {{000..127}} or {{a,b}}, in quotes"
            ) from None


def _matches(url: str, endings: Sequence[str], storage: StorageClient) -> list[str]:
    storage.check(url)
    if is_local(url):
        return _local_matches(url, endings, storage)
    if any(character in url for character in "*?["):
        found = storage.glob(url)
    elif url.endswith("/"):
        found = [name for name in storage.glob(f"{url}*") if name.endswith(tuple(endings))]
    else:
        return [url]
    if not found:
        raise ValueError(f"no shard matches {url}: see what is in {parent(url.rstrip('/'))}")
    return found


def _local_matches(url: str, endings: Sequence[str], storage: StorageClient) -> list[str]:
    path = local_path(url)
    if os.path.isdir(path):
        return _in_folder(path, endings)
    if os.path.lexists(path):
        return [url]
    if any(character in path for character in "*?["):
        found = [name for name in storage.glob(_escape(path)) if not os.path.isdir(name)]
        if not found:
            raise ValueError(f"no shard matches {url}: {_what_is_there(path)}")
        return found
    return [url]


def _in_folder(folder: str, endings: Sequence[str]) -> list[str]:
    """The files with one of `endings` in a folder; if there are none, those below it."""
    wanted = tuple(endings)
    for pattern in ("*", "**/*"):
        names = sorted(glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True))
        found = [n for n in names if n.endswith(wanted) and not is_hidden(n[len(folder) :])]
        if found:
            return found
    there = _what_is_there(os.path.join(folder, "*"))
    raise ValueError(f"{folder} is a folder without {' or '.join(endings)} files: {there}")


def _escape(path: str) -> str:
    """`path` with the special characters escaped in its leading folders that exist as written."""
    done, parts = "", path.split("/")
    for number, part in enumerate(parts):
        literal = "/".join(parts[: number + 1])
        if number + 1 < len(parts) and (not literal or os.path.lexists(literal)):
            done += glob.escape(part) + "/"
        else:
            return done + "/".join(parts[number:])
    return done


def missing(url: str) -> str:
    """Why there is nothing at `url`, in words: the nearest name beside it."""
    return _what_is_there(local_path(url)) if is_local(url) else "check the address"


def _what_is_there(path: str) -> str:
    folder = os.path.dirname(path) or "."
    while any(c in os.path.basename(folder) for c in "*?[") and not os.path.lexists(folder):
        folder = os.path.dirname(folder) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    names = sorted(os.listdir(folder))
    near = difflib.get_close_matches(os.path.basename(path), names, n=1, cutoff=0.6)
    if near:
        return f"the nearest name in {folder} is {near[0]}"
    if not names:
        return f"{folder} is empty"
    return f"{folder} holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"


def check_name(path: str) -> str:
    """Return `path`; refuse one whose name is not UTF-8, which no index can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the path {os.fsencode(path)!r} is not UTF-8: rename it (for example with convmv)"
        ) from None
    return path


def last_change(url: str) -> int:
    """Time of the last change of a local file in ns; 0 of what is remote or not there."""
    try:
        return Path(local_path(url)).stat().st_mtime_ns if is_local(url) else 0
    except OSError:
        return 0
