"""Finding the samples of a tar shard by the WebDataset convention.

Consecutive members whose names agree up to the first dot of the last path component are one
sample; what follows that dot is the member's kind.  Example, as img2dataset writes shards:

    000000017.jpg  000000017.json  000000017.txt     -> key 000000017: jpg, json, txt

A shard in which that finds no image at all has dots in its keys, and is split at the last dot.

Only headers are read.  A damaged header costs its own member: the scan goes on at the next block
that is a valid header again, where a sequential tar reader would lose the rest of the shard.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from webdataset.tariterators import base_plus_ext

from m3i_scale.data.index import ShardIndex, check_of, header_identity

IMAGE = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif")
TEXT = ("txt", "caption", "text")
TEXT_JSON = ("json:caption", "json:text")
CATEGORY = ("cls", "class", "label")
CATEGORY_JSON = ("json:cls", "json:label", "json:category", "json:class")
BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 1 << 16
_LONGEST_JSON = 1 << 20
_LARGEST_MEMBER = 1 << 28  # 256 MiB: a sample is read as a whole


class Member(NamedTuple):
    """A tar member: its name and the range of its data; name "" for a damaged header."""

    name: str
    offset: int
    size: int
    header: bytes = b""  # its header_identity


def read_members(file: IO[bytes], length: int) -> Iterator[Member]:
    """Yield the regular files of a tar of `length` bytes in order, and one "" per damaged run."""
    offset, override, damaged = 0, dict[str, str](), False
    while offset + BLOCK <= length:
        file.seek(offset)
        block = file.read(BLOCK)
        if not any(block) and not any(file.read(BLOCK)):
            return  # end-of-archive marker: two empty blocks; a single one is damage
        info = parse_header(block)
        if info is None:
            if not damaged:
                yield Member("", offset, 0)
            offset, damaged = offset + BLOCK, True
            continue
        damaged = False
        size = int(override.get("size", info.size))
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            override = {**override, **_long_fields(info.type, file.read(min(size, _LONGEST_NAME)))}
        else:
            if info.type in tarfile.REGULAR_TYPES and info.type != tarfile.GNUTYPE_SPARSE:
                name = override.get("path", info.name)
                yield Member(name, offset + BLOCK, size, header_identity(block))
            override = {}
        offset += BLOCK + -(-size // BLOCK) * BLOCK


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """The header in a 512-byte block, or None where its checksum or its fields are wrong."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _long_fields(kind: bytes, data: bytes) -> dict[str, str]:
    """Path and size from a pax extended header ("<length> key=value" lines) or a GNU long name."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "backslashreplace")}
    found = {}
    while b" " in data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or len(digits) > 9 or int(digits) <= len(digits):
            break
        record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        key, _, value = record.partition(b"=")
        text = value.decode("utf-8", "backslashreplace")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 19):
            found[key.decode()] = text
    return found


@dataclass
class Group:
    """The members of one sample by kind (lower case, without the dot)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    repeated: bool = False

    def image(self) -> Member | None:
        """The image member, if any."""
        return next((self.members[kind] for kind in IMAGE if kind in self.members), None)

    def of(self, member: str | None) -> Member | None:
        """The tar member behind a name such as `txt` or `json:caption`."""
        return self.members.get(member.split(":")[0]) if member else None


def find_groups(file: IO[bytes], length: int) -> list[Group]:
    """The samples of an open tar of `length` bytes."""
    members = list(read_members(file, length))
    groups = list(group_members(members, base_plus_ext))
    if any(group.image() for group in groups):
        return groups
    dotted = list(group_members(members, _split_at_last_dot))
    return dotted if any(group.image() for group in dotted) else groups


def _split_at_last_dot(name: str) -> tuple[str | None, str | None]:
    key, dot, kind = name.rpartition(".")
    return (key, kind) if dot and key and "/" not in kind else (None, None)


def group_members(
    members: Iterable[Member], split: Callable[[str], tuple[str | None, str | None]]
) -> Iterator[Group]:
    """Group consecutive members by key; a damaged header ends a sample and is one without key."""
    group: Group | None = None
    for member in members:
        key, kind = split(member.name) if member.name else ("", "")
        if key is None or kind is None or key.startswith("__"):
            continue
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(key)
        group.repeated |= kind.lower() in group.members
        group.members.setdefault(kind.lower(), member)
    if group is not None:
        yield group


@dataclass(frozen=True)
class Wanted:
    """What a sample must have, and under which member; None: what the shard itself offers."""

    text: bool
    category: bool
    text_member: str | None = None  # e.g. "txt", "json:caption"
    category_member: str | None = None  # e.g. "cls", "json:label"


def wanted_for(
    kind: str, text_member: str | None = None, category_member: str | None = None
) -> Wanted:
    """What samples of a source of `kind` text, category or both must have."""
    if kind not in ("text", "category", "both"):
        raise ValueError(f"kind is {kind!r}: it must be 'text', 'category' or 'both'")
    return Wanted(kind != "category", kind != "text", text_member, category_member)


def index_shard(name: str, file: IO[bytes], length: int, wanted: Wanted) -> ShardIndex:
    """Index one open shard of `length` bytes; damage is recorded in `problems`, never raised."""
    groups = find_groups(file, length)
    index = ShardIndex(name, length)
    if wanted.text:
        index.text_member = wanted.text_member or _offered(groups, TEXT, TEXT_JSON, file)
    if wanted.category:
        chosen = wanted.category_member or _offered(groups, CATEGORY, CATEGORY_JSON, file)
        index.category_member = chosen
    if not groups:
        index.problems.append({"key": "", "cause": "no member"})
    seen: set[str] = set()
    for group in groups:
        cause = _problem(group, index, wanted)
        if cause is None and group.key in seen:
            cause = "repeated key"
        seen.add(group.key)
        if cause is None:
            _append(index, group)
        else:
            index.problems.append({"key": group.key, "cause": cause})
    return index


def _offered(
    groups: list[Group], kinds: tuple[str, ...], fields: tuple[str, ...], file: IO[bytes]
) -> str | None:
    """The member most samples have among `kinds`; failing those, a known field of their JSON."""
    counts = Counter(kind for group in groups for kind in kinds if kind in group.members)
    if counts:
        return counts.most_common(1)[0][0]
    for group in [group for group in groups if "json" in group.members][:20]:
        member = group.members["json"]
        file.seek(member.offset)
        try:
            document = json.loads(file.read(min(member.size, _LONGEST_JSON)))
        except (ValueError, RecursionError):
            continue
        for name in fields:
            if isinstance(document, dict) and document.get(name.split(":")[1]) is not None:
                return name
    return None


def _problem(group: Group, index: ShardIndex, wanted: Wanted) -> str | None:
    """Why a sample cannot be used, or None."""
    if not group.key:
        return "corrupt tar header"
    used = [group.image()]
    if used[0] is None:
        return "no image"
    if wanted.text:
        used.append(group.of(index.text_member))
    if wanted.category:
        used.append(group.of(index.category_member))
    if None in used:
        missing = index.text_member if wanted.text and used[1] is None else index.category_member
        return f"no {missing or ('caption' if wanted.text else 'category')}"
    if any(member.size == 0 for member in used if member):
        return "empty member"
    if any(member.offset + member.size > index.bytes for member in used if member):
        return "truncated"
    if any(member.size > _LARGEST_MEMBER for member in used if member):
        return "absurd size"
    return "repeated member" if group.repeated else None


def _append(index: ShardIndex, group: Group) -> None:
    chosen = {
        "image": group.image(),
        "text": group.of(index.text_member),
        "category": group.of(index.category_member),
    }
    for name, member in chosen.items():
        if member is not None:
            getattr(index, f"{name}_offset").append(member.offset)
            getattr(index, f"{name}_size").append(member.size)
    index.check.append(check_of(member.header for member in chosen.values() if member))
