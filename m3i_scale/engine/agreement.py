"""What a checkpoint says about the run that wrote it, and whether the run that resumes agrees.

The stream position of a checkpoint means something only in the same order of the same samples, and
its averages only for the same objective. A checkpoint therefore states all that these depend on,
key by key; a difference is refused unless it is accepted by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3i_scale.config import ConfigError

log = logging.getLogger(__name__)

ABSENT = "absent"


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """A tree of mappings as dotted keys below a prefix."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inside in value.items():
        found |= flat(f"{prefix}.{key}", inside)
    return found


def require_agreement(
    path: Path, stored: Mapping[str, Any] | None, now: Mapping[str, Any], accepted: Iterable[str]
) -> list[str]:
    """Refuse to resume under another order, other samples or another objective.

    Args:
        path: the checkpoint.
        stored: its statement; None if it was written before there were any.
        now: the statement of the run that resumes.
        accepted: keys whose change is wanted; a key stands for all below it, too.

    Returns:
        What differs and is accepted, one phrase for each key.

    Raises:
        ConfigError: something differs that is not accepted, or an accepted key does not exist.
    """
    accepted = list(accepted)
    known = {*now, *(stored or ())}
    for word in accepted:
        if not any(_covers(word, key) for key in known):
            raise ConfigError(
                f"--accept-change {word}: there is no such key among those that a checkpoint "
                f"states; the first parts of these are {', '.join(sorted(_roots(known)))}"
            )
    if stored is None:
        return [f"{path} does not say what its order was, so that nothing could be compared"]
    differing = [key for key in sorted(known) if stored.get(key, ABSENT) != now.get(key, ABSENT)]
    phrases = {
        key: f"{key} was {stored.get(key, ABSENT)!r} and is {now.get(key, ABSENT)!r}"
        for key in differing
    }
    refused = [key for key in differing if not any(_covers(word, key) for word in accepted)]
    if refused:
        shown = "; ".join(phrases[key] for key in refused[:4])
        more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise ConfigError(
            f"{path} was written under other settings, with which order, samples or loss differ: "
            f"{shown}{more}. Set them back, choose another run name, or accept it with "
            f"--accept-change {','.join(_shortest(refused))}"
        )
    return [f"accepted: {phrases[key]}" for key in differing]


def _covers(word: str, key: str) -> bool:
    return key == word or key.startswith(f"{word}.")


def _roots(keys: Iterable[str]) -> set[str]:
    """Keys down to their second part."""
    return {".".join(key.split(".")[:2]) for key in keys}


def _shortest(keys: Sequence[str]) -> list[str]:
    """The keys themselves if they are few, else what they have in common."""
    return list(keys) if len(keys) <= 4 else sorted(_roots(keys))
