"""Which of an image's several captions is shown, and what is said of those that are not there.

`data.sources.N.captions` names places (`txt`, `alt.txt`, `json:caption`) and their weights. The
place is drawn by weight among those of which the sample has a caption, and one of a place's list
evenly. Both draws come from the sample's stream position, so that a resumed run, on any number of
ranks, shows the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m3i_scale.data.bad_sample import NO_CAPTION_IN, BadSample
from m3i_scale.data.decode import decode_captions
from m3i_scale.data.members import kind_of

_ABSENT = ("no caption", "empty caption")  # causes that say that there is nothing
Draw = tuple[float, float]  # uniform in [0, 1): the place, the caption in it


class Chosen(NamedTuple):
    """A caption, and what was found on the way to it."""

    text: str
    repaired: bool
    gaps: list[BadSample]  # places that have no caption that can be used
    others: list[str]  # the captions that were not chosen, where all were asked for


def choose(
    found: Mapping[str, bytes | None],
    weights: Mapping[str, float],
    draw: Draw | None = None,
    *,
    every: bool = False,
) -> Chosen:
    """One caption of a sample.

    Args:
        found: members of the sample by their names, None where it has none.
        weights: places, in the order in which they count without a draw.
        draw: of the place and of its caption; None: the first of both.
        every: read the places that are not chosen, too.

    Raises:
        BadSample: no place has a caption.
    """
    left, gaps = dict(weights), list[BadSample]()
    for place in weights:  # what is not there is not drawn
        if not found.get(kind_of(place)):
            del left[place]
            gaps.append(_gap(place))
    where, which = draw or (0.0, 0.0)
    while left:
        place, where = _drawn(left, where) if draw else (next(iter(left)), 0.0)
        del left[place]
        try:
            captions, repaired = decode_captions(found[kind_of(place)] or b"", place)
        except BadSample as bad:
            gaps.append(_gap(place, bad))
            continue
        number = min(int(which * len(captions)), len(captions) - 1)
        others = [*captions[:number], *captions[number + 1 :]]
        others += _rest(found, left, gaps) if every else []
        return Chosen(captions[number], repaired, gaps, others if every else [])
    damaged = next((gap for gap in gaps if not gap.cause.startswith(NO_CAPTION_IN)), None)
    raise damaged or BadSample("no caption", f"there is none in {', '.join(weights)}")


def _rest(
    found: Mapping[str, bytes | None], left: Mapping[str, float], gaps: list[BadSample]
) -> list[str]:
    captions = []
    for place in left:
        try:
            captions += decode_captions(found[kind_of(place)] or b"", place)[0]
        except BadSample as bad:
            gaps.append(_gap(place, bad))
    return captions


def _drawn(weights: Mapping[str, float], draw: float) -> tuple[str, float]:
    """A place by weight, and what is left of the draw: uniform in [0, 1) again."""
    at = draw * sum(weights.values())
    places: Sequence[str] = list(weights)
    for place in places[:-1]:
        if at < weights[place]:
            return place, at / weights[place]
        at -= weights[place]
    return places[-1], min(max(at / weights[places[-1]], 0.0), 1.0 - 2.0**-53)


def _gap(place: str, bad: BadSample | None = None) -> BadSample:
    if bad is None or bad.cause in _ABSENT:
        return BadSample(f"{NO_CAPTION_IN} {place}")
    return bad.at(place)
