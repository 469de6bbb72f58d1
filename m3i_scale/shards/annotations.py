"""Caption and label of one picture, from the members or files that go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from m3i_scale.data import captions, labels
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.text import MAX_TEXT_BYTES
from m3i_scale.shards.groups import Group
from m3i_scale.shards.scan import label_field, parse_json


@dataclass
class Annotation:
    """What is known of one picture, and why something is not."""

    texts: list[str] = field(default_factory=list)
    label: int | str | None = None
    problem: str = ""  # of a label or a caption that is there and cannot be used


def annotate(group: Group, read: Callable[[str], bytes]) -> Annotation:
    """Read what goes with a picture: `txt`, `caption`, `cls`, ... members, else fields of `json`.

    Args:
        group: the kinds that there are.
        read: kind -> its bytes.
    """
    found = Annotation()
    for kind in group.texts():
        if not found.texts:
            _take_texts(found, read(kind))
    document = parse_json(read("json")) if "json" in group.members else None
    if not found.texts and document is not None:
        found.texts = captions.read_captions(document)
    for kind in group.labels():
        if found.label is None:
            _take_label(found, read(kind))
    if found.label is None and isinstance(document, Mapping):
        name = label_field(document)
        if name is not None:
            _take_label(found, document[name])
    return found


def of_values(text: Any, label: Any) -> Annotation:
    """The annotation in two cells of a table, None where there is no such column."""
    found = Annotation(captions.read_captions(text))
    _take_label(found, label)
    return found


def _take_label(found: Annotation, value: Any) -> None:
    try:
        found.label = labels.read_label(value)
    except ValueError:
        found.problem = "bad category"
    except BadSample as bad:
        found.problem = bad.cause


def _take_texts(found: Annotation, data: bytes) -> None:
    if len(data) > MAX_TEXT_BYTES:
        found.problem = "absurd caption"
        return
    try:
        found.texts = captions.read_captions(data)
    except BadSample as bad:
        found.problem = bad.cause
