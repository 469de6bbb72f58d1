"""Bytes of captions, labels and JSON -> text, in one way wherever they are read.

What is not UTF-8 is refused by name and never guessed at: dropping or replacing bytes turns
Shift-JIS or Latin-1 into nonsense that trains.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

from m3i_scale.data.bad_sample import BadSample

MAX_TEXT_BYTES = 1 << 20
_MARK = "\ufeff"  # byte order mark
_MARKS = (  # those of UTF-32 first: UTF-16's is their beginning
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-8, UTF-16 or UTF-32 with a byte order mark, which is removed.

    Raises BadSample ("bad UTF-8") for all other bytes, those of UTF-16 without a mark and of
    ISO-2022 included, although they may pass as UTF-8: these hold NUL or escape characters.
    """
    encoding = "utf-8"
    if not data.isascii():
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), encoding)
    try:
        text = data.decode(encoding).lstrip(_MARK).rstrip("\0")  # NUL pads fields of fixed length
    except UnicodeDecodeError as error:
        raise BadSample("bad UTF-8", f"{error.reason} at byte {error.start}") from None
    for character, likely in (("\0", "UTF-16 without a byte order mark"), ("\x1b", "ISO-2022")):
        if character in text:
            raise BadSample("bad UTF-8", f"character {character!r}, as in {likely}")
    return text


def read_json(text: str) -> Any:
    """A JSON document; raises BadSample."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadSample("bad JSON") from None


def read_json_field(text: str, field: str) -> Any:
    """The value of one field of a JSON object, None where it has none; raises BadSample."""
    document = read_json(text)
    if not isinstance(document, dict):
        raise BadSample("bad JSON", f"a {type(document).__name__}, not an object")
    return document.get(field)


def tidy(text: str) -> str:
    """One line with single spaces, without NUL and byte order marks."""
    return " ".join(text.replace("\0", " ").replace(_MARK, "").split())
