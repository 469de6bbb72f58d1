"""The command line: numbers and paths as `type=` functions of argparse, and one line of an answer.

They refuse the impossible with a sentence. The name of a YAML file needs none of them: who reads it
expands it.

A leaf module that imports nothing heavy.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from m3i_scale import paths

_LONGEST_LINE = 2000  # characters


def one_line(message: str) -> str:
    """A message on one line; the middle of one that quotes a megabyte of somebody's file is cut."""
    text = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    if len(text) <= _LONGEST_LINE:
        return text
    return f"{text[: _LONGEST_LINE - 420]} [...] {text[-400:]}"


def count(text: str) -> int:
    """A whole number above zero."""
    return _whole(text, 1)


def count_or_zero(text: str) -> int:
    """A whole number, zero included."""
    return _whole(text, 0)


def positive(text: str) -> float:
    """A finite number above zero."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def share(text: str) -> float:
    """A number above 0, up to 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a share: above 0 and at most 1")
    return value


def percent(text: str) -> int:
    """A whole number from 1 to 100."""
    value = count(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} must be from 1 to 100")
    return value


def path(text: str) -> str:
    """A path or URL with ~ and $VARIABLES replaced; what exists by the letter is taken so."""
    try:
        return text if os.path.lexists(text) else paths.expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """The same of a file or folder of this machine."""
    return Path(path(text))


def _whole(text: str, least: int) -> int:
    value = _number(text)
    if value != int(value) or value < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {least} or more")
    return int(value)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be finite")
    return value
