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
from collections.abc import Sequence
from types import FrameType

from m3i_scale import __version__
from m3i_scale.arguments import one_line

EXAMPLES = """examples:
  m3i glyphs --out data_demo/glyphs
  m3i tokenizer data_demo/glyphs/text.parquet --vocab-size 1000 --out data_demo/tokenizer.json
  m3i eval --run runs/demo --gallery data_demo/glyphs/text.parquet \\
      --queries data_demo/glyphs/heldout.parquet
  m3i export --run runs/demo --which teacher --out backbone.safetensors
  m3i export --run runs/demo --format onnx --out demo-onnx
"""

# Modules whose `register(commands)` adds parsers with a default `run(options) -> int`, and the
# commands they add. A module is imported only when one of its commands is asked for, so that
# `m3i --help` answers at once.
COMMANDS = {
    "m3i_scale.demo": {
        "demo": "draw data, pre-train a small network on two CPU ranks, and show what it learned",
    },
    "m3i_scale.transfer_demo": {
        "transfer-demo": "classify, detect and segment from the demo's backbone and without it",
    },
    "m3i_scale.shards.commands": {
        "shards": "build, index, check and show tar shards of samples",
        "tokenizer": "train a WordPiece tokenizer on the captions of indexed shards",
    },
    "m3i_scale.shards.drawn_commands": {
        "glyphs": "draw a small data set from matplotlib's own fonts",
        "icons": "draw a larger one from the icon sets of npm's @iconify/json",
        "pasted": "draw a small detection and segmentation set: characters on photographs",
    },
    "m3i_scale.cluster.doctor": {
        "doctor": "what this machine has for training, what is missing, and what to do",
    },
    "m3i_scale.planner.commands": {
        "plan": "memory, communication, time and data of a run, before it starts",
    },
    "m3i_scale.report.commands": {
        "report": "where the time of a run went: training, start-ups, waits, interruptions",
    },
    "m3i_scale.sweep.commands": {
        "sweep": "run a grid of configurations and seeds at equal compute, and compare them",
    },
    "m3i_scale.transfer.commands": {
        "eval": "measure what a run has learned, beside the untrained networks and chance",
        "export": "write the networks of a run as a file, or its backbone for other libraries",
        "push": "upload an exported folder to the Hugging Face Hub",
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
        return one_line(": ".join([*names, error.strerror]))
    return one_line(str(error))


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
    for module, summaries in COMMANDS.items():
        if asked in summaries:
            importlib.import_module(module).register(commands)
            continue
        for name, summary in summaries.items():
            commands.add_parser(name, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
