"""Finding the samples of a tar shard from its headers, and which of them can be used.

How members form samples is in `groups.py`.  Zeros between headers are skipped, as `tar
--ignore-zeros` does, so that joined tars are read to their end.  A damaged header costs its own
member: the scan goes on at the next block that is a valid header again, where a sequential tar
reader would lose the rest of the shard.

Data are read of labels and of JSON documents only, so that the index knows every category.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, get_args

from m3i_scale.config import SourceKind
from m3i_scale.data import captions, labels
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.index import ShardIndex, check_of, header_identity
from m3i_scale.data.members import (
    LARGEST_MEMBER,
    LARGEST_SAMPLE,
    kinds_of,
    read_places,
    spell_places,
)
from m3i_scale.data.text import read_text
from m3i_scale.shards.groups import Group, Member, group_members, last_part

BLOCK = tarfile.BLOCKSIZE
_RECORD = tarfile.RECORDSIZE  # tars are padded with zeros to a multiple of this
_LARGE_RECORD = 1 << 16  # tar -b 128; larger ones are multiples of it
_LONGEST_END = 2048  # blocks of zeros that a tar of large records may end with
_LONGEST_NAME = 1 << 16
_LARGEST_KEPT = 1 << 20
_MOST_KEPT = 1 << 28  # bytes of labels and JSON documents of one shard
_SKIP = 1 << 20  # zeros are passed over in steps of this many bytes
_JSON_DOCUMENTS = 64  # that are looked at for captions
# A JSON field is preferred to members only if that many more samples have it.
_PREFERENCE = 0.1


def read_members(
    file: IO[bytes], length: int, keep: frozenset[str] = frozenset()
) -> Iterator[Member]:
    """Yield the regular files of a tar of `length` bytes in order, and one "" per damaged run.

    Zeros count as damage where no tar writer puts them: a download with a hole.  The data of small
    members whose name ends in one of `keep` come along.
    """
    offset, first, override, damaged, kept = 0, 0, dict[str, str](), False, 0
    while offset + BLOCK <= length:
        file.seek(offset)
        block = file.read(BLOCK)
        if not any(block):
            after = _skip_zeros(file, offset, length)
            bad = not _may_be_an_end(offset, after, first, length)
            if bad and not damaged:
                yield Member("", offset, 0)
            offset, first, damaged = after, after, damaged or bad
            continue
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
                name, data = override.get("path", info.name), None
                if last_part(name).lower() in keep and size <= min(
                    _LARGEST_KEPT, _MOST_KEPT - kept
                ):
                    data, kept = file.read(size), kept + size
                yield Member(name, offset + BLOCK, size, header_identity(block), data)
            override = {}
        offset += BLOCK + -(-size // BLOCK) * BLOCK


def _skip_zeros(file: IO[bytes], offset: int, length: int) -> int:
    """Offset of the first block from `offset` on that is not zeros, or where none can begin."""
    while offset + BLOCK <= length:
        file.seek(offset)
        chunk = file.read(_SKIP)
        rest = chunk.lstrip(b"\0")
        if rest:
            return offset + (len(chunk) - len(rest)) // BLOCK * BLOCK
        offset += max(len(chunk), BLOCK)
    return length


def _may_be_an_end(offset: int, after: int, first: int, length: int) -> bool:
    """Whether zeros from `offset` to `after` are how a tar that began at `first` may end."""
    blocks, short = (after - offset) // BLOCK, 2 + _RECORD // BLOCK
    if after + BLOCK > length:
        return blocks <= (_LONGEST_END if length % _LARGE_RECORD == 0 else short)
    padded = (after - first) % _RECORD == 0 and blocks <= short
    return blocks >= 2 and (blocks == 2 or padded)


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


def find_groups(file: IO[bytes], length: int, keep: frozenset[str] = frozenset()) -> list[Group]:
    """The samples of an open tar of `length` bytes; for `keep` see `read_members`."""
    return group_members(read_members(file, length, keep))


KEPT = frozenset((*captions.MEMBERS, *labels.MEMBERS, "json"))  # labels, captions and JSON
_KEPT_FOR_CATEGORIES = frozenset((*labels.MEMBERS, "txt", "json"))


@dataclass(frozen=True)
class Wanted:
    """What a sample must have, and under which member; None: what the shard itself offers."""

    text: bool
    category: bool
    text_members: tuple[str, ...] = ()  # e.g. ("txt", "json:caption"): one of them is enough
    category_member: str | None = None  # e.g. "cls", "json:label"
    classes: Mapping[str, int] | None = None  # the class list; None: any name is a class


def wanted_for(
    kind: SourceKind,
    text_member: str | Sequence[str] | None = None,
    category_member: str | None = None,
    classes: Mapping[str, int] | None = None,
) -> Wanted:
    """What samples of a source of `kind` text, category or both must have.

    Raises:
        ValueError: there is no such kind, or a member of captions has no name or is named twice.
    """
    if kind not in get_args(SourceKind):
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(get_args(SourceKind))}")
    texts = (text_member,) if isinstance(text_member, str) else tuple(text_member or ())
    if not all(texts) or len(set(texts)) < len(texts):
        raise ValueError(
            f"captions in {', '.join(texts)}: name each member once, as txt or json:caption"
        )
    return Wanted(kind != "category", kind != "text", texts, category_member, classes)


@dataclass
class Findings:
    """What the scan of a shard says besides its row of the index."""

    largest: int = -1  # integer label
    names: set[str] = field(default_factory=set)  # labels that are class names
    examples: dict[str, str] = field(default_factory=dict)  # of every cause, one sample
    gaps: Counter[str] = field(default_factory=Counter)  # samples without one of several captions

    def note(self, cause: str, key: str, detail: str) -> None:
        """Remember the first sample that has a cause."""
        named = f"sample {key}" if key else ""
        self.examples.setdefault(cause, ", ".join(part for part in (named, detail) if part))


def index_shard(
    name: str, file: IO[bytes], length: int, wanted: Wanted, findings: Findings | None = None
) -> ShardIndex:
    """Index one open shard of `length` bytes; damage is recorded in `problems`, never raised."""
    found = Findings() if findings is None else findings
    kept = _KEPT_FOR_CATEGORIES if wanted.category else frozenset(("json",))
    groups = find_groups(file, length, kept)
    index = ShardIndex(name, length)
    if wanted.text:
        index.text_member = spell_places(wanted.text_members) or _offered_text(groups)
    places = wanted.text_members or read_places(index.text_member, several=False)
    places = places if wanted.text else ()
    if wanted.category:
        index.category_member = wanted.category_member or _offered_category(groups)
    if not groups:
        index.problems.append({"key": "", "cause": "no member"})
        found.note("no member", "", f"{length:,} bytes")
    seen: set[str] = set()
    times = Counter(group.key for group in groups)
    for group in groups:
        cause, detail = _problem(group, index, wanted, places) or (None, "")
        if cause is None and group.key in seen:
            cause = "repeated key"
        if cause is not None and cause.startswith("no ") and times[group.key] > 1:
            cause = APART
        if cause is None and wanted.text:
            gaps = _gaps(group, places)
            cause = next(iter(gaps.values())) if len(gaps) == len(places) else None
        if cause is None and wanted.category:
            cause, detail = _category_problem(group, index, wanted, file, found)
        seen.add(group.key)
        if cause is None:
            _append(index, group, places)
            found.gaps.update(list(_gaps(group, places)))
        else:
            index.problems.append({"key": group.key, "cause": cause})
            found.note(cause, group.key, detail or f"which has {', '.join(sorted(group.members))}")
    return index


APART = "members not side by side"


def _offered_text(groups: list[Group]) -> str | None:
    """The member that holds the captions of most samples, or a field of their JSON."""
    plain = Counter(kind for group in groups for kind in group.texts())
    fields = Counter[str]()
    documents = [d for d in map(_document, groups) if d is not _NOTHING][:_JSON_DOCUMENTS]
    for document in documents:
        if isinstance(document, dict):
            name = captions.caption_field(document)
            fields.update([f"json:{name}"] if name is not None else [])
        elif captions.read_captions(document):
            fields["json"] += 1
    return _choose(plain, fields, len(documents), groups)


def _offered_category(groups: list[Group]) -> str | None:
    """The member that holds the labels of most samples, or a field of their JSON."""
    plain = Counter(kind for group in groups for kind in group.labels())
    fields = Counter[str]()
    documents = [d for d in map(_document, groups) if isinstance(d, dict)][:_JSON_DOCUMENTS]
    for document in documents:
        name = label_field(document)
        fields.update([f"json:{name}"] if name is not None else [])
    return _choose(plain, fields, len(documents), groups)


def _choose(
    plain: Counter[str], fields: Counter[str], documents: int, groups: list[Group]
) -> str | None:
    """The commoner of the best plain member and the best JSON field, the member if in doubt."""
    member, members = plain.most_common(1)[0] if plain else (None, 0)
    name, count = fields.most_common(1)[0] if fields else (None, 0)
    with_json = sum("json" in group.members for group in groups)
    estimate = count / documents * with_json if documents else 0.0
    return name if estimate > members + _PREFERENCE * len(groups) else member or name


def label_field(document: Mapping[str, Any]) -> str | None:
    """The first known field of a JSON object that holds a label, as it is spelt there."""
    spelt: dict[str, str] = {}
    for name in document:
        spelt.setdefault(name.casefold(), name)
    for name in (spelt[known] for known in labels.FIELDS if known in spelt):
        try:
            if labels.read_label(document[name]) is not None:
                return name
        except ValueError:
            continue
    return None


_NOTHING = object()


def _document(group: Group) -> Any:
    """The JSON document of a sample, or _NOTHING."""
    member = group.members.get("json")
    if member is None or member.data is None:
        return _NOTHING
    return parse_json(member.data, _NOTHING)


def parse_json(data: bytes, default: Any = None) -> Any:
    """A JSON document, or `default` where the bytes are none."""
    try:
        return json.loads(read_text(data))
    except (ValueError, RecursionError, BadSample):
        return default


def content(file: IO[bytes], member: Member) -> bytes:
    """The data of a member, up to 1 MiB."""
    if member.data is not None:
        return member.data
    file.seek(member.offset)
    return bytes(file.read(min(member.size, _LARGEST_KEPT)))


def _problem(
    group: Group, index: ShardIndex, wanted: Wanted, places: Sequence[str]
) -> tuple[str, str] | None:
    """Why a sample cannot be used, and details, or None."""
    if not group.key:
        return "corrupt tar header", f"at byte {group.members[''].offset:,}"
    if group.extra:
        return "second picture under one key", ""
    image = group.image()
    if image is None:
        return "no image", ""
    texts = _texts(group, places)
    if wanted.text and not texts:
        return f"no {places[0] if len(places) == 1 else 'caption'}", ""
    category = group.of(index.category_member)
    if wanted.category and category is None:
        return f"no {index.category_member or 'category'}", ""
    return _range_problem([image, *texts, *([category] if category else [])], index, group)


def _range_problem(there: list[Member], index: ShardIndex, group: Group) -> tuple[str, str] | None:
    """What is wrong with where the members of a sample lie, or None."""
    if any(member.size == 0 for member in there):
        return "empty member", ""
    if any(member.offset + member.size > index.bytes for member in there):
        return "truncated", f"the shard ends at byte {index.bytes:,}"
    span = max(m.offset + m.size for m in there) - min(m.offset for m in there)
    if span > LARGEST_SAMPLE or any(member.size > LARGEST_MEMBER for member in there):
        return "absurd size", ""
    return ("repeated member", "") if group.repeated else None


def _texts(group: Group, places: Sequence[str]) -> list[Member]:
    """The members of a sample that hold captions; of several, those that hold something."""
    texts = [member for kind in kinds_of(places) if (member := group.of(kind))]
    return [member for member in texts if member.size or len(places) == 1]


def _gaps(group: Group, places: Sequence[str]) -> dict[str, str]:
    """Places that have no caption, and why, as far as the scan has looked."""
    problems = {place: _text_problem(group, place) for place in places}
    return {place: problem for place, problem in problems.items() if problem is not None}


def _text_problem(group: Group, where: str) -> str | None:
    """What is wrong with a caption: it is not there, or not in the JSON that the scan has kept."""
    member = group.of(where)
    if member is None or not member.size:
        return f"no {where}"
    if member.data is None or not where.startswith("json"):
        return None
    document = parse_json(member.data, _NOTHING)
    if ":" in where:
        if not isinstance(document, dict):
            return "bad JSON"
        document = document.get(where.split(":", 1)[1])
    return None if captions.read_captions(document) else "no caption"


def _category_problem(
    group: Group, index: ShardIndex, wanted: Wanted, file: IO[bytes], found: Findings
) -> tuple[str | None, str]:
    """Note the label of a sample; (cause, details) where it is none, (None, "") where it is one."""
    member, where = group.of(index.category_member), index.category_member or ""
    assert member is not None  # _problem has seen to that
    try:
        value: Any = content(file, member)
        if ":" in where:
            document = parse_json(value)
            if not isinstance(document, dict):
                return "bad JSON", member.name
            value = document.get(where.split(":", 1)[1])
        label = labels.read_label(value)
        if label is not None and wanted.classes is not None:
            label = labels.category_of(label, wanted.classes)
    except ValueError as error:
        return "bad category", str(error)
    except BadSample as bad:
        return bad.cause, str(bad)
    if label is None:
        return "no category", f"its label is {str(value)[:40]!r}"
    if isinstance(label, str):
        found.names.add(label)
    else:
        found.largest = max(found.largest, label)
    return None, ""


def _append(index: ShardIndex, group: Group, places: Sequence[str]) -> None:
    texts = [_with_data(group.of(kind)) for kind in kinds_of(places)]
    category = group.of(index.category_member)
    chosen = [("image", group.image()), *(("text", text) for text in texts[:1]),
              *([("category", category)] if category else []),
              *(("more", text) for text in texts[1:])]  # fmt: skip
    for name, member in chosen:
        getattr(index, f"{name}_offset").append(member.offset if member else -1)
        getattr(index, f"{name}_size").append(member.size if member else -1)
    index.check.append(check_of(member.header for _, member in chosen if member))


def _with_data(member: Member | None) -> Member | None:
    return member if member and member.size else None
