"""The one reading of labels: what a .cls member, a JSON field, a table cell or a folder name means.

    "7"  "07"  "7.0"  "+7"  7  7.0                 -> category 7
    -1  ""  null  NaN  "nan"  "None"               -> no category
    "dog"                                          -> a class name, numbered by the class list

Class names are numbered in sorted order, from the first number above all integer labels on, so
that a name never shares a number with an integer label.  The numbers are written to a class list,
a JSON file: a list of names where all labels are names, else an object `{name: number}`.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from m3i_scale.data.bad_sample import BadSample
from m3i_scale.data.files import written
from m3i_scale.data.text import read_text, tidy

# Members and fields that hold a label, the likeliest first; compared without case.
MEMBERS = ("cls", "class", "label", "category")
FIELDS = (
    *MEMBERS,
    "class_id",
    "label_id",
    "category_id",
    "class_idx",
    "class_index",
    "target",
    "class_name",
    "label_name",
    "category_name",
)
LARGEST = (1 << 31) - 1
_LONGEST_NAME = 1000  # characters
# Exponents as C and NumPy print them ("7.0e+00"); a name such as "5e3" stays a name.
_INTEGER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]\d{2,3})?", re.IGNORECASE)
_NONE = frozenset({"", "nan", "null", "none", "<na>", "-nan"})


def read_label(value: Any) -> int | str | None:
    """A category number, a class name, or None where there is no label.

    Args:
        value: bytes of a member, a string, a number, or whatever JSON or Parquet holds.

    Raises:
        ValueError: `value` is no label: a list, an object, infinite, or above 2**31 - 1.
        BadSample: bytes that are no text.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        value = read_text(bytes(value))
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return _read_string(value)
    if isinstance(value, bool | int):
        return _in_range(int(value))
    if isinstance(value, float | Decimal):
        if value in (float("inf"), float("-inf")):
            raise ValueError("the label is infinite")
        return _in_range(int(value)) if value == int(value) else str(value)
    raise ValueError(f"the label is a {type(value).__name__}: {str(value)[:40]!r}")


def _read_string(text: str) -> int | str | None:
    text = tidy(text)
    if text.casefold() in _NONE:
        return None
    if _INTEGER.fullmatch(text):
        if len(text) > 400:
            raise ValueError(f"the label {text[:20]}... has {len(text)} digits")
        number = Decimal(text)
        if number == number.to_integral_value():
            return _in_range(int(number))
    return class_name(text)


def _in_range(number: int) -> int | None:
    if number > LARGEST:
        raise ValueError(f"the label {str(number)[:24]} is above {LARGEST}")
    return number if number >= 0 else None


def class_name(text: str) -> str:
    """A class name in the one form in which names are compared: composed Unicode, trimmed.

    Names of files may hold bytes that are not UTF-8; these appear escaped.
    """
    name = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"the label {name[:24]!r}... has {len(name)} characters")
    return name


def number_names(labels: Iterable[int | str | None]) -> dict[str, int]:
    """Number the class names among `labels`: sorted, from above the largest integer label on."""
    names, first = set[str](), 0
    for label in labels:
        if isinstance(label, str):
            names.add(label)
        elif label is not None:
            first = max(first, label + 1)
    return {name: first + place for place, name in enumerate(sorted(names))}


def category_of(label: int | str | None, classes: Mapping[str, int]) -> int | None:
    """The category number of a label read by `read_label`.

    Raises:
        ValueError: the label is a name that the class list does not have.
    """
    if isinstance(label, str):
        if label not in classes:
            raise ValueError(f"{label!r} is not in the class list")
        return classes[label]
    return label


def write_classes(path: str | os.PathLike[str], classes: Mapping[str, int]) -> None:
    """Write a class list: a JSON list where the numbers are 0 ... n - 1, else an object."""
    names = sorted(classes, key=lambda name: classes[name])
    dense = [classes[name] for name in names] == list(range(len(names)))
    content = names if dense else {name: classes[name] for name in names}
    with written(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=0), "utf-8")


def read_classes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read a class list: a JSON list of names, an object `{name: number}`, or one name a line.

    Raises:
        ValueError: the file is none of these, or gives two names one number.
    """
    try:
        text = read_text(Path(path).read_bytes())
    except BadSample as bad:
        raise ValueError(f"{path} is not a class list: {bad}") from None
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not a class list: its JSON is nested too deeply") from None
    except ValueError:
        content = [line for line in text.splitlines() if line.strip()]
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = [(name, number) for number, name in enumerate(content) if name is not None]
    else:
        pairs = [(content, 0)]
    classes = {class_name(str(name)): number for name, number in pairs}
    numbers = list(classes.values())
    good = all(isinstance(n, int) and 0 <= n <= LARGEST for n in numbers)
    if not classes or not good or len(set(numbers)) < len(pairs):
        raise ValueError(
            f"{path} is not a class list: give a JSON list of different names, or an object "
            "{name: number} with a number of its own for each name"
        )
    return classes


def names_by_number(classes: Mapping[str, int]) -> dict[int, str]:
    """The name of every numbered class."""
    return {number: name for name, number in classes.items()}


def folder_label(name: str) -> int | str | None:
    """The label that a folder's name is: a number, else a class name (also "none" or "nan")."""
    label = read_label(name)
    return class_name(name) if label is None and name.strip().casefold() in _NONE - {""} else label
