"""Why an attempt ended, from the last word of each of its ranks.

Ranks end because of each other: one that dies breaks the collectives of all, one that is frozen
has the watchdogs of all end them. What counts is the word of the rank that was first, and where the
first could say none, who said none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KILLED, UNKNOWN = "killed", "unknown"
MOST_RANKS = 4  # that are named


def cause_of(
    told: Mapping[int, Mapping[str, Any]],
    ranks: int | None,
    hosts: Sequence[str] = (),
    launcher: str = "",
    asked: str = "",
) -> tuple[str, str]:
    """Cause and words of an attempt that is over.

    Args:
        told: the last events (`end`, `stalled`) of the ranks that wrote one.
        ranks: how many there were; None: not known.
        hosts: of each rank.
        launcher: what it said of the first rank that failed.
        asked: by what the attempt was asked to stop, if it was.
    """
    if not told:
        return KILLED, _joined(_of_silence(asked), launcher)
    first = min(sorted(told), key=lambda rank: _order(told[rank]))
    event = told[first]
    cause, words = _cause(event), str(event.get("words", ""))
    silent = sorted(set(range(ranks or 0)) - set(told))
    if cause == "crashed" and event.get("collective"):
        broken = f"rank {first} in {event['collective']}: {words}"
        if not silent:
            return cause, _joined(broken, launcher)
        return KILLED, _joined(f"{_named(silent, hosts)} ended without a word", launcher, broken)
    if cause == "stalled" and silent:
        return cause, _joined(words, f"{_named(silent, hosts)} said nothing")
    return cause, _joined(words, launcher if cause == "crashed" else "")


def _order(event: Mapping[str, Any]) -> int:
    """The smaller, the nearer to what happened first."""
    cause = _cause(event)
    if cause == "stalled":  # one that waits for another in a collective is not the one
        return 2 if "it is in no collective" in str(event.get("words", "")) else 3
    if cause == "crashed":  # a sentence for users knows better
        return 4 if event.get("collective") else 1
    return 5 if cause in ("finished", "stopped") else 0


def _cause(event: Mapping[str, Any]) -> str:
    return "stalled" if event["event"] == "stalled" else str(event.get("cause", UNKNOWN))


def _of_silence(asked: str) -> str:
    if asked:
        return f"asked to stop by {asked}, and killed before it had saved"
    return "no rank said a word"


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = [
        f"rank {rank} ({hosts[rank]})" if rank < len(hosts) else f"rank {rank}"
        for rank in ranks[:MOST_RANKS]
    ]
    more = len(ranks) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _joined(*parts: str) -> str:
    return "; ".join(_filled(parts))


def _filled(parts: Iterable[str]) -> Iterable[str]:
    return (part for part in parts if part)
