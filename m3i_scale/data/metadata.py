"""Encoded images without their metadata: what is wrong with EXIF, ICC or comments costs no pixel.

Pillow refuses a whole image for a damaged or very large note in it.  Only such an image comes here,
is stripped to the parts that its pixels need, and is tried again.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG, _END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_NO_NOTES = 0xFF - 0x20 - 0x08 - 0x04  # flags of VP8X: without ICC, EXIF and XMP
_SEGMENT = struct.Struct(">HH")  # marker, length
_STANDALONE = frozenset(range(0xFFD0, 0xFFD8)) | {0xFF01}
_SCAN = 0xFFDA
# COM and APP0 to APP15 but Adobe's APP14, which tells what the colours are.
_JPEG_NOTES = (frozenset(range(0xFFE0, 0xFFF0)) - {0xFFEE}) | {0xFFFE}


def without_metadata(data: bytes) -> bytes | None:
    """The image with its pixels' parts alone (and sound EXIF); None for formats without such parts.

    Damaged parts are copied as they are: whether the pixels are sound is the decoder's question.
    """
    if data.startswith(_PNG):
        return _bare_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _bare_webp(data)
    if data[:2] == b"\xff\xd8":
        return _bare_jpeg(data)
    return _bare_avif(data) if data[4:8] == b"ftyp" else None


def jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """(marker, where it begins, end of its segment) up to the first scan or the end of `data`.

    As libjpeg does it, bytes between segments that belong to none are passed over.
    """
    at = 2
    while at + 3 < len(data):
        marker, length = _SEGMENT.unpack_from(data, at)
        if marker <= 0xFF00 or marker == 0xFFFF:
            at += 1  # a fill byte, or no marker
            continue
        end = at + 2 if marker in _STANDALONE else at + 2 + length
        yield marker, at, end
        if marker == _SCAN:
            return
        at = end


def _bare_png(data: bytes) -> bytes:
    parts, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + length]
        if kind in _PNG_PIXELS or (kind == b"eXIf" and _is_sound(chunk)):
            parts.append(chunk)
        at += 12 + length
    return b"".join(parts if parts[-1] == _END else [*parts, _END])


def _is_sound(chunk: bytes) -> bool:
    return struct.pack(">I", zlib.crc32(chunk[4:-4])) == chunk[-4:]


def _bare_webp(data: bytes) -> bytes:
    parts, at = [b"WEBP"], 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], *struct.unpack_from("<I", data, at + 4)
        chunk = data[at : at + 8 + length + length % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & _NO_NOTES]) + chunk[9:] if chunk[8:] else chunk
        if kind in _WEBP_PIXELS or kind == b"VP8X":
            parts.append(chunk)
        at += 8 + length + length % 2
    body = b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _bare_jpeg(data: bytes) -> bytes:
    parts, rest = [data[:2]], 2
    for marker, start, end in jpeg_segments(data):
        if marker == _SCAN:
            return b"".join([*parts, data[start:]])
        if marker not in _JPEG_NOTES or data[start + 4 : start + 10] == b"Exif\0\0":
            parts.append(data[start:end])
        rest = end
    return b"".join([*parts, data[rest:]])


def _bare_avif(data: bytes) -> bytes:
    """The same bytes, in which no item of the `meta` box is EXIF or XMP."""
    at = 0
    while at + 8 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        if kind == b"meta":
            meta = data[at : at + length].replace(b"Exif", b"free").replace(b"mime", b"free")
            return data[:at] + meta + data[at + length :]
        if length < 8:
            break
        at += length
    return data
