"""Pictures that lie about their size, and notes in pictures that unpack to more than they weigh."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np

from fuzzing.damage import NUMBERS, Random, damaged
from fuzzing.samples import picture

PNG = b"\x89PNG\r\n\x1a\n"
SIDES = (0, 1, 7, 999, 1000, 1001, 20_000, 65_500, 65_535, 2**24, 2**31 - 1, 2**32 - 1)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def lying_picture(rng: Random) -> bytes:
    """A picture of some format whose header says another size, or that is far larger unpacked."""
    width, height = (int(rng.choice(SIDES)) for _ in range(2))
    makers = (_png, _jpeg, _gif, _bmp, _tiff, _ppm, _webp, _avif, _jpeg2000, _scans, _deep)
    return makers[int(rng.integers(len(makers)))](rng, width, height)


def _png(rng: Random, width: int, height: int) -> bytes:
    depth, colour = int(rng.choice([1, 2, 4, 8, 16, 3])), int(rng.choice([0, 2, 3, 4, 6, 9]))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(rng.integers(2)))
    body = zlib.compress(bytes(int(rng.choice([10, 10_000, 30_000_000]))))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    if rng.random() < 0.3:  # a second header, larger
        parts.insert(1, chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)))
    if rng.random() < 0.2:
        parts.insert(1, chunk(b"PLTE", bytes(3 * int(rng.integers(300)))))
    return PNG + b"".join(parts)


def _jpeg(rng: Random, width: int, height: int) -> bytes:
    data = bytearray(picture(1, "JPEG", "RGB", progressive=bool(rng.integers(2))))
    at = re.search(rb"\xff[\xc0\xc2]", data).start()  # type: ignore[union-attr]
    struct.pack_into(">HH", data, at + 5, height % 65536, width % 65536)
    if rng.random() < 0.3:  # another frame before it
        data[2:2] = b"\xff\xc0\0\x11\x08\0\x20\0\x28\x03\x01\x22\0\x02\x11\x01\x03\x11\x01"
    if rng.random() < 0.2:  # sampling factors and number of components
        data[at + 9 + int(rng.integers(10))] = int(rng.integers(256))
    return bytes(data)


def _scans(rng: Random, width: int, height: int) -> bytes:
    """A progressive JPEG of the largest size allowed whose scans are repeated without end."""
    data = bytearray(picture(1, "JPEG", "RGB", progressive=True))
    at = data.index(b"\xff\xc2")
    struct.pack_into(">HH", data, at + 5, 1000, 1000)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    scan = data[starts[1] : starts[2]]
    return bytes(data[:-2]) + bytes(scan) * int(rng.choice([10, 300, 20_000])) + b"\xff\xd9"


def _gif(rng: Random, width: int, height: int) -> bytes:
    data = bytearray(picture(1, "GIF", "P"))
    struct.pack_into("<HH", data, 6, width % 65536, height % 65536)
    if rng.random() < 0.5:
        at = data.index(b"\x2c")
        struct.pack_into("<HHHH", data, at + 1, *(int(v) for v in rng.integers(65536, size=4)))
    return bytes(data)


def _bmp(rng: Random, width: int, height: int) -> bytes:
    data = bytearray(picture(1, "BMP", "RGB"))
    struct.pack_into("<II", data, 18, width, height)
    if rng.random() < 0.5:
        struct.pack_into("<HI", data, 28, int(rng.choice([1, 4, 8, 16, 24, 32])),
                         int(rng.integers(7)))  # fmt: skip
    return bytes(data)


def _tiff(rng: Random, width: int, height: int) -> bytes:
    tags = {
        256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, int(rng.choice([1, 5, 8, 32773]))),
        262: (3, int(rng.integers(4))), 273: (4, 8), 277: (3, int(rng.choice([1, 3, 4, 65535]))),
        278: (4, int(rng.choice(SIDES))), 279: (4, int(rng.choice(SIDES))),
    }  # fmt: skip
    if rng.random() < 0.4:
        tags |= {322: (4, int(rng.choice(SIDES))), 323: (4, int(rng.choice(SIDES))), 324: (4, 8),
                 325: (4, int(rng.choice(SIDES)))}  # fmt: skip
    body = zlib.compress(bytes(5_000_000))
    at = 8 + len(body) + len(body) % 2
    entries = b"".join(
        struct.pack("<HHII", tag, kind, int(rng.choice([1, 1, 1, 3, 2**28])), value)
        for tag, (kind, value) in sorted(tags.items())
    )
    head = struct.pack("<2sHI", b"II", 42, at) + body + bytes(len(body) % 2)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def _ppm(rng: Random, width: int, height: int) -> bytes:
    kind, top = str(rng.choice(["P1", "P2", "P3", "P4", "P5", "P6", "Pf", "PF", "Py"])), 255
    tops = (top, 65535, 0, 10**9)
    return f"{kind} {width} {height} {int(rng.choice(tops))}\n".encode() + b"1 " * 2000


def _webp(rng: Random, width: int, height: int) -> bytes:
    data = bytearray(picture(1, "WEBP", "RGBA", lossless=True))
    at = data.find(b"VP8X")
    if at >= 0 and rng.random() < 0.5:
        data[at + 12 : at + 18] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    else:
        at = data.index(b"VP8")
        data[at + 4 : at + 8] = struct.pack("<I", int(rng.choice(SIDES)))
        struct.pack_into("<I", data, at + 9, (width & 0x3FFF) | (height & 0x3FFF) << 14)
    return bytes(data)


def _avif(rng: Random, width: int, height: int) -> bytes:
    data = bytearray(picture(1, "AVIF", "RGB"))
    at = data.index(b"ispe")
    struct.pack_into(">II", data, at + 8, width, height)
    return bytes(data)


def _jpeg2000(rng: Random, width: int, height: int) -> bytes:
    data = bytearray(picture(1, "JPEG2000", "RGB"))
    if rng.random() < 0.3:
        at = data.find(b"ihdr")
        struct.pack_into(">II", data, at + 4, height, width)
        return bytes(data)
    at = data.index(b"\xff\x4f\xff\x51") + 8
    fields = [width, height, 0, 0, width, height, 0, 0]
    if rng.random() < 0.5:
        fields[int(rng.integers(8))] = int(rng.choice(SIDES))
    struct.pack_into(">8I", data, at, *fields)
    if rng.random() < 0.3:
        struct.pack_into(">H", data, at + 32, int(rng.choice([0, 1, 3, 4, 255, 16384])))
    return bytes(data)


def _deep(rng: Random, width: int, height: int) -> bytes:
    """The largest size allowed, really there, in the modes that take most memory."""
    depth, colour = ((16, 0), (16, 6), (8, 6), (8, 4), (16, 2), (1, 3))[int(rng.integers(6))]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + -(-1000 * depth * channels // 8))
    header = struct.pack(">IIBBBBB", 1000, 1000, depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\x01") if colour == 3 else b""
    body = chunk(b"IDAT", zlib.compress(row * 1000, 1))
    return PNG + chunk(b"IHDR", header) + palette + body + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------- notes


def lying_notes(rng: Random) -> bytes:
    """A sound picture with notes that are damaged or lie."""
    exif = b"Exif\0\0" + _exif(rng)
    packed = zlib.compress(bytes(int(rng.choice([100, 100_000_000]))))
    many = int(rng.choice([1, 50]))
    match int(rng.integers(5)):
        case 0:
            data = picture(1)
            marker = bytes([0xFF, int(rng.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]))])
            body = [exif, b"ICC_PROFILE\0\x01\xff" + rng.bytes(100), rng.bytes(60_000)][
                int(rng.integers(3))
            ][:65_000]
            length = len(body) + 2 if rng.random() < 0.7 else int(rng.integers(65536))
            note = marker + struct.pack(">H", length) + body
            return data[:2] + note * many + data[2:]
        case 1:
            notes = [
                chunk(b"iCCP", b"x\0\0" + packed), chunk(b"zTXt", b"x\0\0" + packed),
                chunk(b"iTXt", b"x\0\x01\0\0\0" + packed), chunk(b"eXIf", exif[6:]),
                chunk(b"tEXt", b"x\0" + bytes(100_000)), chunk(b"gAMA", b"1"),
                chunk(b"acTL", struct.pack(">II", 2**31, 0)), chunk(b"tRNS", bytes(300)),
            ]  # fmt: skip
            data = picture(1, "PNG")
            return data[:33] + notes[int(rng.integers(len(notes)))] * many + data[33:]
        case 2:
            body = exif[6:]
            data = picture(1, "WEBP", "RGB", exif=exif)
            return data + b"EXIF" + struct.pack("<I", len(body)) + body
        case 3:
            return damaged(rng, picture(1, "JPEG", "RGB", exif=exif))
        case _:
            return picture(1, "PNG", "RGB", exif=exif)


def _exif(rng: Random) -> bytes:
    """A directory whose entries claim any number of values anywhere."""
    count = int(rng.choice([1, 3, 4000]))
    entries = b"".join(
        struct.pack("<HHII", tag, int(rng.integers(1, 14)),
                    int(rng.choice(np.array(NUMBERS[:14], dtype=object))) % 2**32,
                    int(rng.choice([0, 8, 2**31, 2**32 - 1])))
        for tag in range(0x0112, 0x0112 + count)
    )  # fmt: skip
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + b"\x08\0\0\0"
