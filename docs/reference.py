"""Write docs/reference.md, the configuration reference, from the classes of the configuration.

    python docs/reference.py            # after a change of m3i_scale/config
    python docs/reference.py --check    # exit code 1 if the page is stale

Keys, types, bounds and defaults are those of pydantic's fields. Descriptions are the docstrings of
the classes and the docstring or the comment of each field in the source.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from m3i_scale.config import Config, Node
from m3i_scale.config.errors import nodes_in
from m3i_scale.config.tasks import TASKS
from m3i_scale.config.types import Duration
from m3i_scale.config.yaml_text import flow
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.vit import ViT
from m3i_scale.sweep.spec import Sweep

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Configuration reference

Every key of a configuration, generated from the classes that read it (`python docs/reference.py`). A file may start from others with `base: other.yaml` or a list of files, relative to itself; later ones win, mappings are merged key by key, lists are replaced. Any key can be changed on the command line: `optimizer.learning_rate=5e-4 data.sources.0.weight=2`. Unknown keys are refused. [Methods](methods.md) explains the keys of `objective` with examples.
"""  # noqa: E501
BACKBONES: dict[str, Callable[..., Any]] = {"intern_image": InternImage, "vit": ViT}


def render() -> str:
    """The page."""
    sections = [HEAD]
    shown: set[type[Node]] = set()
    for title, root in _roots():
        sections += [_section(title, root, "")]
        for path, node in _below(root):
            if root is Sweep or node not in shown:  # a section of several tasks stands once
                sections += [_section(f"`{path}`", node, path)]
            shown.add(node)
        if root is Config:
            sections += [_backbone(name, build) for name, build in BACKBONES.items()]
    return "\n".join(sections)


def _roots() -> Iterator[tuple[str, type[Node]]]:
    """Every kind of file, and its tree."""
    for name, root in TASKS.items():
        yield ("Top level" if root is Config else f"Top level with `task: {name}`"), root
    yield "Sweep files", Sweep


def _below(node: type[Node], above: str = "") -> Iterator[tuple[str, type[Node]]]:
    """Every mapping below a node with its dotted path, depth first; each class of a choice."""
    for name, field in node.model_fields.items():
        path = f"{above}{name}{_bracket(field.annotation)}"
        for inner in nodes_in(field.annotation):
            yield path, inner
            yield from _below(inner, f"{path}.")


def _bracket(kind: Any) -> str:
    """`[]` behind the name of a list, `.NAME` behind that of a mapping of the user's own."""
    origin = typing.get_origin(kind)
    if origin is dict:
        return ".NAME" + _bracket(typing.get_args(kind)[1])
    return "[]" if origin is list else ""


def _section(title: str, node: type[Node], path: str) -> str:
    choice = _choice(node)
    if choice:
        title = f"`{path}`, {choice}"
    described = _descriptions(node)
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {described.get(name, '')} |"
        for name, field in node.model_fields.items()
    ]
    table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join([f"## {title}", "", _prose(node), "", *table])


def _choice(node: type[Node]) -> str:
    """Of one of several kinds of a mapping, the key and the value that choose it."""
    for name in ("form", "kind"):
        field = node.model_fields.get(name)
        values = () if field is None else typing.get_args(field.annotation)
        if field is not None and values == (field.default,):
            return f"{name} `{field.default}`"
    return ""


def _backbone(name: str, build: Callable[..., Any]) -> str:
    """The options of a backbone: those of its constructor."""
    rows = []
    for option in inspect.signature(build).parameters.values():
        default = "required" if option.default is option.empty else f"`{_yaml(option.default)}`"
        kind = str(option.annotation).replace("collections.abc.", "").replace("|", "\\|")
        rows.append(f"| `{option.name}` | {kind.removeprefix('<class ').strip(chr(39) + '>')} "
                    f"| {default} |")  # fmt: skip
    text = _prose(build)
    table = ["| option | type | default |", "| --- | --- | --- |", *rows, ""]
    return "\n".join([f"## `model.backbone.options` of `{name}`", "", text, "", *table])


def _prose(described: Any) -> str:
    """A docstring as Markdown: a line for each paragraph, tables of words as they are."""
    paragraphs = []
    for paragraph in inspect.cleandoc(described.__doc__ or "").split("\n\n"):
        if "  " in paragraph:
            paragraphs.append(textwrap.indent(paragraph, "    "))
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


def _descriptions(node: type[Node]) -> dict[str, str]:
    """What the source says of each field: the string below it, or the comment beside or above."""
    above = node.__mro__[1]
    found = _descriptions(above) if issubclass(above, Node) and above is not Node else {}
    source = textwrap.dedent(inspect.getsource(node))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    comments = _comments(source)
    for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        text = comments.get(field.end_lineno or 0) or comments.get(-field.lineno)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        if text:
            found[field.target.id] = text.replace("|", "\\|")
    return found


def _comments(source: str) -> dict[int, str]:
    """Comments beside code by line, and those alone on their line by minus the line below."""
    found: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[-token.start[0] - 1 if alone else token.start[0]] = token.string.lstrip("# ")
    return found


def _type(field: FieldInfo) -> str:
    words = _words(field.annotation)
    bounds = [bound for item in field.metadata for bound in _bounds(item)]
    return f"{words}{', ' if bounds else ''}{', '.join(bounds)}".replace("|", "\\|")


def _bounds(item: Any) -> Iterator[str]:
    for name, words in (("gt", "above {}"), ("ge", "{} or more"), ("lt", "below {}"),
                        ("le", "at most {}"), ("multiple_of", "a multiple of {}"),
                        ("min_length", "at least {}")):  # fmt: skip
        value = getattr(item, name, None)
        if value is not None:
            yield words.format(value)


def _words(kind: Any) -> str:
    """A type in the words of someone who writes YAML."""
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false",
             type(None): "null", Any: "anything", Duration: "duration"}  # fmt: skip
    if kind in plain:
        return plain[kind]
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _words(inside[0]) + "".join(f", {b}" for item in inside[1:] for b in _bounds(item))
    if origin is typing.Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(member) for member in inside))
    if origin is list:
        return f"list of: {_words(inside[0])}"
    if origin is tuple:
        return f"{len(inside)} values: {_words(inside[0])}"
    if origin is dict:
        return f"mapping of names to: {_words(inside[1])}"
    return "mapping" if nodes_in(kind) else str(getattr(kind, "__name__", kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Node):  # its own section says the rest
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_yaml(changed)}`" if changed else "see below"
    return f"`{_yaml(value)}`".replace("|", "\\|")


def _yaml(value: Any) -> str:
    if isinstance(value, Duration):
        return str(value)
    return flow(list(value) if isinstance(value, tuple) else value)


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    text = render()
    if parser.parse_args().check:
        fresh = PAGE.is_file() and PAGE.read_text("utf-8") == text
        if not fresh:
            print(f"{PAGE} is stale: run `python docs/reference.py`", file=sys.stderr)
        return 0 if fresh else 1
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
