"""The `m3i` command: data to start with, sweeps, what a run has learned, its networks as files.

Exit codes: 0 done; 2 something is wrong and the last line says what.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from m3i_scale import __version__, paths
from m3i_scale.arguments import count, count_or_zero, local_path, path

if TYPE_CHECKING:
    from m3i_scale.config import Config, Source
    from m3i_scale.engine.checkpoint import CheckpointReader

# Heavy imports happen inside the commands, so that `m3i --help` answers at once.

EXAMPLES = """examples:
  m3i glyphs --out data_demo/glyphs
  m3i tokenizer data_demo/glyphs/text.parquet --vocab-size 1000 --out data_demo/tokenizer.json
  m3i eval --run runs/demo --gallery data_demo/glyphs/text.parquet \\
      --queries data_demo/glyphs/heldout.parquet
  m3i export --run runs/demo --which teacher --out backbone.safetensors
"""

# Modules whose `register(commands)` adds parsers with a default `run(options) -> int`, and the
# commands they add. Imported only when one of these is asked for.
ELSEWHERE = {
    "m3i_scale.shards.commands": {
        "glyphs": "draw a small data set from matplotlib's own fonts",
        "shards": "build, index, check and show tar shards of samples",
    },
    "m3i_scale.planner.commands": {
        "plan": "memory, communication, time and data of a run, before it starts",
    },
    "m3i_scale.sweep.commands": {
        "sweep": "run a grid of configurations and seeds at equal compute, and compare them",
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and turn what a user can mend into one sentence."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    traceback = "--traceback" in words
    stop = _Interrupt()
    try:
        options = parse([word for word in words if word != "--traceback"])
        return int(options.run(options))
    except BaseException as error:
        if stop.came:  # as what it arrives depends on what it interrupted
            print("interrupted", file=sys.stderr, flush=True)
            if arguments is None:
                os._exit(130)  # what was interrupted may hang or complain while Python ends
            return 130
        if traceback or not _is_for_users(error):
            raise
        print(f"error: {_words(error)}", file=sys.stderr, flush=True)
        return 2
    finally:
        stop.restore()


class _Interrupt:
    """Remembers that Ctrl-C came, and raises KeyboardInterrupt as Python does."""

    def __init__(self) -> None:
        self.came = False
        self._before = signal.getsignal(signal.SIGINT)
        # Left alone in other threads, and where the shell has told a background job to ignore it.
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and self._before is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._stop)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def restore(self) -> None:
        """Handle the signal as before."""
        if self._ours:
            signal.signal(signal.SIGINT, self._before)


def _is_for_users(error: BaseException) -> bool:
    """Whether the message is all a user needs: bad input, not a fault of the program."""
    return getattr(error, "for_users", False) or isinstance(error, ValueError | OSError)


def _words(error: BaseException) -> str:
    """The message in one line; of the operating system's errors, the file and what is wrong."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror])
    return " ".join(str(error).split())


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line; `a.b=value` may stand on both sides of options."""
    parser = build_parser(words)
    options, more = parser.parse_known_args(words)
    odd = [word for word in more if not re.match(r"[^-=][^=]*=", word)]
    if odd or (more and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(odd or more)}")
    if more:
        options.overrides = [*options.overrides, *more]
    return options


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line; commands that `words` does not ask for may be bare names."""
    parser = argparse.ArgumentParser(
        prog="m3i",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where in the program an error arose (anywhere on the line)",
    )
    parser.add_argument("--version", action="version", version=f"m3i_scale {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for module, summaries in ELSEWHERE.items():
        if asked in summaries:
            importlib.import_module(module).register(commands)
            continue
        for name, summary in summaries.items():
            commands.add_parser(name, help=summary)
    _add_tokenizer(commands)
    _add_eval(commands)
    _add_export(commands)
    return parser


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


# ------------------------------------------------------------------------------------ data to start


def _add_tokenizer(commands: Any) -> None:
    parser = _command(
        commands,
        "tokenizer",
        make_tokenizer,
        "train a WordPiece tokenizer on the captions of indexed shards",
        "The result is a tokenizer.json, and a function of the captions alone.",
    )
    parser.add_argument(
        "index", nargs="+", type=path, metavar="INDEX", help="index files with captions"
    )
    parser.add_argument("--vocab-size", type=count, required=True, help="most tokens")
    parser.add_argument(
        "--out", required=True, type=path, metavar="FILE", help="the tokenizer.json to write"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="read N samples of each index")


def make_tokenizer(options: argparse.Namespace) -> int:
    """`m3i tokenizer`."""
    from m3i_scale.models.tokenizer import train_wordpiece
    from m3i_scale.transfer.features import open_source

    paths.require_folder_of(options.out)
    sources = [open_source(path) for path in options.index]
    for source in sources:
        if source.kind == "category":
            raise ValueError(f"{source.index} has no captions; name an index of kind text or both")
    captions = [caption for source in sources for caption in _captions(source, options.limit)]
    tokenizer = train_wordpiece(captions, options.vocab_size, options.out)
    print(f"{options.out}: {tokenizer.vocab_size:,} tokens from {len(captions):,} captions")
    return 0


def _captions(source: Source, limit: int | None) -> list[str]:
    from m3i_scale.data.make import Sample
    from m3i_scale.data.sequential import walk

    samples = (sample for _, sample in walk(source, limit=limit))
    return [sample.text for sample in samples if isinstance(sample, Sample) and sample.text]


# ------------------------------------------------------------------------------- after the training


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
    from m3i_scale.transfer import evaluation, loading
    from m3i_scale.transfer.precision import choose_precision, prepare

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
        ),
    )
    _write_evaluation(options, reader, precision, result)
    if not options.no_pictures:
        _draw_evaluation(options.folder, config, result)
    print(evaluation.markdown(result.rows), end="")
    print(f"\n{options.which} of {reader.path}, computed in {precision} on {device.type}; "
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
        "rows": [row._asdict() for row in result.rows],
    }
    (options.folder / "eval.json").write_text(json.dumps(content, indent=1) + "\n")


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
        "write the networks of a run as one safetensors file",
        "Needs no GPU, and memory for a few megabytes of weights only. The backbone's tensors\n"
        "have the published names; the file's metadata holds the configuration. Read it with\n"
        "m3i_scale.transfer.export.load_backbone, or any safetensors reader.",
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
        "--out", required=True, type=local_path, metavar="FILE", help="file to write"
    )


def export_run(options: argparse.Namespace) -> int:
    """`m3i export`."""
    from tqdm import tqdm

    from m3i_scale.transfer import export

    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out {options.out}: the file is safetensors; name it *.safetensors")
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
    steps = {checkpoint.step_of(path): path for path in found}
    if not steps:
        raise checkpoint.CheckpointError(f"{folder} holds no complete checkpoint")
    if step is not None and step not in steps:
        raise checkpoint.CheckpointError(
            f"{folder} holds no checkpoint of step {step}; there are {sorted(steps)}"
        )
    path = steps[max(steps) if step is None else step]
    problem = checkpoint.verify(path)
    if problem:
        others = sorted(set(steps) - {checkpoint.step_of(path)})
        raise checkpoint.CheckpointError(
            f"damaged checkpoint: {problem}; choose another one with --step, there are {others}"
        )
    return config, checkpoint.CheckpointReader(path)


if __name__ == "__main__":
    sys.exit(main())
