"""A larger small data set that one download brings: the one-coloured icons of npm's @iconify/json.

Two hundred sets by as many designers draw the same things: a calendar, a star, an arrow to the
left.  The things that most sets draw are the subjects.  An icon's caption is its name and its style
("Arrow left, filled"), its category a tag that the sets file its name under ("arrows").  The icons
of some sets, whose designs no other set takes up, are held out: the set is the "typeface".

    npm pack @iconify/json                       # or `npm install`: the folder works as well
    m3i icons iconify-json-*.tgz --out data_icons/icons

    build("iconify-json-2.2.535.tgz", "data_icons/icons")  ->  text/, category/, heldout/

The sets have licences of their own (collections.md in the package).
"""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from m3i_scale.shards.small_set import Picture, SmallSet, SmallSetFolder, split_training

HELD_OUT = ("bi", "carbon", "ph", "solar")
OTHER = "other"
_TAGS = 12  # categories beside OTHER
_HELD_OUT_SETS = 2  # that must draw a subject, or none of its test pictures is like another
_PADDING = 0.08  # of the picture's side, around an icon's own box
# Styles that sets write into names without saying so in their own list of prefixes and suffixes.
_STYLES = ("fill", "filled", "outline", "outlined", "solid", "duotone", "twotone")
# An element that could name a file of this machine or an address, or draws with installed fonts.
_REFUSED = ("<image", "<foreignobject", "<text", "<script", "<style", "<animate", "<set")


@dataclass(frozen=True)
class Icon:
    """One drawing of one set."""

    set_name: str
    subject: str  # e.g. `arrow left`
    style: str  # e.g. `filled`; empty: the set's own
    tags: tuple[str, ...]
    svg: str

    @property
    def key(self) -> str:
        """E.g. `mdi_arrow-left_outline`."""
        return "_".join((self.set_name, self.subject, self.style)).replace(" ", "-")

    @property
    def caption(self) -> str:
        """E.g. `Arrow left, filled`."""
        return ", ".join(filter(None, (self.subject.capitalize(), self.style)))


def build(
    source: str | Path,
    folder: str | Path,
    *,
    subjects: int = 100,
    held_out: Collection[str] = HELD_OUT,
    image_size: int = 80,
    seed: int = 0,
    category_share: float = 0.5,
    shards: int = 8,
) -> SmallSet:
    """Draw icons into `folder` unless it already holds them; return its three sources.

    Args:
        source: the package @iconify/json, as npm's .tgz or as an unpacked folder.
        subjects: how many names, those first that most sets draw.
        held_out: the sets to evaluate on, by prefix.
        image_size: side of the images in pixels; black on white.
        category_share: share of the training icons that go to the image-category source.
        shards: shards per training source.

    Raises:
        ValueError: `source` is no such package, or holds too little.
        ModuleNotFoundError: resvg-py, which draws SVG, is not installed.
    """
    recipe: dict[str, Any] = {
        "source": _identity(Path(source)),
        "subjects": subjects,
        "held_out": sorted(held_out),
        "image_size": image_size,
        "seed": seed,
        "category_share": category_share,
        "shards": shards,
    }
    made = SmallSetFolder(Path(folder), "icons", f"m3i icons {source}")
    if not made.holds(recipe):
        _require_renderer()
        trained, held = select(list(read(source)), subjects, held_out)
        categories = categories_of(trained)
        names = [*sorted(set(categories.values()) - {OTHER}), OTHER]

        def draw(icon: Icon) -> Picture | None:
            jpg = render(icon.svg, image_size)
            if jpg is None:
                return None
            return Picture(icon.key, jpg, icon.caption, names.index(categories[icon.subject]))

        splits = {**split_training(trained, category_share, seed), "heldout": held}
        made.write(recipe, splits, draw, names, shards=shards)
    return made.load()


def read(source: str | Path) -> Iterator[Icon]:
    """Every visible icon of the package's one-coloured sets, by set and name."""
    for name, text in _files(Path(source)):
        try:
            content = json.loads(text)
            if content["info"]["palette"]:
                continue
            yield from _icons(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{source}: {name} is not a set of icons in Iconify's format ({error!r}); download "
                "the package again: npm pack @iconify/json"
            ) from None


def select(
    icons: Sequence[Icon], subjects: int, held_out: Collection[str]
) -> tuple[list[Icon], list[Icon]]:
    """(training icons, held-out icons) of the `subjects` names that most training sets draw.

    A subject is drawn by at least two held-out sets. A set's numbered variants and sizes count
    once: the first of each style stays.
    """
    missing = set(held_out) - {icon.set_name for icon in icons}
    if missing:
        raise ValueError(f"no one-coloured set is called {sorted(missing)}: choose others")
    sets: defaultdict[str, set[str]] = defaultdict(set)
    for icon in icons:
        sets[icon.subject].add(icon.set_name)
    held = set(held_out)
    drawn = {name: len(by - held) for name, by in sets.items() if len(by & held) >= _HELD_OUT_SETS}
    ranked = sorted((-count, name) for name, count in drawn.items() if count)
    if len(ranked) < subjects:
        raise ValueError(
            f"training and held-out sets share {len(ranked):,} subjects, {subjects:,} are asked for"
        )
    chosen = {name for _, name in ranked[:subjects]}
    first = {icon.key: icon for icon in reversed(icons) if icon.subject in chosen}
    ordered = [first[key] for key in sorted(first)]
    return (
        [icon for icon in ordered if icon.set_name not in held],
        [icon for icon in ordered if icon.set_name in held],
    )


def categories_of(icons: Sequence[Icon]) -> dict[str, str]:
    """Subject to category: of the tags that lead most subjects, the one most sets give it."""
    tags: defaultdict[str, Counter[str]] = defaultdict(Counter)
    # A set counts once, however many styles it draws.
    for subject, _, tag in {(i.subject, i.set_name, tag) for i in icons for tag in i.tags}:
        tags[subject][tag] += 1
    ranked = {
        subject: sorted(tags[subject], key=lambda tag: (-tags[subject][tag], tag))
        for subject in sorted({icon.subject for icon in icons})
    }
    leading = Counter(order[0] for order in ranked.values() if order)
    kept = {tag for tag, _ in leading.most_common(_TAGS)}
    return {name: next((t for t in order if t in kept), OTHER) for name, order in ranked.items()}


def render(svg: str, size: int) -> bytes | None:
    """Black on white as JPEG of `size` x `size` pixels; None where nothing is drawn."""
    import resvg_py  # an extra

    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
        )
    except ValueError:  # not SVG
        return None
    image = Image.open(io.BytesIO(png)).convert("L")
    darkest, lightest = image.getextrema()
    if lightest - darkest < 64:
        return None
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _require_renderer() -> None:
    if importlib.util.find_spec("resvg_py") is None:
        raise ModuleNotFoundError(
            "icons are drawn by resvg-py, which is not installed: pip install 'm3i-scale[icons]'"
        )


def _identity(source: Path) -> str:
    """Name and version: npm's archive has its version in its name, a folder in a file."""
    package = source / "package.json"
    if not package.is_file():
        return source.name
    return f"{source.name} {json.loads(package.read_text('utf-8')).get('version')}"


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each `json/*.json` of the package, in a fixed order."""
    if source.is_dir():
        found = sorted((source / "json").glob("*.json"))
        yield from ((path.name, path.read_bytes()) for path in found)
    elif source.exists():
        try:
            with tarfile.open(source) as tar:
                for member in tar:
                    path = Path(member.name)
                    if path.parts[1:-1] == ("json",) and path.suffix == ".json":
                        file = tar.extractfile(member)
                        if file is not None:
                            yield path.name, file.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{source} is not npm's archive of @iconify/json ({error})") from None
        found = [source]
    else:
        found = []
    if not found:
        raise ValueError(
            f"{source}: neither the folder @iconify/json nor its .tgz; make the latter with "
            "`npm pack @iconify/json`"
        )


def _icons(content: dict[str, Any]) -> Iterator[Icon]:
    tags: defaultdict[str, set[str]] = defaultdict(set)
    for tag, names in (content.get("categories") or {}).items():
        for name in names:
            tags[name].add(str(tag).lower())
    prefixes = [key for key in content.get("prefixes") or {} if key]
    suffixes = [key for key in content.get("suffixes") or {} if key]
    for name, icon in content["icons"].items():
        if icon.get("hidden") or any(word in icon["body"].lower() for word in _REFUSED):
            continue
        subject, style = _words(name, prefixes, suffixes)
        svg = _svg({**content, **icon})
        yield Icon(content["prefix"], subject, style, tuple(sorted(tags[name])), svg)


def _words(name: str, prefixes: Sequence[str], suffixes: Sequence[str]) -> tuple[str, str]:
    """(subject, style) of an icon's name: `24-arrow-left-filled` is an arrow left, filled."""
    styles: list[str] = []
    for end in sorted(suffixes, key=len, reverse=True):
        if name.endswith(f"-{end}"):
            name, styles = name[: -len(end) - 1], end.split("-")
            break
    for start in sorted(prefixes, key=len, reverse=True):
        if name.startswith(f"{start}-"):
            name, styles = name[len(start) + 1 :], [*start.split("-"), *styles]
            break
    words = name.split("-")
    while len(words) > 1 and (words[-1] in _STYLES or words[-1].isdigit()):
        styles.insert(0, words.pop())
    return " ".join(words), " ".join(word for word in styles if not word.isdigit())


def _svg(icon: dict[str, Any]) -> str:
    """A whole document of a square around the icon's box; Iconify's defaults are 0, 0, 16, 16."""
    left, top, width, height = (
        float(icon.get(key) or default)
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height) * (1 + 2 * _PADDING)
    box = (left + (width - side) / 2, top + (height - side) / 2, side, side)
    view = " ".join(f"{value:g}" for value in box)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{icon["body"]}</svg>'
