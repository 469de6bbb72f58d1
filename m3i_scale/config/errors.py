"""What pydantic finds wrong with a tree, as one sentence for the user."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from m3i_scale.config.types import Node
from m3i_scale.config.yaml_text import Place, flow

# Keys that were called otherwise, and what there is to say about the value.
RENAMED = {
    "optimizer.batch": ("optimizer.global_batch_size", "the number stays the same"),
    "optimizer.length": ("optimizer.duration", "the duration stays the same"),
    "optimizer.ema": ("optimizer.teacher_momentum", "the number stays the same"),
    "optimizer.ema_final": ("optimizer.teacher_momentum_final", "the number stays the same"),
    "objective.targets.guard": ("regularisation", "the values stay the same"),
    "logging.tensorboard": ("logging.trackers", "true becomes [tensorboard], false becomes []"),
    "data.chunk_megabytes": ("data.chunk_mebibytes", "the number stays the same"),
    "data.storage.cache_gigabytes": ("data.storage.cache_gibibytes", "100 become 93"),
}


def first_problem(error: ValidationError) -> ErrorDetails:
    """What to name: an unknown key before anything else, since it may be what is missing."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def place_of(problem: ErrorDetails, root: type[Node]) -> Place:
    """Where in a tree of type `root` a problem is."""
    return _resolved(problem["loc"], root).place


# pydantic's words for these are about Python.
_MAPPING = "write a mapping of its keys, {key: value, ...}"
_WANTED = {
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dict_type": _MAPPING,
    "list_type": "write a list, [a, b, ...]",
    "tuple_type": "write a list, [a, b, ...]",
}


def sentence(problem: ErrorDetails, root: type[Node]) -> str:
    """A problem of a tree of type `root` as one sentence."""
    place = place_of(problem, root)
    where = dotted(place)
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key {where!r}{_remedy(problem['loc'], root)}"
    if kind == "missing" and isinstance(place[-1], int):
        few = f"{dotted(place[:-1])}: too few values (got {problem['input']!r})"
        return few + _default(place, root)
    if kind == "missing":
        return f"missing key {where!r}; give it a value"
    if kind.startswith("union_tag"):
        return f"{where}: write {_forms(problem['loc'], root)} (got {problem['input']!r})"
    if kind == "value_error":
        return f"{where}: {message}" if where else message
    message = _WANTED.get(kind, message)
    if kind == "too_short":
        message = f"give it {problem['ctx']['min_length']} or more entries"
    quoted = kind == "string_type" and isinstance(problem["input"], int | float)
    hint = "; for text, write it in quotes" if quoted else _default(place, root)
    return f"{where}: {message} (got {problem['input']!r}){hint}"


def dotted(place: Place) -> str:
    """A place as it is written in an override: `data.sources.0.index`."""
    return ".".join(str(part) for part in place)


def example(place: Sequence[str | int], root: type[Node]) -> str:
    """A sentence's end that shows what can be written at a place; empty where nothing is known."""
    return _default(tuple(place), root)


def _default(place: Place, root: type[Node]) -> str:
    while place and isinstance(place[-1], int):
        place = place[:-1]
    field = _fields(_resolved(place[:-1], root).kind).get(str(place[-1])) if place else None
    value = field.get_default(call_default_factory=True) if field else None
    if value is None or not isinstance(value, int | float | str | tuple | list):
        return ""
    return f"; the default is {flow(list(value) if isinstance(value, tuple) else value)}"


def _remedy(loc: Place, root: type[Node]) -> str:
    old = dotted(tuple(part for part in loc if isinstance(part, str)))
    if old in RENAMED:
        return "; it is called {!r} now ({})".format(*RENAMED[old])
    above = _resolved(loc[:-1], root)
    names = list(_fields(above.kind))
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if near:
        return f"{above.member}; did you mean {near[0]!r}?"
    return f"{above.member}; valid keys are {', '.join(names)}"


def _forms(loc: Place, root: type[Node]) -> str:
    """What may be written for the key that chooses a member of a union: `kind: a or kind: b`."""
    above, key = _resolved(loc[:-1], root), str(loc[-1])
    field = _fields(above.kind)[key]
    return " or ".join(f"{field.discriminator}: {tag}" for tag in _tagged(field))


class _Resolved(NamedTuple):
    """A location of pydantic's, which names the member of a union that is chosen by a key."""

    place: Place  # in the tree
    kind: Any  # the type of what stands there
    member: str  # " of kind: jitter" where the location ends with a member of a union


def _resolved(loc: Sequence[str | int], root: type[Node]) -> _Resolved:
    place: list[str | int] = []
    kind: Any = root
    tagged: dict[str, type[Node]] = {}
    field: FieldInfo | None = None
    member = ""
    for part in loc:
        if part in tagged:
            assert field is not None
            kind, tagged, member = tagged[str(part)], {}, f" of {field.discriminator}: {part}"
            continue
        place.append(part)
        tagged, member = {}, ""
        if isinstance(part, int):
            continue
        if typing.get_origin(kind) is dict:  # a name of the user's own
            kind = typing.get_args(kind)[1]
            continue
        field = _fields(kind).get(part)
        kind, tagged = (field.annotation, _tagged(field)) if field else (None, {})
    return _Resolved(tuple(place), kind, member)


def _tagged(field: FieldInfo) -> dict[str, type[Node]]:
    """The members of a union that a key chooses from, by its values; of another field none."""
    if not isinstance(field.discriminator, str):
        return {}
    return {
        tag: node
        for node in nodes_in(field.annotation)
        for tag in typing.get_args(node.model_fields[field.discriminator].annotation)
    }


def _fields(kind: Any) -> dict[str, FieldInfo]:
    """The fields of all classes in a type."""
    return {name: f for model in nodes_in(kind) for name, f in model.model_fields.items()}


def nodes_in(kind: Any) -> list[type[Node]]:
    """The Node classes in `list[X]`, `X | None`, `A | B`."""
    if (
        isinstance(kind, type)
        and not isinstance(kind, types.GenericAlias)
        and issubclass(kind, Node)
    ):
        return [kind]
    return [model for argument in typing.get_args(kind) for model in nodes_in(argument)]
