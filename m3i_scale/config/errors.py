"""What pydantic finds wrong with a tree, as one sentence for the user."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

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
_TAGS = ("gaussian", "boltzmann", "sigmoid")  # pydantic names the member of a union in a location


def first_problem(error: ValidationError) -> ErrorDetails:
    """What to name: an unknown key before anything else, since it may be what is missing."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def place_of(problem: ErrorDetails) -> Place:
    """Where in the tree a problem is."""
    parts = problem["loc"]
    return tuple(
        part for before, part in zip(("", *parts), parts, strict=False)
        if not (before == "likelihood" and part in _TAGS)
    )  # fmt: skip


def sentence(problem: ErrorDetails, root: type[Node]) -> str:
    """A problem of a tree of type `root` as one sentence."""
    place = place_of(problem)
    where = dotted(place)
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown key {where!r}{_remedy(place, root)}"
    if kind == "missing" and isinstance(place[-1], int):
        few = f"{dotted(place[:-1])}: too few values (got {problem['input']!r})"
        return few + _default(place, root)
    if kind == "missing":
        return f"missing key {where!r}; give it a value"
    if kind.startswith("union_tag"):
        return f"{where}: write form: gaussian, boltzmann or sigmoid (got {problem['input']!r})"
    if kind == "value_error":
        return f"{where}: {message}" if where else message
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
    field = _fields_at(place[:-1], root).get(str(place[-1])) if place else None
    value = field.get_default(call_default_factory=True) if field else None
    if value is None or not isinstance(value, int | float | str | tuple | list):
        return ""
    return f"; the default is {flow(list(value) if isinstance(value, tuple) else value)}"


def _remedy(place: Place, root: type[Node]) -> str:
    old = dotted(tuple(part for part in place if isinstance(part, str)))
    if old in RENAMED:
        return "; it is called {!r} now ({})".format(*RENAMED[old])
    names = list(_fields_at(place[:-1], root))
    near = difflib.get_close_matches(str(place[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; valid keys are {', '.join(names)}"


def _fields_at(place: Sequence[str | int], root: type[Node]) -> dict[str, FieldInfo]:
    """The fields of all classes that can stand at a place; none where the user names the keys."""
    kind: Any = root
    for key in place:
        if isinstance(key, int):
            continue
        if typing.get_origin(kind) is dict:  # a name of the user's own
            kind = typing.get_args(kind)[1]
            continue
        fields = [m.model_fields[key] for m in nodes_in(kind) if key in m.model_fields]
        if not fields:
            return {}
        kind = fields[0].annotation
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
