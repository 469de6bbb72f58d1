"""The data commands of `m3i`: `shards build|index|check|show` and `tokenizer`."""

from __future__ import annotations

import argparse
import csv
import json
import os
from typing import Any, get_args

from m3i_scale import paths
from m3i_scale.arguments import count, count_or_zero, path, percent
from m3i_scale.config import Source, SourceKind, Storage
from m3i_scale.data.storage import StorageClient

Subparsers = Any  # argparse's own type for this is private


def register(subparsers: Subparsers) -> None:
    """Add the commands to an `ArgumentParser.add_subparsers()`; each sets `run(args) -> int`."""
    shards = subparsers.add_parser("shards", help="build, index, check and show tar shards")
    actions = shards.add_subparsers(required=True, metavar="build|index|check|show")
    _add_build(actions)
    _add_index(actions)
    _add_check(actions)
    _add_show(actions)
    _add_tokenizer(subparsers)


def _add_build(actions: Subparsers) -> None:
    parser = actions.add_parser(
        "build", help="write shards from an image folder, a table or archives"
    )
    parser.add_argument(
        "source",
        type=path,
        help="a folder of images; or tables (.csv, .tsv, .jsonl, .parquet) or archives (.tar, "
        ".zip) as a path, a glob or braces in quotes: 'dir/{000..127}.tar'",
    )
    parser.add_argument(
        "folder", type=path, help="where the shards go; the index is <folder>.parquet"
    )
    parser.add_argument("--shard-samples", type=count, default=10_000, help="at most (%(default)s)")
    parser.add_argument("--shard-mib", type=count, default=1024, help="about at most (%(default)s)")
    parser.add_argument(
        "--resize", type=count_or_zero, default=0, help="shorter side in pixels, 0: keep"
    )
    parser.add_argument("--reencode", action="store_true", help="write every image as RGB JPEG")
    parser.add_argument("--quality", type=percent, default=90, help="of new JPEGs (%(default)s)")
    parser.add_argument("--image-column", help="column of a table: paths, URLs or bytes of images")
    parser.add_argument("--caption-column", help="column of a table that holds captions")
    parser.add_argument("--category-column", help="column of a table that holds categories")
    _add_class_list(parser)
    parser.add_argument(
        "--seed", type=count_or_zero, default=0, help="of the shuffle (%(default)s)"
    )
    _add_common(parser)
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> int:
    from m3i_scale.shards.build import Recipe, build_shards

    summary = build_shards(
        args.source,
        args.folder,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_mib << 20,
        recipe=Recipe(args.resize, args.reencode, args.quality),
        seed=args.seed,
        processes=args.processes,
        image_column=args.image_column,
        text_column=args.caption_column,
        category_column=args.category_column,
        classes=_class_list(args.classes),
    )
    print(summary)
    return 0


def _add_index(actions: Subparsers) -> None:
    parser = actions.add_parser("index", help="index shards that exist already, local or remote")
    parser.add_argument(
        "shards",
        nargs="+",
        type=path,
        help=".tar files: paths, URLs, folders, globs, or braces in quotes: 's3://b/{000..127}.tar'",
    )
    parser.add_argument(
        "--out", "--output", "-o", required=True, type=path, help="the Parquet file to write"
    )
    parser.add_argument(
        "--kind",
        required=True,
        choices=get_args(SourceKind),
        help="what every sample must have beside its image: a caption (text), a class label "
        "(category), or both; samples without it are left out and counted. Give the kind under "
        "which data.sources of the configuration will name this index",
    )
    parser.add_argument(
        "--caption",
        action="append",
        help="member with the caption, by default found: txt, json:caption, ...; several times for "
        "samples with several captions, of which each needs one",
    )
    parser.add_argument(
        "--category", help="member with the category, by default found: cls, json:label, ..."
    )
    _add_class_list(parser)
    parser.add_argument(
        "--skip-unreached",
        action="store_true",
        help="index the others where shards are missing or cannot be read",
    )
    _add_common(parser)
    _add_storage(parser)
    parser.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> int:
    from m3i_scale.shards.indexing import index_shards

    summary = index_shards(
        args.shards,
        args.out,
        kind=args.kind,
        text_member=args.caption,
        category_member=args.category,
        classes=_class_list(args.classes),
        processes=args.processes,
        storage=_storage(args),
        skip_unreached=args.skip_unreached,
    )
    print(summary)
    return 0


def _add_check(actions: Subparsers) -> None:
    parser = actions.add_parser("check", help="read and decode every sample; list the bad ones")
    parser.add_argument("index", type=path, help="the Parquet index")
    parser.add_argument(
        "--out",
        "--output",
        "-o",
        type=path,
        help="write cause, shard and key of bad samples as CSV",
    )
    parser.add_argument(
        "--categories",
        type=int,
        metavar="N",
        help="model.categories of the run: samples of category N and above are bad",
    )
    parser.add_argument("--max-pixels", type=int, help="as data.max_pixels of the run will be")
    _add_storage(parser)
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from m3i_scale.shards.inspect import check

    options = {} if args.max_pixels is None else {"max_pixels": args.max_pixels}
    report = check(args.index, categories=args.categories, storage=_storage(args), **options)
    print(report)
    if report.largest_category >= 0:
        print(f"  the largest category is {report.largest_category:,}")
    if args.out:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("cause", "shard", "key"), *report.bad])
    else:
        for cause, shard, key in report.bad[:20]:
            print(f"{cause}\t{shard}\t{key}")
        if len(report.bad) > 20:
            print(f"... and {len(report.bad) - 20:,} more: --output FILE lists all")
    return 1 if report.bad else 0


def _add_show(actions: Subparsers) -> None:
    parser = actions.add_parser("show", help="draw a contact sheet with captions and histograms")
    parser.add_argument("index", type=path, help="the Parquet index")
    parser.add_argument(
        "--out",
        "--output",
        "-o",
        type=path,
        default="shards.png",
        help="PNG to write (%(default)s)",
    )
    parser.add_argument("--count", type=count, default=48, help="samples to draw (%(default)s)")
    parser.add_argument("--seed", type=count_or_zero, default=0, help="which ones (%(default)s)")
    parser.add_argument(
        "--classes",
        type=path,
        metavar="FILE",
        help="class list to name categories by (default: the index's)",
    )
    _add_storage(parser)
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    from m3i_scale.data.labels import names_by_number
    from m3i_scale.shards.inspect import show

    classes = _class_list(args.classes)
    show(
        args.index,
        args.out,
        count=args.count,
        seed=args.seed,
        classes=names_by_number(classes) if classes else None,
        storage=_storage(args),
    )
    print(args.out)
    return 0


def _add_tokenizer(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a WordPiece tokenizer on the captions of indexed shards",
        description="Train a WordPiece tokenizer on the captions of indexed shards.\n\n"
        "The result is a tokenizer.json, and a function of the captions alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "index", nargs="+", type=path, metavar="INDEX", help="index files with captions"
    )
    parser.add_argument("--vocab-size", type=count, required=True, help="most tokens")
    parser.add_argument(
        "--out", required=True, type=path, metavar="FILE", help="the tokenizer.json to write"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="read N samples of each index")
    parser.set_defaults(run=_tokenizer)


def _tokenizer(args: argparse.Namespace) -> int:
    from m3i_scale.data.sequential import source_of
    from m3i_scale.models.tokenizer import train_wordpiece

    paths.require_folder_of(args.out)
    sources = [source_of(path) for path in args.index]
    for source in sources:
        if source.kind == "category":
            raise ValueError(f"{source.index} has no captions; name an index of kind text or both")
    captions = [caption for source in sources for caption in _captions(source, args.limit)]
    tokenizer = train_wordpiece(captions, args.vocab_size, args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens from {len(captions):,} captions")
    return 0


def _captions(source: Source, limit: int | None) -> list[str]:
    from m3i_scale.data.make import Sample
    from m3i_scale.data.sequential import walk

    found = [sample for _, sample in walk(source, limit=limit) if isinstance(sample, Sample)]
    return [text for sample in found for text in (sample.text, *sample.others) if text]


def _add_class_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        type=path,
        metavar="FILE",
        help="class list that numbers the labels that are names (the classes.json of the training "
        "set, for a validation set); by default names are numbered in sorted order",
    )


def _class_list(file: str | None) -> dict[str, int] | None:
    from m3i_scale.data.labels import read_classes

    return read_classes(file) if file else None


def _add_common(parser: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    parser.add_argument("--processes", "-j", type=count, default=cores, help="(%(default)s)")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage-options",
        type=_file_system_options,
        default={},
        metavar="JSON",
        help='per protocol, e.g. \'{"s3": {"endpoint_url": "https://..."}}\'',
    )
    parser.add_argument("--allow-pipe", action="store_true", help="run shards named pipe:<command>")


def _file_system_options(text: str) -> dict[str, Any]:
    options = json.loads(text)
    if not isinstance(options, dict) or not all(isinstance(v, dict) for v in options.values()):
        raise ValueError
    return options


_file_system_options.__name__ = "JSON"  # argparse: invalid JSON value


def _storage(args: argparse.Namespace) -> StorageClient:
    return StorageClient(Storage(options=args.storage_options, allow_pipe=args.allow_pipe))
