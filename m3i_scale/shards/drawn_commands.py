"""The commands of `m3i` that draw small data sets: `glyphs`, `icons`, `pasted`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from m3i_scale.arguments import count, count_or_zero, path, share

if TYPE_CHECKING:
    from m3i_scale.shards.small_set import SmallSet

Subparsers = Any  # argparse's own type for this is private


def register(subparsers: Subparsers) -> None:
    """Add the commands to an `ArgumentParser.add_subparsers()`; each sets `run(args) -> int`."""
    _add_glyphs(subparsers)
    _add_icons(subparsers)
    _add_pasted(subparsers)


def _add_glyphs(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("glyphs", help="draw the small data set of the demo")
    _add_small_set(parser, "glyphs", out="data_demo/glyphs", category_share=0.35)
    parser.add_argument("--all", action="store_true", help="all named glyphs, about 46,000")
    parser.add_argument("--plain", action="store_true", help="black on white, no colours")
    parser.set_defaults(run=_glyphs)


def _glyphs(args: argparse.Namespace) -> int:
    from m3i_scale.shards.glyphs import DEMO_BLOCKS, build

    blocks = None if args.all else DEMO_BLOCKS
    data = build(
        args.out,
        image_size=args.image_size,
        seed=args.seed,
        blocks=blocks,
        category_share=args.category_share,
        plain=args.plain,
    )
    _print_sources(data, "glyphs")
    return 0


def _add_icons(subparsers: Subparsers) -> None:
    from m3i_scale.shards.icons import HELD_OUT

    parser = subparsers.add_parser(
        "icons",
        help="draw a larger small data set from npm's @iconify/json",
        description="Draw the subjects that most one-coloured icon sets share, black on white. The "
        "package is one download of 100 MB: npm pack @iconify/json. Needs pip install "
        "'m3i-scale[icons]'.",
    )
    parser.add_argument(
        "source", type=path, help="the package: npm's .tgz, or node_modules/@iconify/json"
    )
    _add_small_set(parser, "icons", out="data_icons/icons", category_share=0.5)
    parser.add_argument("--subjects", type=count, default=100, help="how many (%(default)s)")
    parser.add_argument(
        "--held-out",
        nargs="+",
        default=HELD_OUT,
        metavar="SET",
        help=f"to evaluate on ({' '.join(HELD_OUT)})",
    )
    parser.set_defaults(run=_icons)


def _icons(args: argparse.Namespace) -> int:
    from m3i_scale.shards.icons import build

    data = build(
        args.source,
        args.out,
        subjects=args.subjects,
        held_out=args.held_out,
        image_size=args.image_size,
        seed=args.seed,
        category_share=args.category_share,
    )
    _print_sources(data, "icons")
    return 0


def _add_small_set(
    parser: argparse.ArgumentParser, noun: str, *, out: str, category_share: float
) -> None:
    """What every data set of three sources asks for."""
    parser.add_argument("--out", type=path, default=out, help="folder (%(default)s)")
    parser.add_argument("--image-size", type=count, default=80, help="pixels (%(default)s)")
    parser.add_argument("--seed", type=count_or_zero, default=0)
    parser.add_argument(
        "--category-share",
        type=share,
        default=category_share,
        help=f"share of the training {noun} that have a category and no caption (%(default)s)",
    )


def _print_sources(data: SmallSet, noun: str) -> None:
    from m3i_scale.data.index import Index

    for source in (data.text, data.category, data.heldout):
        print(f"{source.index}: {Index(source.index).samples:,} {noun}")


def _add_pasted(subparsers: Subparsers) -> None:
    from m3i_scale.shards.pasted import Recipe

    recipe = Recipe()
    parser = subparsers.add_parser(
        "pasted", help="draw a small detection and segmentation set: characters on photographs"
    )
    parser.add_argument("--out", type=path, required=True, help="a new or empty folder")
    parser.add_argument(
        "--image-size", type=count, default=recipe.image_size, help="pixels (%(default)s)"
    )
    parser.add_argument(
        "--train", type=count, default=recipe.train, help="training images (%(default)s)"
    )
    parser.add_argument(
        "--val",
        type=count,
        default=recipe.val,
        help="images with typefaces and photographs of their own (%(default)s)",
    )
    parser.add_argument(
        "--characters", default=recipe.characters, help="one category each (%(default)s)"
    )
    parser.add_argument(
        "--objects", type=count, default=recipe.objects, help="most in an image (%(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=float,
        nargs=2,
        default=recipe.sizes,
        metavar=("LEAST", "MOST"),
        help="of a character, as shares of the image's side (%(default)s)",
    )
    parser.add_argument("--seed", type=count_or_zero, default=recipe.seed)
    parser.set_defaults(run=_pasted)


def _pasted(args: argparse.Namespace) -> int:
    from m3i_scale.shards.pasted import SPLITS, Recipe, build

    names = ("image_size", "train", "val", "characters", "objects", "seed")
    settings = {name: getattr(args, name) for name in names}
    data = build(args.out, Recipe(**settings, sizes=tuple(args.sizes)))
    for split in SPLITS:
        content = json.loads(data.annotations(split).read_text())
        objects = len(content["annotations"])
        print(f"{data.annotations(split)}: {len(content['images']):,} images, {objects:,} objects")
    return 0
