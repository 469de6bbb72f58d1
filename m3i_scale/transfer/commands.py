"""The commands about what a run has learned: `m3i eval`, `m3i export` and `m3i push`.

The only module of this package that knows the engine: it opens the checkpoints that the others
take as `loading.Weights`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3i_scale import paths
from m3i_scale.arguments import count, count_or_zero, local_path, path

if TYPE_CHECKING:
    from m3i_scale.config import Config
    from m3i_scale.engine.checkpoint import CheckpointReader


def register(commands: Any) -> None:
    """Add the commands to an `ArgumentParser.add_subparsers()`; each sets `run(options) -> int`."""
    _add_eval(commands)
    _add_export(commands)
    _add_push(commands)


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], summary: str, more: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=function)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", dest="folder", required=True, type=local_path, help="folder of the run"
    )
    parser.add_argument(
        "--step", type=count_or_zero, help="of the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--which",
        choices=("student", "teacher"),
        default="student",
        help="the trained weights or, for the image encoder, their teacher averages "
        "(default: student)",
    )


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        evaluate_run,
        "measure what a run has learned, beside the untrained networks and chance",
        "Zero-shot: the nearest of all captions, right if it names the same thing (the part\n"
        "before its first comma). kNN: 20 weighted neighbours in the gallery. Chance: the best\n"
        "accuracy of an answer that ignores the image. Prints a table and writes eval.json,\n"
        "retrieval.png and curves.png into the run's folder.",
    )
    _add_run(parser)
    parser.add_argument(
        "--gallery",
        nargs="+",
        type=path,
        required=True,
        metavar="INDEX",
        help="images with known labels",
    )
    parser.add_argument(
        "--queries",
        nargs="+",
        type=path,
        required=True,
        metavar="INDEX",
        help="held-out images to classify",
    )
    parser.add_argument("--probe", action="store_true", help="fit linear probes, too")
    parser.add_argument(
        "--retrieval", nargs="*", type=count, metavar="K",
        help="recall at K of the queries' captions by image, and of images by caption (1 5 10)",
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=local_path, metavar="FILE",
        help="names of the categories, one a line: zero-shot classification by name",
    )  # fmt: skip
    parser.add_argument(
        "--templates", type=local_path, metavar="FILE",
        help="sentences for --classes, one a line, with {} for the name "
        "(default: 'a photo of a {}.')",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=count, metavar="N", help="use the first N images of each index"
    )
    parser.add_argument("--neighbours", type=count, default=20, help="of kNN (default 20)")
    parser.add_argument("--batch", type=count, default=64, help="images at once (default 64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "tf32", "fp32"), default="auto",
        help="of the networks (default: bf16 on a GPU that has it, else fp32); stated in eval.json",
    )  # fmt: skip
    parser.add_argument(
        "--subject", default="caption subject", metavar="WORD",
        help="what captions name, in the table (character, species, ...)",
    )  # fmt: skip
    parser.add_argument(
        "--category", default="category", metavar="WORD", help="what categories are, in the table"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write no pictures")


def evaluate_run(options: argparse.Namespace) -> int:
    """`m3i eval`."""
    import torch
    from m3i_kernels import set_backend

    from m3i_scale.cluster.launch import choose_device
    from m3i_scale.transfer import evaluation, loading, prompts
    from m3i_scale.transfer.precision import choose_precision, prepare

    if options.templates and not options.classes:
        raise ValueError("--templates are sentences for the names in --classes; name that file")
    named = prompts.Prompts.read(options.classes, options.templates) if options.classes else None
    depths = options.retrieval
    config, reader = _open_run(options.folder, options.step)
    paths.require_writable(options.folder)
    device = choose_device(options.device, "fp32", 0)
    precision = choose_precision(options.precision, device)
    set_backend(config.engine.kernels)
    networks = {
        evaluation.TRAINED: loading.build_trained(config, reader, options.which),
        evaluation.UNTRAINED: loading.build_untrained(config),
    }
    if device.type == "cpu":  # the networks run side by side
        torch.set_num_threads(max(1, torch.get_num_threads() // len(networks)))
    prepare(networks, device, precision)
    result = evaluation.evaluate(
        config,
        networks,
        options.gallery,
        options.queries,
        evaluation.Options(
            probe=options.probe,
            neighbours=options.neighbours,
            batch=options.batch,
            limit=options.limit,
            subject=options.subject,
            category=options.category,
            recall_at=() if depths is None else sorted(set(depths)) or evaluation.RECALL_AT,
            prompts=named,
        ),
    )
    _write_evaluation(options, reader, precision, result)
    if not options.no_pictures:
        _draw_evaluation(options.folder, config, result)
    track_evaluation(options.folder, config, reader.state["step"], result.rows)
    print(evaluation.markdown(result.rows), end="")
    ranks = ", ".join(f"{value:.1f} {name}" for name, value in result.ranks.items())
    print(f"\neffective rank of the queries' features: {ranks}")
    for sample in result.left_out[:10]:
        print(f"left out: {sample}")
    if len(result.left_out) > 10:
        print(f"left out: {len(result.left_out) - 10} more")
    print(f"{options.which} of {reader.path}, computed in {precision} on {device.type}; "
          f"written to {options.folder / 'eval.json'}")  # fmt: skip
    return 0


def _write_evaluation(
    options: argparse.Namespace, reader: CheckpointReader, precision: str, result: Any
) -> None:
    """Write eval.json: the table and all that is needed to repeat it."""
    import json

    content = {
        "checkpoint": str(reader.path),
        "step": reader.state["step"],
        "which": options.which,
        "precision": precision,
        "gallery": {"indexes": options.gallery, "images": len(result.gallery)},
        "queries": {"indexes": options.queries, "images": len(result.queries)},
        "neighbours": options.neighbours,
        "limit": options.limit,
        "classes": options.classes and str(options.classes),
        "templates": options.templates and str(options.templates),
        "effective_rank": result.ranks,
        "left_out": len(result.left_out),
        "rows": [row._asdict() for row in result.rows],
    }
    (options.folder / "eval.json").write_text(json.dumps(content, indent=1) + "\n")


def track_evaluation(run: Path, config: Config, step: int, rows: Sequence[Any]) -> None:
    """Send the table of `m3i eval` and its pictures to the trackers of the run.

    What is not installed here is left out: an evaluation may run elsewhere than the training.
    """
    from m3i_scale.cluster import launch
    from m3i_scale.engine import checkpoint, tracker_backends, trackers

    missing = trackers.missing_packages(config.logging.trackers)
    names = [name for name in config.logging.trackers if name not in missing]
    if not names:
        return
    launch.setup_logging(0)
    identity = checkpoint.current_lineage(run / "checkpoints").run or config.run
    opening = tracker_backends.Opening(
        folder=run, name=config.run, identity=identity, project=config.logging.project,
        settings=config.model_dump(mode="json"), first=None,
    )  # fmt: skip
    told = trackers.Trackers(names, opening)
    told.table(step, "eval", [row._asdict() for row in rows])
    for name in ("retrieval", "curves"):
        if (run / f"{name}.png").is_file():
            told.picture(step, name, run / f"{name}.png")
    told.close()


def _draw_evaluation(run: Path, config: Config, result: Any) -> None:
    from m3i_scale.transfer import pictures

    pictures.save_retrieval(run / "retrieval.png", result, config.data.image_size)
    if (run / "metrics.jsonl").is_file():
        pictures.save_curves(run / "curves.png", run / "metrics.jsonl")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        export_run,
        "write the networks of a run as a file, or its backbone for other libraries",
        "Without --format: one safetensors file, whose tensors have the published names and whose\n"
        "metadata holds the configuration. With --format: a folder with weights, configuration,\n"
        "image processor and a model card that says how to load it (docs/tasks/export.md):\n\n"
        "  m3i           m3i_scale.load_backbone, with the attention pooling\n"
        "  timm          timm.create_model('local-dir:FOLDER', pretrained=True)\n"
        "  transformers  transformers.AutoModel.from_pretrained('FOLDER')\n"
        "  onnx          standard operators, checked in onnxruntime against torch\n\n"
        "Needs no GPU, and but for onnx memory for a few megabytes of weights only.",
    )
    _add_run(parser)
    parser.add_argument(
        "--part",
        choices=("backbone", "all"),
        default="backbone",
        help="the image encoder, or all networks (default: backbone)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    parser.add_argument(
        "--format",
        choices=("m3i", "timm", "transformers", "onnx"),
        help="write a folder that this library reads (default: one safetensors file)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        metavar="PATH",
        help="file or, with --format, folder",
    )


def export_run(options: argparse.Namespace) -> int:
    """`m3i export`."""
    return _export_file(options) if options.format is None else _export_folder(options)


def _export_file(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from m3i_scale.transfer import export

    if options.out.suffix != ".safetensors":
        raise ValueError(
            f"--out {options.out}: the file is safetensors; name it *.safetensors, or say with "
            "--format which folder to write"
        )
    paths.require_folder_of(options.out)
    config, reader = _open_run(options.folder, options.step)
    total = export.size(reader, config, part=options.part, dtype=options.dtype)
    with tqdm(total=total, desc="export", unit="B", unit_scale=True) as bar:
        export.export(
            reader,
            config,
            options.out,
            which=options.which,
            part=options.part,
            dtype=options.dtype,
            progress=bar.update,
        )
    print(f"{options.out}: {options.which}, {options.part}, {options.dtype}, {total:,} bytes")
    return 0


def _export_folder(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from m3i_scale.transfer import card, folder

    if options.part != "backbone":
        raise ValueError("--part all goes into one file: leave out --format")
    if options.out.suffix in (".safetensors", ".onnx"):
        raise ValueError(
            f"--out {options.out}: --format {options.format} writes a folder; name one"
        )
    folder.require_new(options.out)
    paths.require_writable(options.out.absolute().parent)
    config, reader = _open_run(options.folder, options.step)
    figures = card.figures(options.folder, options.which, int(reader.state["step"]))
    with tqdm(desc="export", unit="B", unit_scale=True) as bar:
        folder.export_folder(
            reader,
            config,
            options.out,
            format=options.format,
            which=options.which,
            dtype=options.dtype,
            figures=figures,
            progress=bar.update,
        )
    print(f"{options.out}: {options.which}, {options.format}, {options.dtype}; see its README.md")
    return 0


def _add_push(commands: Any) -> None:
    parser = _command(
        commands,
        "push",
        push_folder,
        "upload an exported folder to the Hugging Face Hub",
        "FOLDER is what m3i export --format wrote. Read its README.md first, and add a licence:\n"
        "it becomes the page of the model. The token is that of `hf auth login`, or HF_TOKEN.",
    )
    parser.add_argument("folder", type=local_path, metavar="FOLDER", help="exported folder")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME on the Hub")
    parser.add_argument(
        "--dry-run", action="store_true", help="show files and sizes that would go; send nothing"
    )
    parser.add_argument("--private", action="store_true", help="if the repository is made")


def push_folder(options: argparse.Namespace) -> int:
    """`m3i push`."""
    from m3i_scale.transfer import push

    files = push.files_of(options.folder)
    push.require_repository(options.repository)
    total = sum(file.size for file in files)
    verb = "would go" if options.dry_run else "go"
    for file in files:
        print(f"{file.size:>15,}  {file.name}")
    print(f"{total:>15,}  bytes in {len(files)} files {verb} to {options.repository}", flush=True)
    if not options.dry_run:
        print(push.push(options.folder, options.repository, files, private=options.private))
    return 0


def _open_run(folder: Path, step: int | None) -> tuple[Config, CheckpointReader]:
    """Configuration and undamaged checkpoint of a run: the newest, or the one of a step.

    Raises:
        ConfigError: there is no such run or its configuration cannot be read.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    from m3i_scale.config import load_config
    from m3i_scale.engine import checkpoint

    config = load_config(folder / "config.yaml")
    found = checkpoint.complete_checkpoints(folder / "checkpoints")
    steps = {checkpoint.step_of(one): one for one in found}
    if not steps:
        raise checkpoint.CheckpointError(f"{folder} holds no complete checkpoint")
    if step is not None and step not in steps:
        raise checkpoint.CheckpointError(
            f"{folder} holds no checkpoint of step {step}; there are {sorted(steps)}"
        )
    chosen = steps[max(steps) if step is None else step]
    problem = checkpoint.verify(chosen)
    if problem:
        others = sorted(set(steps) - {checkpoint.step_of(chosen)})
        raise checkpoint.CheckpointError(
            f"damaged checkpoint: {problem}; choose another one with --step, there are {others}"
        )
    return config, checkpoint.CheckpointReader(chosen)
