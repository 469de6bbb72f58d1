"""How bytes are damaged, and what is said of an outcome."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

Random = np.random.Generator
MIB = 1 << 20
LONGEST_SENTENCE = 2000  # characters
NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1,
           2**63, 2**64, 10**30)  # fmt: skip

# Outcomes of an input that was handled as promised.
UNHARMED, NAMED, REFUSED = "unharmed", "named", "refused"


class Violation(Exception):  # noqa: N818  (a finding)
    """A promise that an input broke: `kind` is "shifted", "silent", "traceback" or "sentence"."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(kind, words)
        self.kind, self.words = kind, words


def require(holds: bool, kind: str, words: str) -> None:
    """Raise Violation unless a promise holds."""
    if not holds:
        raise Violation(kind, words)


def attempt(action: Callable[[], object], *, tool: bool = False) -> str | None:
    """The sentence that an action is refused with, or None where it succeeds.

    Args:
        action: what a user asks for.
        tool: a command of `m3i`, which takes any ValueError for a refusal; training does not.

    Raises:
        Violation: it ended in a traceback, another exit code than 2, or no single sentence.
    """
    from m3i_scale.arguments import one_line
    from m3i_scale.cli import _is_for_users, _words
    from m3i_scale.engine.ending import exit_code

    try:
        action()
    except Violation:
        raise
    except Exception as error:
        named = f"{type(error).__name__}: {error}"[:300]
        code = (2 if _is_for_users(error) else None) if tool else exit_code(error)
        if code != 2:
            raise Violation("traceback", named) from error
        sentence = _words(error) if tool else one_line(str(error))
        require(bool(sentence.strip()), "sentence", f"empty {type(error).__name__}")
        require(len(sentence) <= LONGEST_SENTENCE, "sentence", f"{len(sentence)} characters")
        require("Traceback" not in sentence, "sentence", named)
        require("\n" not in sentence, "sentence", f"several lines: {sentence!r}"[:300])
        sentence.encode("utf-8", "backslashreplace")
        return sentence
    return None


def changed(rng: Random, data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """Damage that keeps the length, and the ranges that it touched."""
    out, ranges = bytearray(data), list[tuple[int, int]]()
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(out)))
        match int(rng.integers(4)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
                stop = at + 1
            case 1:
                stop = min(len(out), at + int(rng.integers(1, 700)))
                out[at:stop] = bytes(stop - at)
            case 2:
                stop = min(len(out), at + int(rng.integers(1, 700)))
                out[at:stop] = rng.bytes(stop - at)
            case _:
                word = _word(rng)[: len(out) - at]
                stop = at + len(word)
                out[at:stop] = word
        ranges.append((at, stop))
    return bytes(out), ranges


def resized(rng: Random, data: bytes) -> bytes:
    """Damage that changes the length: cut, removed, repeated or inserted bytes."""
    at = int(rng.integers(len(data) + 1))
    stop = min(len(data), at + int(rng.integers(1, max(2, len(data) // 4))))
    match int(rng.integers(5)):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[stop:]
        case 2:
            return data[:stop] + data[at:]
        case 3:
            return data[:at] + rng.bytes(int(rng.integers(1, 2000))) + data[at:]
        case _:
            return data[:at] + bytes(int(rng.integers(1, 20_000)))


def damaged(rng: Random, data: bytes) -> bytes:
    """Either kind of damage."""
    if rng.random() < 0.6 and data:
        return changed(rng, data)[0]
    return resized(rng, data)


def first_difference(one: bytes, other: bytes) -> int:
    """Where two byte strings begin to differ."""
    length = min(len(one), len(other))
    a, b = (np.frombuffer(x, np.uint8, count=length) for x in (one, other))
    unequal = np.flatnonzero(a != b)
    return int(unequal[0]) if len(unequal) else length


def _word(rng: Random) -> bytes:
    """A number that readers of lengths trip over, in some width and byte order."""
    width = int(rng.choice([1, 2, 4, 8]))
    value = int(rng.choice(np.array(NUMBERS[:-2], dtype=object))) % (1 << 8 * width)
    return value.to_bytes(width, "little" if rng.random() < 0.5 else "big")


def write(path: Path, data: bytes) -> Path:
    """Write bytes, and return the path."""
    path.write_bytes(data)
    return path
