"""YAML as the configuration reads and writes it: stricter than PyYAML, and with YAML 1.2's numbers.

No key stands twice in a mapping. `1e-1` is a number (PyYAML follows YAML 1.1, where it is text);
dates, `12:30` and `007` are text (there, a date, 750 and 7). Every value remembers its line. Only
plain data are built: no tag makes an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from m3i_scale.config.types import ConfigError

Place = tuple[str | int, ...]  # ("data", "sources", 0, "index")

MOST_VALUES = 100_000  # of a document; aliases of aliases can make more of a short one than fits
_MOST_BITS = 1024  # of an integer: more than any float holds
_MERGE = "tag:yaml.org,2002:merge"
_STRING = "tag:yaml.org,2002:str"
_PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}
# Tag, what it looks like, which characters it begins with.
_SCALARS = (
    ("bool", r"[yY]es|YES|[nN]o|NO|[tT]rue|TRUE|[fF]alse|FALSE|[oO]n|ON|[oO]ff|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (PyYAML looks for it in the class)


class _Dumper(yaml.SafeDumper):
    """Quotes what either this module's reader or another one would not read as text."""


for _tag, _pattern, _first in _SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first)
        )


class Document(NamedTuple):
    """What a YAML document says, and on which line (from 1) each value is set."""

    value: Any
    lines: dict[Place, int]


def parse(text: bytes | str) -> Document:
    """Read one document; bytes are UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ConfigError: it is no such YAML; the message begins with the line where that is known.
    """
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        builder = _Builder(loader, lines)
        return Document(None if node is None else builder.build(node, (), ()), lines)
    except yaml.MarkedYAMLError as error:
        words = [error.context, error.problem] if error.context else [error.problem]
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            f"{_at(mark)}not valid YAML: {', '.join(word for word in words if word)}"
        ) from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # `"\\UFFFFFFFF"`, say
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("not usable YAML: it is nested too deeply") from None


def parse_value(text: str) -> Any:
    """Read a value that was given alone, whole: a '#' in it begins no comment.

    Raises:
        ConfigError: it is no YAML, or a part of it would be lost as a comment.
    """
    try:
        tokens = list(yaml.scan(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return _alone(text)  # which says what is wrong
    spans = [(token.start_mark.index, token.end_mark.index) for token in tokens]
    hashes = [n for n, letter in enumerate(text) if letter == "#"]
    if all(any(start <= n < stop for start, stop in spans) for n in hashes):
        return _alone(text)
    words = [token for token in tokens if isinstance(token, yaml.ScalarToken)]
    if len(tokens) - len(words) == 2 and all(word.plain for word in words[:1]) and len(words) < 2:
        return text.strip()  # the two others are the start and the end of the stream
    raise ConfigError("what follows the '#' would be lost as a comment; remove it or quote it")


def _alone(text: str) -> Any:
    try:
        return parse(text).value
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("line 1: ")) from None


def dump(tree: Any) -> str:
    """A tree as YAML that `parse` reads back as it is."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def flow(value: Any) -> str:
    """A value in one line, for messages."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").rstrip()


class _Builder:
    """Plain data from the nodes of a document; what two aliases name becomes two values."""

    def __init__(self, loader: _Loader, lines: dict[Place, int]) -> None:
        self._loader, self._lines, self._built = loader, lines, 0

    def build(self, node: yaml.Node, place: Place, above: tuple[yaml.Node, ...]) -> Any:
        self._built += 1
        if self._built > MOST_VALUES:
            raise ConfigError(f"not usable YAML: more than {MOST_VALUES:,} values")
        if any(node is other for other in above):
            raise ConfigError(f"{_at(node.start_mark)}a value that contains itself by an alias")
        if node.tag not in _PLAIN:
            raise ConfigError(f"{_at(node.start_mark)}the tag {node.tag!r} cannot be used here")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            found = []
            for number, child in enumerate(node.value):
                inside = (*place, number)
                self._lines[inside] = child.start_mark.line + 1
                found.append(self.build(child, inside, above))
            return found
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, place, above)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError) as error:  # `!!int x`, `!!int ''`, `!!bool x`
            kind = node.tag.rpartition(":")[2]
            words = error if isinstance(error, ValueError) else f"{node.value!r} is no {kind}"
            raise ConfigError(f"{_at(node.start_mark)}{words}") from None
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python cannot print it
            raise ConfigError(f"{_at(node.start_mark)}a number of {value.bit_length():,} bits")
        return value

    def _mapping(
        self, node: yaml.MappingNode, place: Place, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        own: dict[str, yaml.Node] = {}
        merged: dict[str, Any] = {}
        for key, child in node.value:
            name = self._key(key)
            if name in own:
                raise ConfigError(
                    f"{_at(key.start_mark)}the key {name!r} stands twice in one mapping (first on "
                    f"line {own[name].start_mark.line + 1}); remove one"
                )
            own[name] = key
            if key.tag == _MERGE:
                merged = self._merged(child, place, above)
        for key, child in node.value:
            if key.tag != _MERGE:
                inside = (*place, key.value)
                if key.value in merged:
                    for line in [p for p in self._lines if p[: len(inside)] == inside]:
                        del self._lines[line]  # of what a merged mapping said
                self._lines[inside] = key.start_mark.line + 1
                merged[key.value] = self.build(child, inside, above)
        return merged

    def _key(self, key: yaml.Node) -> str:
        if key.tag not in (_STRING, _MERGE) or not isinstance(key, yaml.ScalarNode):
            what = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a mapping or a list"
            raise ConfigError(
                f"{_at(key.start_mark)}a key must be text, and YAML reads {what} as something "
                "else; write it in quotes"
            )
        return str(key.value)

    def _merged(
        self, child: yaml.Node, place: Place, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        """What `<<` says: the mapping it names, or several, of which the first wins."""
        merged: dict[str, Any] = {}
        for part in reversed(list(_parts(child))):
            value = self.build(part, place, above)
            if not isinstance(value, dict):
                raise ConfigError(f"{_at(part.start_mark)}'<<' must name a mapping")
            merged |= value
        return merged


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    else:
        yield node


def _at(mark: Any) -> str:
    return f"line {mark.line + 1}: " if mark is not None else ""
