"""Members of a tar -> samples, by the WebDataset convention and what people make of it.

Consecutive members whose names agree up to the first dot of the last path component are one
sample; what follows that dot is the member's kind:

    000000017.jpg  000000017.json  000000017.txt     -> key 000000017: jpg, json, txt

Where that finds no image, run by run of such members:

    IMG.2020.1.jpg IMG.2020.1.txt IMG.2020.2.jpg ... -> keys with dots: split at the last dot
    17.image.jpg   17.caption.txt                    -> kinds with dots: one sample
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from m3i_scale.data import captions, labels

IMAGE = (
    *("jpg", "jpeg", "jpe", "jfif", "jif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "avif", "jp2", "j2k", "jpx", "jpf"),
)
_IMAGES = frozenset(IMAGE)
_TEXTS = frozenset(captions.MEMBERS)
_LABELS = frozenset(labels.MEMBERS)
_CAPTION_NAMES = frozenset((*captions.MEMBERS, *captions.FIELDS))
_LABEL_NAMES = frozenset((*labels.MEMBERS, *labels.FIELDS))


class Member(NamedTuple):
    """A tar member: its name and the range of its data; name "" for a damaged header."""

    name: str
    offset: int
    size: int
    header: bytes = b""  # its header_identity
    data: bytes | None = None  # of small members that the scan was asked to keep


@dataclass
class Group:
    """The members of one sample by kind (lower case, without the dot)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    repeated: bool = False
    extra: bool = False  # a second picture with its caption under the key of another sample

    def image(self) -> Member | None:
        """The image member, if any: a plain ending, else the only kind that ends like one."""
        plain = next((self.members[kind] for kind in IMAGE if kind in self.members), None)
        if plain is not None:
            return plain
        dotted = [kind for kind in self.members if last_part(kind) in _IMAGES]
        named = [kind for kind in dotted if kind.split(".")[0] in ("image", "img")]
        chosen = dotted if len(dotted) == 1 else named
        return self.members[chosen[0]] if len(chosen) == 1 else None

    def of(self, member: str | None) -> Member | None:
        """The tar member behind a name such as `txt`, `caption.txt` or `json:caption`."""
        return self.members.get(member.split(":")[0]) if member else None

    def texts(self) -> list[str]:
        """The kinds that hold captions, the likeliest first: txt, caption.txt, ..."""
        return _kinds(self.members, captions.MEMBERS, _CAPTION_NAMES)

    def labels(self) -> list[str]:
        """The kinds that hold labels, the likeliest first: cls, cls.txt, ..."""
        return _kinds(self.members, labels.MEMBERS, _LABEL_NAMES)


def last_part(kind: str) -> str:
    """The part after the last dot: `caption.txt` -> `txt`."""
    return kind.rpartition(".")[2]


def _kinds(members: dict[str, Member], plain: tuple[str, ...], names: frozenset[str]) -> list[str]:
    """The kinds in `plain`, then those like `caption.txt` whose first part is in `names`."""
    dotted = [
        kind
        for kind in members
        if kind.count(".") == 1 and kind.endswith(".txt") and kind.split(".")[0] in names
    ]
    return [kind for kind in plain if kind in members] + dotted


def is_hidden(name: str) -> bool:
    """Whether a path is no data: .DS_Store, ._x.jpg, .ipynb_checkpoints/, __MACOSX/, @eaDir/."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in parts)


def group_members(members: Iterable[Member]) -> list[Group]:
    """The samples among `members`; a damaged header ends a sample and is a group without key."""
    runs = [list(run) for _, run in groupby(_split(members), key=lambda item: item[:2])]
    seconds = Counter(
        prefix
        for run in runs
        for prefix in {kind.rpartition(".")[0] for _, _, kind, _ in run if "." in kind}
    )
    # Where nothing in the tar is an annotation, pictures alone are samples.
    annotated = _TEXTS | _LABELS | {"json"}
    bare = not any(last_part(kind) in annotated for run in runs for _, _, kind, _ in run)
    return [group for run in runs for group in sorted(_samples(run, seconds, bare), key=_first)]


def _first(group: Group) -> int:
    return min(member.offset for member in group.members.values())


_Item = tuple[int, str, str, Member]  # number of the run of whole headers, key, kind, member


def _split(members: Iterable[Member]) -> Iterator[_Item]:
    damaged = 0
    for member in members:
        if not member.name:
            damaged += 1
            yield damaged, "", "", member
            damaged += 1
            continue
        key, kind = base_plus_ext(member.name)
        if key is None or kind is None or key.startswith("__") or is_hidden(member.name):
            continue
        yield damaged, key, kind.lower(), member


def _samples(run: list[_Item], seconds: Counter[str], bare: bool) -> Iterator[Group]:
    """The samples of one run of members that agree up to the first dot.

    `seconds` counts the runs that have a kind `PREFIX.*`: what many have (`seg.png`) is no key.
    """
    key = run[0][1]
    whole = _group(key, [(kind, member) for _, _, kind, member in run])
    if not any("." in kind for kind in whole.members):
        yield whole
        return
    parts: dict[str, list[tuple[str, Member]]] = {}
    for _, _, kind, member in run:
        prefix, _, ending = kind.rpartition(".")
        parts.setdefault(prefix, []).append((ending, member))
    groups = {prefix: _group(f"{key}.{prefix}", items) for prefix, items in parts.items() if prefix}
    complete = {
        prefix: group
        for prefix, group in groups.items()
        if _is_complete(group, lone=seconds[prefix] == 1, bare=bare)
    }
    if any(kind in _IMAGES for kind in whole.members):
        # An ordinary sample with more members; a picture with a caption of its own is another.
        yield _group(key, [(k, m) for _, _, k, m in run if k.rpartition(".")[0] not in complete])
        for prefix, group in complete.items():
            group.extra = seconds[prefix] > 1
            yield group
    elif not complete and len(parts) > 1 and _pictures(run) in ((0, 1) if "" in parts else (1,)):
        yield whole
    else:
        if "" in parts:
            yield _group(key, parts[""])
        yield from groups.values()


def _group(key: str, items: list[tuple[str, Member]]) -> Group:
    group = Group(key)
    for kind, member in items:
        group.repeated |= kind in group.members
        group.members.setdefault(kind, member)
    return group


def _is_complete(group: Group, *, lone: bool, bare: bool) -> bool:
    """Whether members are a sample of their own: a picture, and a caption or label for it."""
    kinds = set(group.members)
    annotated = kinds & (_TEXTS | _LABELS) or (lone and (bare or "json" in kinds))
    return bool(kinds & _IMAGES) and bool(annotated)


def _pictures(run: list[_Item]) -> int:
    return sum(last_part(kind) in _IMAGES for _, _, kind, _ in run)


def gather(groups: Iterable[Group]) -> list[Group]:
    """Join the groups of one key that lie apart, where no kind is there twice."""
    joined: dict[str, Group] = {}
    result = []
    for group in groups:
        first = joined.get(group.key) if group.key else None
        if first is not None and not set(first.members) & set(group.members):
            first.members.update(group.members)
            continue
        joined.setdefault(group.key, group)
        result.append(group)
    return result
