"""Reading the configuration: YAML files and `a.b=c` overrides to a `Config`, errors to a sentence.

A file may start from others with `base: other.yaml` or a list of them: paths relative to itself, or
`m3i:NAME` (`shipped`). Later ones win, mappings are merged, lists and values replaced. Two
exceptions. A mapping that states another `kind` (or `form`) than the one below it replaces it: its
keys are those of that kind. A file that states `objective.targets` states a method, and its
`objective.input` and `balance` are its own too or the defaults, never those of the files below it.
(`without_source` is of the data and `negatives` of the step, and both stay.) An override changes
its key and nothing else.

What is wrong is blamed on who said it: the line of a file, or the override.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from m3i_scale import paths
from m3i_scale.config.errors import dotted, example, first_problem, place_of, sentence
from m3i_scale.config.schema import Config, RunConfig
from m3i_scale.config.shipped import locate
from m3i_scale.config.tasks import TASKS
from m3i_scale.config.types import ConfigError, Node
from m3i_scale.config.yaml_text import Place, dump, parse, parse_value

N = TypeVar("N", bound=Node)

LARGEST_FILE = 1 << 22  # bytes
CHOOSING = ("kind", "form")  # keys that choose a member of a union
# What makes a method, of which a file states all as soon as it states the targets.
METHOD = ("targets", "input", "balance")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, over: Sequence[str | Path] = ()
) -> Config:
    """Read `path`, lay the files `over` it, apply `a.b=c` overrides (values are YAML), validate.

    In names given as `str`, `~` and `$VARIABLES` are expanded, and `m3i:NAME` is a configuration of
    the package; a `Path` is taken as it is.

    Raises:
        ConfigError: with one sentence, for anything wrong.
    """
    return load(Config, path, overrides, over=over)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, for any task: the key `task` says which."""
    return load(RunConfig, path, overrides)


def load(
    root: type[N],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str | Path] = (),
) -> N:
    """As `load_config`, for a tree of any type `root`; of `RunConfig`, the task's."""
    files = _read(_path(path))
    for layer in over:
        files.lay(_read(_path(layer)))
    if issubclass(root, RunConfig):
        root = _of_the_task(root, path, files.changed(overrides, root).values.get("task"))
    try:
        return root.model_validate(files.changed(overrides, root).values)
    except ValidationError as error:
        problem = first_problem(error)
    raise ConfigError(f"{_culprit(root, files, overrides, place_of(problem, root)) or path}: "
                      f"{sentence(problem, root)}")  # fmt: skip


def _of_the_task(root: type[N], path: str | Path, task: Any) -> type[N]:
    """The tree of a task, which must be `root` or one of its kind."""
    task = "pretraining" if task is None else task
    found = TASKS.get(task) if isinstance(task, str) else None
    if found is None:
        raise ConfigError(f"{path}: task: {task!r} is none of {', '.join(TASKS)}")
    if not issubclass(found, root):
        raise ConfigError(
            f"{path} is of the task {task}, and this command is for "
            f"{next(name for name, kind in TASKS.items() if issubclass(kind, root))}; give it the "
            "file of such a run"
        )
    return found


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML that `load_config` reads back."""
    return dump(config.model_dump(mode="json"))


def override(key: str, value: str | int | float) -> str:
    """The override that sets `key` to exactly this value."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Mappings of one kind key by key, `high` over `low`; anything else is replaced."""
    both = {
        key: merge(low[key], value)
        for key, value in high.items()
        if _mergeable(low.get(key), value)
    }
    return {**low, **high, **both}


def _mergeable(low: Any, high: Any) -> bool:
    """Whether both are mappings, and `high` does not choose another member of a union."""
    if not (isinstance(low, dict) and isinstance(high, dict)):
        return False
    return not any(key in high and high[key] != low.get(key, high[key]) for key in CHOOSING)


class Layers:
    """A tree laid together from files and overrides, which knows who set what."""

    def __init__(self, values: dict[str, Any], origins: dict[Place, str]) -> None:
        self.values, self._origins = values, origins

    def lay(self, high: Layers) -> None:
        """Lay another one over this one."""
        objective = high.values.get("objective")
        if isinstance(objective, dict) and "targets" in objective:
            below = self.values.get("objective")
            if isinstance(below, dict):
                self.values["objective"] = {k: v for k, v in below.items() if k not in METHOD}
            for key in METHOD:
                self._forget(("objective", key))
        replaced = {
            place
            for place in high._origins
            if not _mergeable(_at(self.values, place), _at(high.values, place))
        }
        kept = {
            place: origin
            for place, origin in self._origins.items()
            if not any(place[:n] in replaced for n in range(1, len(place) + 1))
        }
        self.values = merge(self.values, high.values)
        self._origins = kept | high._origins

    def changed(self, overrides: Sequence[str], root: type[Node]) -> Layers:
        """A copy with overrides applied.

        Raises:
            ConfigError: naming the one that has no place, or another form than `a.b=value`.
        """
        copied = Layers(copy.deepcopy(self.values), dict(self._origins))
        for text in overrides:
            try:
                copied._set(text, root)
            except ConfigError as error:
                raise ConfigError(f"override {text!r}: {error}") from None
        return copied

    def origin(self, place: Place) -> str | None:
        """Who set what stands at a place, or the nearest above it."""
        above = (place[:n] for n in range(len(place), 0, -1))
        return next((self._origins[p] for p in above if p in self._origins), None)

    def _forget(self, place: Place) -> None:
        """Who set a place and all below it."""
        self._origins = {p: o for p, o in self._origins.items() if p[: len(place)] != place}

    def _set(self, text: str, root: type[Node]) -> None:
        path, equals, written = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError("not of the form a.b=value")
        try:
            value = parse_value(written)
        except ConfigError as error:
            raise ConfigError(
                f"the value {written!r} cannot be read: {error}{example(keys, root)}"
            ) from None
        node: Any = self.values
        place: Place = ()
        for n, word in enumerate(keys):
            key = _key_of(node, word, place)
            place = (*place, key)
            if n == len(keys) - 1:
                node[key] = value
            elif isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
                self._origins[place] = f"override {text!r}"
            node = node[key]
        self._forget(place)
        self._origins[place] = f"override {text!r}"


def _key_of(node: Any, word: str, place: Place) -> str | int:
    """The key or number that a word of an override's path means inside `node`."""
    if isinstance(node, dict):
        return word
    if not isinstance(node, list):
        raise ConfigError(f"{dotted(place)!r} is {node!r} and has no key {word!r}")
    if not word.isdecimal() or int(word) >= len(node):
        entries = f"entries 0 to {len(node) - 1}" if node else "no entries"
        raise ConfigError(
            f"nothing can be set at {word!r}: {dotted(place)!r} is a list with {entries}"
        )
    return int(word)


def _at(values: Any, place: Place) -> Any:
    for key in place:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            return None
    return values


def _culprit(root: type[Node], files: Layers, overrides: Sequence[str], place: Place) -> str | None:
    """Who is to blame for what is wrong at a place.

    A rule among several keys has no line; then the overrides are named without which it holds.
    """
    origin = files.changed(overrides, root).origin(place)
    if origin is not None and origin.startswith("override "):
        return origin
    guilty = []
    for n in range(len(overrides)):
        try:
            root.model_validate(files.changed([*overrides[:n], *overrides[n + 1 :]], root).values)
            guilty.append(overrides[n])
        except (ValidationError, ConfigError):
            continue
    if guilty:
        return f"override{'s' if guilty[1:] else ''} {' or '.join(map(repr, guilty))}"
    return origin


def _read(path: Path, above: tuple[str, ...] = ()) -> Layers:
    """A YAML file laid over its `base` files; `above` are the files that lead to it.

    Raises:
        ConfigError: a file cannot be read or is no mapping, or bases form a circle.
    """
    real = os.path.realpath(path)
    if real in above:
        raise ConfigError(f"{path}: base files form a circle: {' -> '.join((*above, real))}")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ConfigError(f"it has more than {LARGEST_FILE >> 20} MiB; is it the right file?")
        document = parse(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration file ({error.strerror})"
        ) from None
    except ConfigError as error:
        line, colon, rest = str(error).removeprefix("line ").partition(": ")
        where = f"{path}:{line}: {rest}" if colon and line.isdecimal() else f"{path}: {error}"
        raise ConfigError(where) from None
    values = document.value
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: a mapping of keys to values is expected, found {found}")
    whole = Layers({}, {})
    if "base" in values:
        where = f"{path}:{document.lines['base',]}: base: "
        for base in _bases(values.pop("base"), where):
            whole.lay(_read(_path(base, where, beside=path.parent), (*above, real)))
    origins = {p: f"{path}:{line}" for p, line in document.lines.items() if p[0] != "base"}
    whole.lay(Layers(values, origins))
    return whole


def _path(name: str | Path, where: str = "", beside: Path = Path()) -> Path:
    try:
        expanded = locate(paths.expand(name), beside) if isinstance(name, str) else name
    except ValueError as error:  # a ConfigError is one
        raise ConfigError(f"{where}{error}") from None
    if "\0" in str(expanded) or not _is_encodable(str(expanded)):
        raise ConfigError(f"{where}{name!r} cannot be the name of a file")
    return expanded


def _is_encodable(name: str) -> bool:
    """False where YAML has spelt half a character: no file is called so."""
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _bases(value: Any, where: str) -> list[str]:
    bases = [value] if isinstance(value, str) else value
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(
            f"{where}the name of a file, or a list of names, is expected (got {value!r}); "
            "name one, or remove the key"
        )
    return bases
