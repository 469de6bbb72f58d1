"""The documentation names no setting and links to no file that does not exist, and is fresh."""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from m3i_scale.config import Config, Node
from m3i_scale.config.errors import RENAMED, nodes_in
from m3i_scale.config.tasks import TASKS
from m3i_scale.config.yaml_text import parse
from m3i_scale.models.intern_image import InternImage
from m3i_scale.models.vit import ViT
from m3i_scale.sweep.spec import Sweep

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for page in ROOT.rglob("*.md") if not {".venv", ".git"} & set(page.relative_to(ROOT).parts)
)
ROOTS = [*TASKS.values(), Sweep]  # what a file can be
TOP = "|".join(Config.model_fields)
# `data.workers`, `objective.input.ratio=0.6`; not `data.py`, `data/order.py`, `data.Stream(`
DOTTED = re.compile(rf"(?<![\w./-])((?:{TOP})(?:\.[a-z_0-9]+)+)(?![\w/(]|\.\w)")
SUFFIXES = {"py", "yaml", "json", "md", "png", "txt", "parquet", "jsonl", "csv", "sbatch", "sh"}


def exists(key: str) -> bool:
    """Whether a dotted path leads to a field of a tree, or into a mapping of the user's own."""
    return any(_exists(key, root) for root in ROOTS)


def _exists(key: str, root: type[Node]) -> bool:
    kind: Any = root
    for word in key.split("."):
        if word.isdecimal():
            continue
        fields = [m.model_fields[word] for m in nodes_in(kind) if word in m.model_fields]
        if not fields:
            return any(typing.get_origin(k) is dict for k in (kind, *typing.get_args(kind)))
        kind = fields[0].annotation
    return True


def dotted(text: str) -> Iterator[str]:
    for key in DOTTED.findall(text):
        if key.rpartition(".")[2] not in SUFFIXES:
            yield key


def blocks(text: str) -> Iterator[Any]:
    """What the blocks of a page say that are YAML of a configuration or a sweep."""
    for block in re.findall(r"^```(?:yaml)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if re.match(rf"\s*(?:base|{TOP}|axes|name):", block):
            yield parse(block.encode()).value


def leaves(tree: Any, above: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            inside = f"{above}.{key}" if above else key
            yield inside
            yield from leaves(value, inside)
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value, above)


def inline(text: str) -> Iterator[str]:
    """Keys in `key: value` and in `a_bare_key` of running text, wherever in the tree they are."""
    code = re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    for words in code:
        yield from re.findall(r"(?:^|[{, ])([a-z]+(?:_[a-z]+)*): ", words)


def every_field(root: type[Node]) -> Iterator[str]:
    for name, field in root.model_fields.items():
        yield name
        for node in nodes_in(field.annotation):
            yield from every_field(node)


# Programs whose messages pages quote as `name: message`.
PROGRAMS = {"slurmstepd"}
OPTIONS = {name for kind in (InternImage, ViT) for name in inspect.signature(kind).parameters}
FIELDS = {*(name for root in ROOTS for name in every_field(root)), *OPTIONS, *PROGRAMS, "base"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(page: Path):
    text = page.read_text("utf-8")
    former = set(RENAMED) if page.name == "CHANGELOG.md" else set()
    assert [key for key in dotted(text) if not exists(key) and key not in former] == []
    assert [key for key in inline(text) if key not in FIELDS] == []
    for tree in blocks(text):
        unknown = [key for key in leaves(tree) if not exists(key)]
        assert [key for key in unknown if key != "base"] == []


def test_the_check_sees_what_it_is_for():
    text = "`data.max_pixle` and data.workers, `objective.input.ratio=1`, `data.py`, data/order.py"
    assert [key for key in dotted(text) if not exists(key)] == ["data.max_pixle"]
    assert list(inline("`bad_windo: 3`, `{form: gaussian}`")) == ["bad_windo", "form"]
    assert list(leaves({"a": [{"b": 1}]})) == ["a", "a.b"]
    assert exists("engine.zero.extra.anything.at.all")
    assert exists("objective.targets.0.likelihood.sigma")
    assert not exists("engine.zero.extr.a")


def test_pages_are_found():
    assert {page.name for page in PAGES} >= {"README.md", "methods.md", "stream.md"}


def program(name: str) -> ModuleType:
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_fresh():
    reference = program("reference")
    assert reference.PAGE.read_text("utf-8") == reference.render(), "run python docs/reference.py"


def test_the_configuration_reference_has_and_describes_every_key():
    text = program("reference").render()
    for root in ROOTS:
        for name in every_field(root):
            assert re.search(rf"^\| `{name}` \| ", text, re.MULTILINE), name
    undescribed = re.findall(r"^\| (`\w+`) .*\|  \|$", text, re.MULTILINE)
    assert not undescribed, "write a docstring below the field"


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path):
    text = page.read_text("utf-8")
    for link in program("site_hook").links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not link.startswith("/"), f"{link}: write it relative to the page"
        if anchor:
            assert anchor in slugs(target.read_text("utf-8")), link


def test_every_page_of_docs_has_a_place_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE))
    docs = ROOT / "docs"
    assert listed == {str(path.relative_to(docs)) for path in docs.rglob("*.md")}


def test_links_in_the_site_lead_where_they_lead_in_the_repository():
    hook = program("site_hook")
    assert hook.resolve("docs/tasks/data.md", "../../slurm") == "slurm/README.md"
    assert hook.resolve("docs/index.md", "https://a.b/c.md") is None
    assert hook.resolve("docs/index.md", "nowhere.md") is None
    assert list(hook.links("[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n![g](h.png)")) == [
        "b.md",
        "h.png",
    ]
    for path in ("docs/tasks/data.md", "slurm/README.md", "configs/demo.yaml"):
        assert hook.repository_path(hook.site_path(path)) == path
