"""The one reading of captions: texts, JSON documents, lists of captions -> a list of captions.

Names of fields are those that people's data have: img2dataset (caption), LAION (TEXT, caption),
LAION-COCO (top_caption, all_captions), COYO and DataComp (text), COCO as Hugging Face has it
(captions, sentences with `raw`), Flickr30k (caption as a list, raw), alt texts, ...
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from m3i_scale.data.text import read_text, tidy

# Members and fields that hold captions, the likeliest first; compared without case.
MEMBERS = ("txt", "caption", "text", "captions")
FIELDS = (
    "caption",
    "captions",
    "text",
    "texts",
    "txt",
    "top_caption",
    "all_captions",
    "title",
    "alt",
    "alt_text",
    "alttext",
    "description",
    "descriptions",
    "sentence",
    "sentences",
    "raw",
    "raw_caption",
    "caption_text",
    "original_caption",
    "prompt",
)
_LITERAL = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_STRING = re.compile(_LITERAL, re.DOTALL)
_SPACE = re.compile(r"\s*")
_DEEPEST = 4


def read_captions(value: Any, depth: int = 0) -> list[str]:
    """The captions in a value of a table, of JSON, or in the bytes or text of a member.

    Lists are flattened; of an object the first known field counts; empty texts are left out and
    white space is single.  What is no text (numbers, None, NaN) gives no caption.

    Raises:
        BadSample: bytes that are no text.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        value = read_text(bytes(value))
    if isinstance(value, str):
        return _from_string(value)
    if isinstance(value, Mapping) and depth < _DEEPEST:
        field = caption_field(value, depth)
        return read_captions(value[field], depth + 1) if field is not None else []
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return [caption for item in value for caption in read_captions(item, depth + 1)]
    return []


def caption_field(document: Mapping[Any, Any], depth: int = 0) -> str | None:
    """The first known field of a JSON object that holds a caption, as it is spelt there."""
    spelt: dict[str, str] = {}
    for name in document:
        if isinstance(name, str):
            spelt.setdefault(name.casefold(), name)
    known = [spelt[field] for field in FIELDS if field in spelt]
    others = [name for folded, name in spelt.items() if folded.endswith("_caption")]
    for name in dict.fromkeys(known + others):
        if read_captions(document[name], depth + 1):
            return name
    return None


def clean(text: str) -> str:
    """A caption on one line: single spaces, no NUL, no halves of characters."""
    return tidy(text.encode("utf-8", "ignore").decode())  # JSON can spell halves of characters


def _from_string(text: str) -> list[str]:
    stripped = text.strip()
    literals = _literals(stripped) if stripped.startswith("[") else None
    parts = [text] if literals is None else map(_unquote, literals)
    return [caption for caption in map(clean, parts) if caption]


def _literals(text: str) -> list[str] | None:
    """The quoted strings of a list as JSON, Python and NumPy print it; None where it is none.

    Strings are parted by a comma, or by white space alone. Each character is looked at once: one
    pattern for the whole list would take minutes for some texts of a megabyte.
    """
    found: list[str] = []
    at, parted = _after_space(text, 1), True
    while (literal := _STRING.match(text, at)) and parted:
        found.append(literal.group())
        end = literal.end()
        at = _after_space(text, end)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        parted = at > end
    return found if found and text[at:] == "]" else None


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _unquote(literal: str) -> str:
    """The text of one quoted string, spelt as JSON or Python spell it."""
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        pass
    try:
        return str(ast.literal_eval(literal))  # a lone string literal, by the pattern above
    except (ValueError, SyntaxError):
        return literal[1:-1]
