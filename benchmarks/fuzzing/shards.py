"""Damaged tars, pictures, captions and labels: no good sample changes, and what is bad has a name.

Damage after indexing: the samples that it did not touch come at the same positions with the same
content. Damage before: every sample that comes is one sample, not the picture of one with the
caption of another. What stands in a member: its neighbours come as they were.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing import samples
from fuzzing.damage import (
    NAMED,
    NUMBERS,
    REFUSED,
    Random,
    attempt,
    changed,
    damaged,
    first_difference,
    require,
    resized,
)
from fuzzing.samples import SAMPLES, Members, clean, index_of, members_of, picture, stream_of, tar

BLOCK = 512

# ------------------------------------------------------------------------------------------- tars


def tar_changed_later(rng: Random, folder: Path) -> str:
    """Bytes of an indexed shard are changed, its length is not."""
    path, spans = _sound(folder)
    shard, touched = changed(rng, clean())
    (folder / "a.tar").write_bytes(shard)
    good = {
        number
        for number, (start, stop) in enumerate(spans)
        if not any(low < stop and high > start for low, high in touched)
    }
    return samples.check_neighbours(stream_of(path), _expected(), good)


def tar_resized_later(rng: Random, folder: Path) -> str:
    """An indexed shard is cut, or bytes are inserted or removed: the samples before that stay."""
    path, spans = _sound(folder)
    shard = resized(rng, clean())
    (folder / "a.tar").write_bytes(shard)
    first = first_difference(shard, clean())
    good = {number for number, (_, stop) in enumerate(spans) if stop <= first}
    return samples.check_neighbours(stream_of(path), _expected(), good)


def tar_lying_headers(rng: Random, folder: Path) -> str:
    """Headers with a right checksum say wrong sizes, kinds or extended fields; then indexed."""
    shard = bytearray(clean())
    with tarfile.open(fileobj=io.BytesIO(shard)) as file:
        headers = [info.offset for info in file.getmembers()]
    for _ in range(int(rng.integers(1, 4))):
        _lie(rng, shard, int(rng.choice(headers)))
    return samples.check_pairs(index_of(folder, bytes(shard)), cut=True)


def tar_rearranged(rng: Random, folder: Path) -> str:
    """Members are removed, repeated, renamed or moved before the shard is indexed."""
    members = [member for number in range(SAMPLES) for member in members_of(number)]
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(members)))
        match int(rng.integers(6)):
            case 0:
                del members[at]
            case 1:
                members.insert(int(rng.integers(len(members))), members[at])
            case 2:
                members.append(members.pop(at))
            case 3:
                members.insert(at, (str(rng.choice(_ODD_NAMES)), rng.bytes(20)))
            case 4:
                name, data = members[at]
                members[at] = (f"{'d/' * int(rng.integers(1, 60))}{name}", data)
            case _:
                name, data = members[at]
                members[at] = (name.replace(".", rng.choice([".x.", "..", "", " ."])), data)
    format = int(rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    return samples.check_pairs(index_of(folder, tar(members, format=format)))


def tar_foreign(rng: Random, folder: Path) -> str:
    """Something else is indexed as a shard, alone or after, before or within a sound one."""
    pieces = [
        rng.bytes(int(rng.integers(1, 20_000))),
        bytes(int(rng.integers(1, 60_000))),
        gzip.compress(clean()),
        b"<html>404 Not Found</html>" * 100,
        tar([("in.tar", clean())]),
        b"PK\x03\x04" + rng.bytes(3000),
        _pax_bomb(rng),
        damaged(rng, clean()),
        clean()[: int(rng.integers(len(clean())))],
    ]
    chosen = [pieces[int(rng.integers(len(pieces)))] for _ in range(int(rng.integers(1, 3)))]
    if rng.random() < 0.5:
        chosen.insert(int(rng.integers(2)), clean())
    return samples.check_pairs(index_of(folder, b"".join(chosen)), changed=True)


_ODD_NAMES = (
    "x", ".", "..", "/", ".hidden.jpg", "a/.b.txt", "é.jpg", "a" * 300 + ".txt", "__x.json",
    "PaxHeaders.0/a.jpg", "a.jpg.txt", "a b.cls", "\x01.jpg", "00001..jpg", "dir/", "-.jpg",
)  # fmt: skip


def _lie(rng: Random, shard: bytearray, at: int) -> None:
    """Change one field of the header at a byte, and its checksum with it."""
    number = int(rng.choice(np.array(NUMBERS, dtype=object)))
    octal = b"%011o\0" % (abs(number) % 8**11)
    binary = b"\x80" + (number % 2**88).to_bytes(11, "big")
    match int(rng.integers(5)):
        case 0:
            shard[at + 124 : at + 136] = octal
        case 1:
            shard[at + 124 : at + 136] = binary
        case 2:
            shard[at + 124 : at + 136] = rng.bytes(12)
        case 3:
            shard[at + 156 : at + 157] = b"%c" % b"01234567LKSxgXDV\0"[int(rng.integers(17))]
        case _:
            shard[at + 257 : at + 512] = rng.bytes(255)
    shard[at + 148 : at + 156] = b" " * 8
    shard[at + 148 : at + 156] = b"%06o\0 " % sum(shard[at : at + BLOCK])


def _pax_bomb(rng: Random) -> bytes:
    """Extended headers that lie about lengths, sizes and paths."""
    records = [
        b"99999999999 path=x\n", b"9 path=\n", b"30 size=99999999999999999999\n",
        b"18 size=99999999\n", b"12 size=-1\n\n", b"0 path=x\n", b"-5 path=x\n",
        b"20 path=" + b"\xff" * 11 + b"\n", b"17 GNU.sparse=\0\0\n",
    ]  # fmt: skip
    body = b"".join(records[i] for i in rng.integers(len(records), size=4))
    info = tarfile.TarInfo("pax")
    info.type, info.size = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)[rng.integers(2)], len(body)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + body + bytes(-len(body) % BLOCK) + clean()


@cache
def _index_bytes(folder: Path) -> tuple[bytes, list[tuple[int, int]]]:
    path = index_of(folder, clean())
    return path.read_bytes(), samples.ranges(path)


def _sound(folder: Path) -> tuple[Path, list[tuple[int, int]]]:
    """The index of the sound shard, and where its samples lie."""
    content, spans = _index_bytes(folder)
    path = folder / "index.parquet"
    path.write_bytes(content)
    return path, spans


_known: dict[str, samples.Delivered] = {}


def _expected(kind: str = "both") -> samples.Delivered:
    """What the sound shard delivers."""
    if kind not in _known:
        import tempfile

        with tempfile.TemporaryDirectory() as name:
            _known[kind] = samples.delivered(stream_of(index_of(Path(name), clean(), kind), kind))[
                0
            ]
    return _known[kind]


# ---------------------------------------------------------------------------------- in one member


def _in_sample(folder: Path, rng: Random, replaced: Members, **members: str) -> str:
    """Put members in the place of one sample's own; all other samples must come as they were.

    Where the index leaves the sample out, every other one must be in it.
    """
    bad = int(rng.integers(SAMPLES))
    whole: Members = []
    for number in range(SAMPLES):
        own = dict(members_of(number))
        if number == bad:
            own |= {f"{number:05d}.{kind}": data for kind, data in replaced}
        whole += own.items()
    path = index_of(folder, tar(whole), **members)
    stream = stream_of(path)
    if stream.samples == SAMPLES:
        return samples.check_neighbours(stream, _expected(), set(range(SAMPLES)) - {bad})
    require(stream.samples == SAMPLES - 1, "shifted", f"{stream.samples} samples are indexed")
    require(bool(list(stream.indexes[0].problems())), "silent", "left out without a cause")
    samples.check_pairs(path)
    return NAMED


FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}),
    ("PNG", "I;16", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
    ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "jpeg"}),
    ("PPM", "RGB", {}), ("AVIF", "RGB", {}), ("JPEG2000", "RGB", {}),
)  # fmt: skip


def _any_picture(rng: Random) -> bytes:
    format, mode, options = FORMATS[int(rng.integers(len(FORMATS)))]
    return picture(int(rng.integers(3)), format, mode, **options)


def image_changed(rng: Random, folder: Path) -> str:
    """Bytes of a picture are changed."""
    return _in_sample(folder, rng, [("jpg", changed(rng, _any_picture(rng))[0])])


def image_resized(rng: Random, folder: Path) -> str:
    """A picture is cut, or bytes are inserted, removed, or are of something else."""
    data = resized(rng, _any_picture(rng))
    if rng.random() < 0.1:
        data = rng.bytes(int(rng.integers(1, 3000)))
    return _in_sample(folder, rng, [("jpg", data)])


def image_lying(rng: Random, folder: Path) -> str:
    """A picture says a size that it does not have, or unpacks to far more than it weighs."""
    from fuzzing import bombs

    return _in_sample(folder, rng, [("jpg", bombs.lying_picture(rng))])


def image_notes(rng: Random, folder: Path) -> str:
    """EXIF, ICC and comments are damaged, lie, or unpack to far more than they weigh."""
    from fuzzing import bombs

    return _in_sample(folder, rng, [("jpg", bombs.lying_notes(rng))])


def caption_bytes(rng: Random, folder: Path) -> str:
    """A caption in another encoding, with control characters, endless or empty."""
    text = "Ein schöner Löwe 獅子 😀 " * int(rng.integers(1, 30))
    encodings = ("utf-8", "utf-16", "utf-16-le", "utf-32", "shift_jis", "gb18030", "latin-1",
                 "iso2022_jp", "utf-7")  # fmt: skip
    found = text.encode(str(rng.choice(encodings)), "ignore")
    n = int(rng.choice([10, 1000, 100_000, 1_040_000]))
    lists = [
        b'["a"' + b" " * n + b"x",
        b'["a"' + b"," * n + b"]",
        b"[" + b'"a" ' * (n // 4) + b"]",
        b'["' + b"\\" * n + b'"]',
        b"['a'" + b"\n" * n + b"'b'" + b" " * (n // 2) + b"]]",
        b'["' + b"a\\'" * (n // 3),
    ]
    choices = [
        found, damaged(rng, found), rng.bytes(n // 10 + 1), bytes(n), b" \n\t" * (n // 3),
        b"x" * (n + 20_000), b"\xef\xbb\xbf" * (n // 3), *lists,
    ]  # fmt: skip
    return _in_sample(folder, rng, [("txt", choices[int(rng.integers(len(choices)))])])


def caption_json(rng: Random, folder: Path) -> str:
    """A JSON document with the caption and label of a sample: deep, huge, of other types."""
    return _in_sample(
        folder, rng, [("json", json_document(rng))],
        text_member="json:caption", category_member="json:label",
    )  # fmt: skip


def json_document(rng: Random) -> bytes:
    """A document whose caption or label is not what it should be."""
    n = int(rng.choice([2, 100, 5000, 200_000]))
    caption, label = '"caption 1"', "1"
    odd = [
        "null", "true", "NaN", "Infinity", "-Infinity", "1e400", "-1", "9" * n, "0." + "3" * n,
        "[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, '"\\ud83d"', '"\\u0000"',
        '"' + "x" * n + '"',
        "[" + ",".join(['"a"'] * n) + "]", "{}", "[]", '[null,{"raw":"x"}]', '"' + "9" * n + '"',
        '"1e+99"', '"7.0e+00"', '"' + "\\ud83d" * n + '"', "1e99", '"["',
        '{"caption": {"caption": 3}}',
    ]  # fmt: skip
    value = odd[int(rng.integers(len(odd)))]
    if rng.random() < 0.5:
        caption = value
    else:
        label = value
    text = f'{{"caption": {caption}, "label": {label}}}'
    match int(rng.integers(6)):
        case 0:
            return value.encode("utf-8", "surrogatepass")
        case 1:
            return damaged(rng, text.encode())
        case 2:
            return text.encode("utf-16")
        case _:
            return text.encode()


def labels(rng: Random, folder: Path) -> str:
    """A label that is a name, too large, negative, many digits, other bytes."""
    n = int(rng.choice([3, 500, 5000, 1_040_000]))
    odd = [
        b"", b"-1", b"7.5", b"9" * n, b"nan", b"1e99", b"1e+99", b"1e+999", b"0x10", b"dog",
        b"x" * n, b" " * n, bytes(n), "٣".encode(), "１２".encode(), b"[1]", b"null", b"1\n2",
        b"1_000", b"+-1", b"2147483648", b"18446744073709551616", rng.bytes(min(n, 5000)),
        b"-" * n, b"1." + b"0" * n, damaged(rng, b"12345"), "7".encode("utf-16"),
    ]  # fmt: skip
    return _in_sample(folder, rng, [("cls", odd[int(rng.integers(len(odd)))])])


# ----------------------------------------------------------------------------------------- indexes


def index_damaged(rng: Random, folder: Path) -> str:
    """Bytes of an index are changed or lost: it is refused, or everything comes as it was."""
    content, _ = _index_bytes(folder)
    (folder / "a.tar").write_bytes(clean())
    path = folder / "index.parquet"
    path.write_bytes(damaged(rng, content))
    return _refused_or_same(path)


def index_lying(rng: Random, folder: Path) -> str:
    """An index whose offsets, sizes, counts, columns or notes are not those of its shard."""
    from fuzzing import indexes

    (folder / "a.tar").write_bytes(clean())
    path = folder / "index.parquet"
    _sound(folder)
    indexes.lie(rng, path)
    return _refused_or_same(path, lying=True)


def _refused_or_same(path: Path, *, lying: bool = False) -> str:
    """Refused in a sentence, or every sample that comes is right."""
    if attempt(lambda: stream_of(path)) is not None:
        return REFUSED
    stream = stream_of(path)
    if attempt(lambda: samples.delivered(stream)) is not None:
        return REFUSED
    if lying:
        return samples.check_pairs(path)
    return samples.check_neighbours(stream, _expected(), set(range(SAMPLES)))
