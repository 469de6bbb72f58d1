"""MkDocs hook: links from a page to files outside of docs/ work in the site as they do on GitHub.

Pages link to other files of the repository relative to themselves (`../slurm/README.md`). The site
shows each file so linked as a page below `repository/`: Markdown as it is, other text as a listing,
pictures unchanged. Links in those pages are followed likewise. A link to nothing is a warning,
which `mkdocs build --strict` turns into a failure.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository/"
# [text](target), ![text](target); not in code
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash",
             ".toml": "toml", ".csv": "text", ".cff": "yaml"}  # fmt: skip
PICTURES = {".png", ".svg", ".jpg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside of docs/ that a page links to, directly or not."""
    from mkdocs.structure.files import File, InclusionLevel

    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    added: set[str] = set()
    while waiting:
        page = waiting.pop()
        for path in targets(page, (ROOT / page).read_text("utf-8")):
            if path in added or path.startswith("docs/"):
                continue
            added.add(path)
            if path.endswith(".md"):
                waiting.append(path)
            picture = Path(path).suffix in PICTURES
            file = File.generated(
                config,
                site_path(path),
                content=None if picture else listing(path),
                abs_src_path=str(ROOT / path) if picture else None,
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page at the places of their files in the site."""
    here = page.file.src_uri
    source = repository_path(here)

    def relink(link: str) -> str:
        path, mark, anchor = link.partition("#")
        target = resolve(source, path) if path else None
        if target is None:
            return link
        relative = posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")
        return f"{relative}{mark}{anchor}"

    return replace_links(markdown, relink)


def replace_links(markdown: str, relink: Callable[[str], str]) -> str:
    """Apply a function to every link target outside of code."""
    parts = CODE.split(markdown)
    for n in range(0, len(parts), 2):
        parts[n] = LINK.sub(lambda m: f"{m[1]}{relink(m[2])}{m[3]}", parts[n])
    return "".join(parts)


def links(markdown: str) -> Iterator[str]:
    """The link targets of a page outside of code."""
    for text in CODE.split(markdown)[::2]:
        yield from (match[2] for match in LINK.finditer(text))


def targets(page: str, markdown: str) -> Iterator[str]:
    """The files, relative to the root, that a page links to."""
    for link in links(markdown):
        path = resolve(page, link.partition("#")[0])
        if path is not None:
            yield path


def resolve(page: str, link: str) -> str | None:
    """The file that a link leads to, relative to the root; None for URLs, anchors and mistakes."""
    if not link or re.match(r"[a-z][a-z+.-]*:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    if path.startswith("../") or not (ROOT / path).is_file():
        log.warning("%s links to %s, which does not exist", page, link)
        return None
    return path


def site_path(path: str) -> str:
    """Where the site has a file, by its path from the root."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    shown = path if path.endswith(".md") or Path(path).suffix in PICTURES else f"{path}.md"
    return f"{OUTSIDE}{shown}"


def repository_path(site: str) -> str:
    """The inverse of `site_path` for pages."""
    if not site.startswith(OUTSIDE):
        return f"docs/{site}"
    path = site.removeprefix(OUTSIDE)
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def listing(path: str) -> str:
    """A file as a page: Markdown as it is, other text under its name."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return text
    fence = "`" * 4
    return f"# {path}\n\n{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n{fence}\n"
