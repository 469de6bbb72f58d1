"""A small real data set that needs no download: the characters of matplotlib's own fonts.

Each glyph is drawn once, in a size, place and pair of colours of its own, and saved as JPEG.  Its
caption is the character's Unicode name and the style of the font ("Greek small letter alpha, serif
bold"), its category the Unicode block.  Glyphs of the training fonts (DejaVu, Computer Modern) are
split into an image-text and an image-category source; the STIX fonts, none of whose images is in
either, are the evaluation source and carry both.  Only characters that both sides have are drawn
by default, so that every held-out image shows something that was taught in another typeface.

    build("data_demo/glyphs")  ->  text/, category/, heldout/, each with shards and its index
"""

from __future__ import annotations

import colorsys
import io
import random
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from m3i_scale.shards.small_set import Picture, SmallSet, SmallSetFolder, split_training

BLOCKS: dict[str, tuple[int, int]] = {
    "Basic Latin": (0x0021, 0x007E),
    "Latin-1 Supplement": (0x00A1, 0x00FF),
    "Latin Extended-A": (0x0100, 0x017F),
    "IPA Extensions": (0x0250, 0x02AF),
    "Greek": (0x0370, 0x03FF),
    "Cyrillic": (0x0400, 0x04FF),
    "General Punctuation": (0x2010, 0x205E),
    "Letterlike Symbols": (0x2100, 0x214F),
    "Arrows": (0x2190, 0x21FF),
    "Mathematical Operators": (0x2200, 0x22FF),
    "Miscellaneous Technical": (0x2300, 0x23FF),
    "Box Drawing": (0x2500, 0x257F),
    "Geometric Shapes": (0x25A0, 0x25FF),
    "Miscellaneous Symbols": (0x2600, 0x26FF),
    "Dingbats": (0x2700, 0x27BF),
    "Supplemental Arrows-B": (0x2900, 0x297F),
    "Supplemental Mathematical Operators": (0x2A00, 0x2AFF),
    "Mathematical Alphanumeric Symbols": (0x1D400, 0x1D7FF),
}
OTHER = "Other"
DEMO_BLOCKS = ("Basic Latin", "Arrows")
_HELD_OUT = "STIX"
# Fonts whose character map is TeX's own, or which draw placeholders.
_NOT_UNICODE = ("LastResort", "STIXNonUni", "cmsy", "cmex", "cmmi")
_TEX_TEXT = ("cmb", "cmr", "cmss", "cmti", "cmtt")  # Unicode for letters and digits only


@dataclass(frozen=True)
class Typeface:
    """A font file and how a caption calls its style, e.g. `serif bold`."""

    path: Path
    style: str
    characters: frozenset[int]

    @property
    def held_out(self) -> bool:
        """Whether the typeface is kept for evaluation."""
        return self.path.name.startswith(_HELD_OUT)


@dataclass(frozen=True)
class Glyph:
    """One character of one typeface."""

    typeface: Typeface
    code: int

    @property
    def key(self) -> str:
        """E.g. `u03b1_dejavuserif-bold`: the character before the underscore."""
        return f"u{self.code:04x}_{self.typeface.path.stem.lower()}"

    @property
    def caption(self) -> str:
        """E.g. `Greek small letter alpha, serif bold`."""
        return f"{character_name(self.code)}, {self.typeface.style}"


def character_name(code: int) -> str:
    """The Unicode name in sentence case."""
    return unicodedata.name(chr(code)).capitalize()


def block_of(code: int) -> str:
    """The Unicode block if it is one of BLOCKS, otherwise OTHER."""
    return next((name for name, (low, high) in BLOCKS.items() if low <= code <= high), OTHER)


def typefaces() -> list[Typeface]:
    """The usable fonts inside matplotlib, by file name."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [p for p in sorted(folder.glob("*.ttf")) if not p.name.startswith(_NOT_UNICODE)]
    return [Typeface(path, _style(path.stem), _characters(path)) for path in paths]


def _style(stem: str) -> str:
    name = stem.lower()
    serif = "serif" in name or name.startswith(("stix", "cmr", "cmb", "cmti"))
    family = "monospace" if "mono" in name or name.startswith("cmtt") else "sans"
    words = ["serif" if serif else family]
    words += ["bold"] if "bol" in name or name.startswith("cmb") else []
    words += ["italic"] if "ita" in name or "oblique" in name or name.startswith("cmti") else []
    return " ".join(words)


def _characters(path: Path) -> frozenset[int]:
    """Named, visible characters that the font draws (matplotlib's FreeType reads the map)."""
    from matplotlib.ft2font import FT2Font  # slow to import, and only needed here

    tex = path.name.startswith(_TEX_TEXT)
    codes = FT2Font(str(path)).get_charmap()
    return frozenset(code for code in codes if _visible(code) and not (tex and not _plain(code)))


def _visible(code: int) -> bool:
    character = chr(code)
    kind = unicodedata.category(character)
    return kind[0] not in "CZM" and bool(unicodedata.name(character, ""))


def _plain(code: int) -> bool:
    return code < 0x80 and chr(code).isalnum()


def glyphs(
    faces: Sequence[Typeface], blocks: Iterable[str] | None = DEMO_BLOCKS
) -> tuple[list[Glyph], list[Glyph]]:
    """(training glyphs, held-out glyphs) of the characters in `blocks` that both sides have.

    `blocks=None` takes every named character of every typeface.
    """
    trained = frozenset[int]().union(*(face.characters for face in faces if not face.held_out))
    held = frozenset[int]().union(*(face.characters for face in faces if face.held_out))
    if blocks is not None:
        wanted = set(blocks)
        unknown = wanted - set(BLOCKS)
        if unknown:
            raise ValueError(f"unknown blocks {sorted(unknown)}: choose from {list(BLOCKS)}")
        trained = held = frozenset(code for code in trained & held if block_of(code) in wanted)
    every = [
        Glyph(face, code)
        for face in faces
        for code in sorted(face.characters & (held & trained if face.held_out else trained))
    ]
    return [g for g in every if not g.typeface.held_out], [g for g in every if g.typeface.held_out]


def fitted_font(typeface: Typeface, code: int, longer: float) -> ImageFont.FreeTypeFont | None:
    """The font in the size at which the character's longer side has `longer` pixels (about).

    None where the font draws nothing.
    """
    path = str(typeface.path)
    left, top, right, bottom = ImageFont.truetype(path, 100).getbbox(chr(code))
    if min(right - left, bottom - top) <= 0:
        return None
    return ImageFont.truetype(path, max(8, round(100 * longer / max(right - left, bottom - top))))


def render(glyph: Glyph, size: int, seed: int, *, plain: bool = False) -> bytes | None:
    """The glyph as JPEG of `size` x `size` pixels; None where the font draws nothing.

    Size, place and colours are a function of (seed, glyph); `plain` is black on white.
    """
    rng = random.Random(zlib.crc32(glyph.key.encode()) + (seed << 32))
    character = chr(glyph.code)
    # The longer side fills a part of the picture, so that a dot is a round thing and not a speck.
    font = fitted_font(glyph.typeface, glyph.code, size * rng.uniform(0.55, 0.8))
    if font is None:
        return None
    left, top, right, bottom = font.getbbox(character)
    width, height = right - left, bottom - top
    paper, ink = _colours(rng)  # drawn even if not used: what follows shall not depend on it
    if plain:
        paper, ink = (255, 255, 255), (0, 0, 0)
    canvas = Image.new("RGB", (max(size, int(width)), max(size, int(height))), paper)
    x = rng.uniform(0.35, 0.65) * (canvas.width - width) - left
    y = rng.uniform(0.35, 0.65) * (canvas.height - height) - top
    ImageDraw.Draw(canvas).text((x, y), character, font=font, fill=ink)
    if canvas.getextrema() == tuple((level, level) for level in paper):
        return None
    buffer = io.BytesIO()
    canvas.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dark ink of any hue on light paper of any other."""
    looks = [(rng.uniform(0.0, 0.3), rng.uniform(0.8, 1.0)), (rng.random(), rng.uniform(0.0, 0.4))]
    pair = [colorsys.hsv_to_rgb(rng.random(), saturation, value) for saturation, value in looks]
    return tuple(tuple(round(255 * channel) for channel in colour) for colour in pair)  # type: ignore[return-value]


def build(
    folder: str | Path,
    *,
    image_size: int = 80,
    seed: int = 0,
    blocks: Iterable[str] | None = DEMO_BLOCKS,
    category_share: float = 0.35,
    shards: int = 8,
    plain: bool = False,
) -> SmallSet:
    """Draw the glyphs into `folder` unless it already holds them; return its three sources.

    Args:
        image_size: side of the images in pixels.
        blocks: Unicode blocks to draw, names of BLOCKS; None: all named glyphs (about 46,000).
        category_share: share of the training glyphs that go to the image-category source.
        shards: shards per training source.
        plain: black on white instead of random colours.
    """
    folder, blocks = Path(folder), None if blocks is None else tuple(blocks)
    categories = [name for name in BLOCKS if blocks is None or name in set(blocks)]
    recipe: dict[str, Any] = {
        "image_size": image_size,
        "seed": seed,
        "blocks": None if blocks is None else categories,
        "category_share": category_share,
        "shards": shards,
        "plain": plain,
    }
    made = _folder(folder)
    if not made.holds(recipe):
        trained, held = glyphs(typefaces(), blocks)
        splits = {**split_training(trained, category_share, seed), "heldout": held}
        categories += [OTHER] if blocks is None else []

        def draw(glyph: Glyph) -> Picture | None:
            jpg = render(glyph, image_size, seed, plain=plain)
            if jpg is None:
                return None
            return Picture(glyph.key, jpg, glyph.caption, categories.index(block_of(glyph.code)))

        made.write(recipe, splits, draw, categories, shards=shards)
    return made.load()


def load(folder: str | Path) -> SmallSet:
    """The sources of a folder that `build` made."""
    return _folder(folder).load()


def _folder(folder: str | Path) -> SmallSetFolder:
    return SmallSetFolder(Path(folder), "glyphs", "m3i glyphs")
