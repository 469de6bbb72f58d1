"""Numbers on the command line: `type=` functions of argparse, which refuse the impossible ones.

A leaf module that imports nothing heavy.
"""

from __future__ import annotations

import argparse
import math


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
