"""Paths as people write them: `~` and `$VARIABLES` expanded, and folders that can be written to.

A leaf module that imports nothing heavy: the command line needs it before anything else.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)\}|([A-Za-z_]\w*)|(\{))")
_HOME = re.compile(r"~[\w.-]*(?=/|$)")


def expand(text: str) -> str:
    """`~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` is a dollar sign. `pipe:` stays as it is.

    Raises:
        ValueError: a variable is not set or empty, or a user unknown; the message names it.
    """
    if text.startswith("pipe:"):  # a shell command, which its shell expands
        return text
    home = _HOME.match(text)
    before, rest = "", text
    if home:
        before, rest = os.path.expanduser(home[0]), text[home.end() :]
        if before.startswith("~"):
            raise ValueError(f"{text!r}: there is no user {home[0][1:]!r} whose folder {before} is")
    return before + _VARIABLE.sub(lambda found: _value(found, text), rest)


def _value(found: re.Match[str], text: str) -> str:
    dollar, braced, plain, other = found.groups()
    if dollar:
        return "$"
    if other:
        raise ValueError(f"{text!r}: write $NAME or ${{NAME}} for a variable, $$ for a dollar sign")
    value = os.environ.get(braced or plain)
    if not value:
        state = "is not set" if value is None else "is empty"
        raise ValueError(
            f"{text!r}: the environment variable {braced or plain} {state}; set it, or write the "
            "path without it ($$ for a dollar sign)"
        )
    return value


def literal(path: str) -> str:
    """A path as text that `expand` gives back unchanged."""
    escaped = path if path.startswith("pipe:") else path.replace("$", "$$")
    return f"./{escaped}" if escaped.startswith("~") else escaped


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder, and try to write a file there: before an hour of work, not after it.

    Raises:
        ValueError: it cannot be made, is read-only, or its disk is full.
    """
    import tempfile  # takes a fifth of the time in which `m3i --help` answers

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"{folder}: nothing can be written there ({error.strerror}); make room, change its "
            "permissions or name another folder"
        ) from None


def require_folder_of(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a file can be written to `path`."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: there is no folder {Path(path).parent}; make it first")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    require_writable(Path(path).parent)
