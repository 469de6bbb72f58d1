"""Why samples cannot be used: the finding, and what can be done about each cause."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ADDRESS = re.compile(r" <\S+ object at 0x[0-9a-f]+>")
_NEIGHBOURS = (
    "a picture and its texts share their name up to the first dot and stand side by side in the "
    "tar (`tar --sort=name` writes them so)"
)
_REMEDIES = {
    # of shards
    "missing shard": "nothing is at its place: mount or restore it, or index what is there again",
    "shard is a folder": "name the .tar files in it",
    "forbidden shard": "whoever runs this must be allowed to read it: file modes, or the "
    "credentials in data.storage.options",
    "unreadable shard": "the storage did not deliver it after all attempts: try later, or raise "
    "data.storage.retries",
    "truncated shard": "it is shorter than when it was indexed: copy it again, or index it again",
    "shard does not match its index": "it was changed after it was indexed: index it again",
    "shard of another length": "it was changed after it was indexed: index it again",
    # of images
    "undecodable image": "the file is damaged or no image: replace it, or leave it out",
    "too many pixels": "raise data.max_pixels to use them",
    "image of another size": "the annotations are of another version of it: fetch both again",
    # of masks
    "undecodable mask": "the file is damaged or no PNG: replace it, or leave its image out",
    "mask of another size": "make it as large as its image, which EXIF may turn",
    "mask in colours": "write a PNG of one channel, grey or with a palette, whose values are "
    "classes",
    "mask value beyond the classes": "set model.classes to their number, or 255 in the mask for "
    "no class; where 0 is no class set data.zero_is_unlabelled",
    # of captions and categories
    "bad UTF-8": "texts must be UTF-8, or UTF-16 with a byte order mark: convert them, for "
    "instance with `iconv -f SHIFT_JIS -t UTF-8`",
    "empty caption": "give it a caption, or leave it out",
    "absurd caption": "captions may have 1 MiB: is it the right member?",
    "bad JSON": "the member must hold one JSON object",
    "no caption": "the JSON has no text in that field: see `m3i shards index --caption`",
    "bad category": "categories are integers from 0 on, or names of the class list: see "
    "`m3i shards index --category` and `--classes`",
    # of what an index leaves out
    "no image": "name pictures .jpg, .png, .webp, ..., and convert other formats; " + _NEIGHBOURS,
    "members not side by side": _NEIGHBOURS + "; `m3i shards build` rewrites it, too",
    "second picture under one key": "the key of a sample ends at the first dot of its name: "
    "replace the other dots",
    "no category": "give it a label, or index with --kind text",
    "no member": "it is no tar, or an empty one",
    # of what a build leaves out
    "unreadable file": "see that the path is right and may be read, and run the command again",
    "class not in the class list": "add it to the file that --classes names",
    "corrupt tar header": "it is damaged, or no tar: copy it again",
    "truncated": "its end is missing: copy the shard again",
    "empty member": "a file of no bytes",
    "absurd size": "members may have 256 MiB, and a sample 1 GiB from its first to its last",
    "repeated member": "a sample has two members of one kind",
    "repeated key": "two samples have one name",
}


class BadSample(Exception):  # noqa: N818  (a finding about data, not an error of the program)
    """A sample that cannot be used.

    Attributes:
        cause: the short name under which it is counted.
        detail: what was found in this one.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.detail = cause, detail

    def at(self, place: str) -> BadSample:
        """The same finding, whose detail begins with the place."""
        return BadSample(self.cause, f"{place}: {self.detail}" if self.detail else place)


def words_of(error: Exception) -> str:
    """A library's message as a detail: one line, short, without addresses of objects."""
    words = _ADDRESS.sub("", " ".join(str(error).split()))  # of an object that holds the bytes
    return words[:160] or type(error).__name__


class OfOneRank:
    """An error that one sentence explains, and that other ranks, which read elsewhere, do not meet.

    A worker process hands it over as the text of a traceback, which ends with the message.
    """

    for_users = True
    on_one_rank = True

    def __str__(self) -> str:
        return super().__str__().rstrip().rpartition(f"{type(self).__name__}: ")[2]


NO_CAPTION_IN = "no caption in"  # one of several places; what a cause of this kind begins with


def remedy(cause: str) -> str:
    """What to do about a cause; "" where its name says all."""
    if cause.startswith(NO_CAPTION_IN):
        return "the sample's other captions are used: see the places under `captions` of the source"
    return _REMEDIES.get(cause) or (_NEIGHBOURS if cause.startswith("no ") else "")


def explain(causes: Mapping[str, int]) -> list[str]:
    """A line "17 missing shard: what to do" for each cause, the most frequent first."""
    lines, said = [], {""}
    for cause, count in sorted(causes.items(), key=lambda item: -item[1]):
        advice = remedy(cause)
        lines.append(f"{count:,} {cause}" + (f": {advice}" if advice not in said else ""))
        said.add(advice)
    return lines
