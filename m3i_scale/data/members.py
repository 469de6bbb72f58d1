"""The members of a sample as an index names and places them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from tarfile import BLOCKSIZE as BLOCK

import numpy as np
from numpy.typing import NDArray

LARGEST_MEMBER = 1 << 28  # 256 MiB: a member is read as a whole
LARGEST_SAMPLE = 1 << 30  # from its first member's header to the end of its last one


def spell_places(places: Sequence[str]) -> str | None:
    """Where captions are, as an index's `text_member` has it; `read_places` reads it back."""
    return json.dumps(list(places)) if len(places) > 1 else next(iter(places), None)


def names_several(member: str | None) -> bool:
    """Whether `spell_places` has put several places into it."""
    return (member or "").startswith("[")


def read_places(member: str | None, several: bool) -> tuple[str, ...]:
    """The places of captions, e.g. ("txt", "json:caption"), of which the first counts most.

    Raises:
        ValueError, TypeError: `several` are said to be there, and it is no list of names.
    """
    if not several or not names_several(member):
        return (member,) if member else ()
    places = json.loads(member or "")
    if not places or not all(isinstance(place, str) and place for place in places):
        raise ValueError(f"{member!r} is no list of members")
    return tuple(places)


def kind_of(place: str) -> str:
    """The member of a tar that a place is in: `json` for `json:caption`."""
    return place.split(":", 1)[0]


def kinds_of(places: Sequence[str]) -> tuple[str, ...]:
    """The `kind_of` each of these places, once."""
    return tuple(dict.fromkeys(map(kind_of, places)))


def offsets_and_sizes(members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of rows of `Index.members`, (n, 3 + m) each: image, caption, category, further captions."""
    pairs = np.concatenate([members[:, :6], members[:, 7:]], axis=1)
    return pairs[:, 0::2], pairs[:, 1::2]


def require_within(members: NDArray[np.int64], length: int, shard: str) -> None:
    """Raise ValueError unless members (n, 7 + 2m) lie within a shard of `length` bytes.

    The image must be there; the others may be absent (-1, -1).
    """
    offset, size = offsets_and_sizes(members)
    absent = (offset == -1) & (size == -1)
    absent[:, 0] = False
    inside = (offset >= BLOCK) & (size >= 0) & (size <= LARGEST_MEMBER) & (offset <= length - size)
    first = np.where(absent, np.iinfo(np.int64).max, offset).min(axis=1, initial=length)
    last = np.where(absent, 0, offset + size).max(axis=1, initial=0)
    if not (absent | inside).all() or (last - first > LARGEST_SAMPLE).any():
        raise ValueError(f"it has samples that lie beyond their shard {shard}")
