"""A small detection and segmentation set that needs no download: characters pasted on photographs.

Characters of matplotlib's fonts, one category each, lie on cut-outs of the photographs inside the
wheels of scikit-image and scikit-learn, later ones over earlier ones.  Boxes and masks are those of
what is seen of each.  The validation split has typefaces (STIX) and photographs of its own.

    build("data_demo/pasted")  ->  images/{train,val}/NNNNNN.jpg
                                   annotations/instances_{train,val}.json   COCO, masks as RLE
                                   masks/{train,val}/NNNNNN.png             category of each pixel
                                   crops/{train,val}/CHARACTER/N.jpg        each object by itself
                                   classes.json                             their names, by number

In `masks` 0 is the background, 255 a pixel that only a letter's edge touches (to be ignored).
"""

from __future__ import annotations

import colorsys
import importlib.util
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from m3i_scale.shards.glyphs import Typeface, fitted_font, typefaces

# Photographs inside the wheels, by package and folder; no two show the same scene.
PHOTOGRAPHS: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "train": {
        ("skimage", "data"): (
            "astronaut.png",
            "brick.png",
            "coffee.png",
            "grass.png",
            "gravel.png",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "rocket.jpg",
        ),
        ("sklearn", "datasets/images"): ("china.jpg",),
    },
    "val": {
        ("skimage", "data"): ("chelsea.png",),
        ("sklearn", "datasets/images"): ("flower.jpg",),
    },
}
SPLITS = tuple(PHOTOGRAPHS)
IGNORE = 255
_SOLID, _TOUCHED = 128, 32  # coverage of a pixel (of 255) from which it belongs to a letter, or not
_SEEN = 0.5  # least share of an object that stays in sight
_EMPTY = 0.05  # share of images without objects
_ATTEMPTS = 20  # to find a place for an object

Mask = npt.NDArray[np.bool_]
Coverage = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """What the images are made of, and how many there are.

    `characters`: one category each, numbered from 1. `objects`: most in an image. `sizes`: least
    and most of a character, as shares of the image's side.
    """

    image_size: int = 128
    train: int = 1000
    val: int = 200
    characters: str = "ABEKRSW8"
    objects: int = 4
    sizes: tuple[float, float] = (0.2, 0.5)
    seed: int = 0

    def __post_init__(self) -> None:
        repeated = len(set(self.characters)) < len(self.characters)
        if not 0 < len(self.characters) < IGNORE or repeated:
            raise ValueError(
                f"characters {self.characters!r}: give 1 to {IGNORE - 1} different ones"
            )
        if self.image_size < 32:
            raise ValueError(f"images of {self.image_size} pixels hold no letters; 32 is the least")
        least, most = self.sizes
        if not 0.1 <= least <= most <= 1:
            raise ValueError(
                f"characters of {least:g} to {most:g} of the image's side: give two shares from "
                "0.1 to 1, the smaller one first"
            )


@dataclass(frozen=True)
class Pasted:
    """Where a built set is."""

    folder: Path

    def annotations(self, split: str) -> Path:
        """The COCO file of `train` or `val`."""
        return self.folder / "annotations" / f"instances_{split}.json"

    def images(self, split: str) -> Path:
        """The folder of images of a split."""
        return self.folder / "images" / split

    def masks(self, split: str) -> Path:
        """The folder of category masks of a split, named as the images."""
        return self.folder / "masks" / split

    def crops(self, split: str) -> Path:
        """The folder of a folder of crops for each character."""
        return self.folder / "crops" / split


@dataclass(frozen=True)
class _Object:
    category: int
    mask: Mask  # (S, S), what is seen


@dataclass(frozen=True)
class _Scene:
    image: Image.Image
    objects: tuple[_Object, ...]
    categories: Coverage  # (S, S): category, 0 or IGNORE


def build(folder: str | Path, recipe: Recipe | None = None) -> Pasted:
    """Draw the set into `folder` unless it already holds it.

    Raises:
        ValueError: the folder holds something else; a wheel or a photograph is missing; no typeface
            has one of the characters.
    """
    folder, recipe = Path(folder), recipe or Recipe()
    note = folder / "pasted.json"
    state = {"recipe": {**asdict(recipe), "sizes": list(recipe.sizes)}, "complete": True}
    if note.exists():
        if json.loads(note.read_text()) == state:
            return Pasted(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files: name a new or empty folder")
    faces = {split: _faces(split, recipe.characters) for split in SPLITS}
    photographs = {split: _photographs(split) for split in SPLITS}
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({**state, "complete": False}))
    for name in ("images", "annotations", "masks", "crops"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for split in SPLITS:
        _write(Pasted(folder), split, recipe, faces[split], photographs[split])
    names = {"background": 0} | {name: i for i, name in enumerate(recipe.characters, 1)}
    (folder / "classes.json").write_text(json.dumps(names))
    note.write_text(json.dumps(state))
    return Pasted(folder)


def _faces(split: str, characters: str) -> list[Typeface]:
    """Typefaces of a split that have all characters."""
    wanted = {ord(character) for character in characters}
    own = [face for face in typefaces() if face.held_out == (split == "val")]
    missing = wanted - frozenset[int]().union(*(face.characters for face in own))
    if missing:
        raise ValueError(
            f"no typeface of {split} has {''.join(map(chr, sorted(missing)))!r}: choose characters "
            "that both DejaVu and STIX draw"
        )
    complete = [face for face in own if wanted <= face.characters]
    if not complete:
        raise ValueError(f"no typeface of {split} has all of {characters!r}: choose fewer")
    return complete


def _photographs(split: str) -> list[Image.Image]:
    """The photographs of a split as RGB."""
    paths = [
        _inside(package, folder) / name
        for (package, folder), names in PHOTOGRAPHS[split].items()
        for name in names
    ]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} photographs are missing ({missing[0]}, ...): reinstall scikit-image "
            "and scikit-learn from their wheels"
        )
    return [Image.open(path).convert("RGB") for path in paths]


@cache
def _inside(package: str, folder: str) -> Path:
    """A folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            "the photographs come with scikit-image and scikit-learn: "
            "pip install 'm3i-scale[transfer]'"
        )
    return Path(found.origin).parent / folder


def _write(
    out: Pasted,
    split: str,
    recipe: Recipe,
    faces: Sequence[Typeface],
    photographs: Sequence[Image.Image],
) -> None:
    crops = [out.crops(split) / character for character in recipe.characters]
    for path in (out.images(split), out.masks(split), out.annotations(split).parent, *crops):
        path.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, getattr(recipe, split) + 1):
        rng = random.Random(f"{recipe.seed}/{split}/{number}")
        scene = _scene(rng, recipe, faces, photographs)
        name, size = f"{number:06d}", recipe.image_size
        scene.image.save(out.images(split) / f"{name}.jpg", quality=92)
        _indexed(scene.categories).save(out.masks(split) / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.jpg", "width": size, "height": size})
        for thing in scene.objects:
            entry = {"id": len(annotations) + 1, "image_id": number, **_entry(thing)}
            annotations.append(entry)
            crop = scene.image.crop(_square(entry["bbox"], size))
            crop.save(crops[thing.category - 1] / f"{entry['id']}.jpg", quality=92)
    content = {
        "info": {"description": f"characters pasted on photographs, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": c} for i, c in enumerate(recipe.characters, 1)],
    }
    out.annotations(split).write_text(json.dumps(content))


def _scene(
    rng: random.Random,
    recipe: Recipe,
    faces: Sequence[Typeface],
    photographs: Sequence[Image.Image],
) -> _Scene:
    """One image: a cut-out and the characters on it, each as far as the later ones let it be seen.

    A character that would hide too much of an earlier one is put elsewhere, or left out.
    """
    size = recipe.image_size
    image = _cut_out(rng, rng.choice(photographs), size)
    categories = np.zeros((size, size), np.uint8)
    objects: list[_Object] = []
    whole: list[int] = []  # pixels of each object before others covered it
    count = 0 if rng.random() < _EMPTY else rng.randint(1, recipe.objects)
    for coverage, category in _characters(rng, recipe, faces, count * _ATTEMPTS):
        solid = coverage >= _SOLID
        seen = [_Object(thing.category, thing.mask & ~solid) for thing in objects]
        hidden = any(o.mask.sum() < _SEEN * n for o, n in zip(seen, whole, strict=True))
        if hidden or not solid.any():
            continue
        image.paste(_ink(rng, image, solid), (0, 0, size, size), Image.fromarray(coverage))
        categories[coverage >= _TOUCHED] = IGNORE
        categories[solid] = category
        objects = [*seen, _Object(category, solid)]
        whole.append(int(solid.sum()))
        if len(objects) == count:
            break
    return _Scene(image, tuple(objects), categories)


def _cut_out(rng: random.Random, photograph: Image.Image, size: int) -> Image.Image:
    """A square part of a photograph, half of them mirrored, as size x size pixels."""
    shorter = min(photograph.size)
    side = rng.randint(min(size, shorter), shorter)
    left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
    box = (left, top, left + side, top + side)
    cut = photograph.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


def _characters(
    rng: random.Random, recipe: Recipe, faces: Sequence[Typeface], count: int
) -> Iterator[tuple[Coverage, int]]:
    """Coverage (S, S) of a character somewhere in the image, and its category."""
    size = recipe.image_size
    for _ in range(count):
        category = rng.randrange(len(recipe.characters)) + 1
        character, face = recipe.characters[category - 1], rng.choice(faces)
        font = fitted_font(face, ord(character), size * rng.uniform(*recipe.sizes))
        canvas = Image.new("L", (size, size))
        if font is not None:
            left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
            x = rng.randint(0, max(0, size - (right - left)))
            y = rng.randint(0, max(0, size - (bottom - top)))
            ImageDraw.Draw(canvas).text((x - left, y - top), character, 255, font)
        yield np.asarray(canvas), category


def _ink(rng: random.Random, image: Image.Image, mask: Mask) -> tuple[int, int, int]:
    """A colour of any hue, dark where the photograph is light and light where it is dark."""
    light = float(np.asarray(image.convert("L"))[mask].mean()) > 127
    value = rng.uniform(0.0, 0.4) if light else rng.uniform(0.8, 1.0)
    saturation = rng.uniform(0.0, 1.0 if light else 0.6)
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _square(box: Sequence[int], size: int) -> tuple[int, int, int, int]:
    """A square around a box with a tenth of its longer side on each side, inside the image."""
    x, y, width, height = box
    side = min(size, round(1.2 * max(width, height)))
    left = min(max(0, x + (width - side) // 2), size - side)
    top = min(max(0, y + (height - side) // 2), size - side)
    return left, top, left + side, top + side


def _entry(thing: _Object) -> dict[str, Any]:
    rows, columns = np.nonzero(thing.mask)
    left, top = int(columns.min()), int(rows.min())
    return {
        "category_id": thing.category,
        "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
        "area": int(thing.mask.sum()),
        "segmentation": {"size": list(thing.mask.shape), "counts": run_lengths(thing.mask)},
        "iscrowd": 0,
    }


def run_lengths(mask: Mask) -> list[int]:
    """COCO's uncompressed run lengths of a mask (H, W): column by column, zeros first."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return [int(length) for length in lengths]


def _indexed(categories: Coverage) -> Image.Image:
    """A palette image whose indices are the categories: black background, white where ignored."""
    image = Image.fromarray(categories).convert("P")
    colours = [(0, 0, 0)] * 256
    for index in range(1, IGNORE):
        hue = index * 0.618034 % 1.0  # the golden section: neighbours differ
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.7, 0.9)
        colours[index] = (round(255 * red), round(255 * green), round(255 * blue))
    colours[IGNORE] = (255, 255, 255)
    image.putdata(categories.flatten().tolist())
    image.putpalette([channel for colour in colours for channel in colour])
    return image
