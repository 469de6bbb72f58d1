"""Reading the configuration: YAML files and `a.b=c` overrides to a `Config`, errors to a sentence.

A file may start from others with `base: other.yaml` or a list of them (paths relative to itself);
later ones win, mappings are merged, lists and values replaced.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from m3i_scale.config.schema import Config
from m3i_scale.config.types import ConfigError, Node

# Keys of version 0.1, and what they are called now.
RENAMED = {
    "batch": "global_batch_size",
    "length": "duration",
    "ema": "teacher_momentum",
    "ema_final": "teacher_momentum_final",
    "guard": "regularisation",
}


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, over: Sequence[str | Path] = ()
) -> Config:
    """Read `path`, lay the files `over` it, apply `a.b=c` overrides (values are YAML), validate.

    Raises:
        ConfigError: with one sentence, for anything wrong.
    """
    tree = read_tree(Path(path))
    for layer in over:
        tree = _merge(tree, read_tree(Path(layer)))
    for override in overrides:
        apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a YAML file laid over those of its `base` files; `seen` are the files above it.

    Raises:
        ConfigError: a file cannot be read or is no mapping, or bases form a circle.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files form a circle: {[str(p) for p in seen]}")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration file ({error.strerror})"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a mapping of keys to values is expected, found {type(tree).__name__}"
        )
    bases = tree.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, read_tree(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, tree)


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(low[key], value)
        for key, value in high.items()
        if isinstance(value, dict) and isinstance(low.get(key), dict)
    }
    return {**low, **high, **both}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a tree, in place: `a.b=value`, where the value is YAML.

    Raises:
        ConfigError: it has another form, or there is no such place.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    *parents, last = path.split(".")
    node: Any = tree
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else _child(node, key)
        value = yaml.safe_load(text)
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    except (TypeError, ValueError, IndexError, yaml.YAMLError):
        raise ConfigError(f"override {override!r}: nothing can be set at {path!r}") from None


def _child(node: dict[str, Any], key: str) -> Any:
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def sentence(error: ValidationError, root: type[Node] = Config) -> str:
    """The first problem of a tree of type `root` as one sentence."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if part not in ("gaussian", "boltzmann")]
    where = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden" and str(location[-1]) in RENAMED:
        return f"{where!r} has another name since version 0.2: {RENAMED[str(location[-1])]!r}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_did_you_mean(first['loc'], root)}"
    if first["type"] == "missing":
        return f"missing key {where!r}; give it a value"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {first['input']!r})"


def _did_you_mean(location: tuple[int | str, ...], root: type[Node]) -> str:
    names = list(_fields_at(location[:-1], root))
    near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; valid keys are {', '.join(names)}"


def _fields_at(location: Sequence[int | str], root: type[Node]) -> Iterable[str]:
    kind: Any = root
    for key in location:
        if isinstance(key, int):
            continue
        if typing.get_origin(kind) is dict:  # a name of the user's own
            kind = typing.get_args(kind)[1]
            continue
        options = [option for option in _models_in(kind) if key in option.model_fields]
        if options:
            kind = options[0].model_fields[key].annotation
        else:  # the tag of a union ("gaussian")
            kind = next(m for m in _models_in(kind) if m.model_fields["form"].default == key)
    return [name for option in _models_in(kind) for name in option.model_fields]


def _models_in(kind: Any) -> list[type[Node]]:
    """The Node classes in `list[X]`, `X | None`, `A | B`."""
    if (
        isinstance(kind, type)
        and not isinstance(kind, types.GenericAlias)
        and issubclass(kind, Node)
    ):
        return [kind]
    return [model for argument in typing.get_args(kind) for model in _models_in(argument)]
