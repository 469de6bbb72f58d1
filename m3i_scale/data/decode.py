"""One encoded image or target member -> pixels, caption, category; every defect has a name.

Grey and colour JPEG goes to torchvision's libjpeg, everything else (CMYK, PNG, WebP, animations,
rare formats) to Pillow; torchvision's PNG decoder is not used because damaged files crash the
process in it.  The header is read first, so that no bomb is ever unpacked.  Metadata is never a
reason to lose an image.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m3i_scale.config import MAX_PIXELS
from m3i_scale.data.bad_sample import BadSample, words_of
from m3i_scale.data.captions import read_captions
from m3i_scale.data.labels import category_of, read_label
from m3i_scale.data.metadata import jpeg_segments, without_metadata
from m3i_scale.data.text import MAX_TEXT_BYTES, read_json, read_json_field, read_text

__all__ = ["MAX_TEXT_BYTES", "BadSample", "decode_category", "decode_image",
           "decode_text", "image_format"]  # fmt: skip


def _load_operators() -> None:
    """Register torch.ops.image.

    torchvision's library alone where its file is found, in a hundredth of a second: the package
    imports torch.compile, half of the start of every `m3i` command and of every loader.
    """
    package = find_spec("torchvision")
    folder = Path(package.origin).parent if package and package.origin else Path("absent")
    library = next(folder.glob("image*.so"), None)
    if library:
        torch.ops.load_library(library)
    else:
        importlib.import_module("torchvision.io")


_load_operators()
# torchvision.io.decode_jpeg without its per-call logging and warning.
_decode_jpeg = torch.ops.image.decode_jpeg.default
_RGB = 3  # torchvision.io.ImageReadMode.RGB
# Frame headers of JPEG: SOF0 to SOF15 without DHT (C4), JPG (C8), DAC (CC).
_SOF = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
# Encoders write some ten. Each makes the decoder go through all pixels again: a megabyte of empty
# scans would keep it for minutes.
_SCAN, _MOST_SCANS = b"\xff\xda", 200
_FRAME = struct.Struct(">4xBHHB")  # after these: bits per sample, height, width, components
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow may be asked for: some of its other formats start programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


def decode_image(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode to uint8 (H, W, 3), upright (EXIF orientation applied); raise BadSample otherwise."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, simple = _jpeg_header(data)
            _check_size(height, width, max_pixels)
            writable = bytearray(data)
            if writable.count(_SCAN) > _MOST_SCANS:
                raise BadSample("undecodable image", f"more than {_MOST_SCANS} scans")
            if simple:
                encoded = torch.frombuffer(writable, dtype=torch.uint8)
                rgb = _decode_jpeg(encoded, _RGB, True)
                return rgb.permute(1, 2, 0)
        return _decode_with_pillow(bytes(data), max_pixels)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", words_of(error)) from None
    except Exception as error:
        raise BadSample("undecodable image", words_of(error)) from None


def decode_file(path: Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """As `decode_image`, of a file; BadSample names it."""
    try:
        return decode_image(path.read_bytes(), max_pixels=max_pixels)
    except OSError as error:
        raise BadSample("unreadable file", f"{path}: {error.strerror}") from None
    except BadSample as bad:
        raise bad.at(str(path)) from None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise BadSample("undecodable image", f"{width}x{height} pixels")
    if height * width > max_pixels:
        raise BadSample("too many pixels", f"{width}x{height}, allowed are {max_pixels} in all")


def _jpeg_header(data: bytes | memoryview) -> tuple[int, int, bool]:
    """(height, width, whether libjpeg gives RGB by itself) from the frame header."""
    for marker, at, _ in jpeg_segments(data):
        if marker in _SOF and at + 10 <= len(data):
            precision, height, width, components = _FRAME.unpack_from(data, at)
            return height, width, precision == 8 and components in (1, 3)
    raise BadSample("undecodable image", "JPEG without a frame header")


def _decode_with_pillow(data: bytes, max_pixels: int) -> Tensor:
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit must not be the lower one
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        return _pillow_pixels(data, max_pixels)
    except (BadSample, Image.DecompressionBombError):
        raise
    except Exception:
        bare = without_metadata(data)
        if bare is None:
            raise
        return _pillow_pixels(bare, max_pixels)


def _pillow_pixels(data: bytes, max_pixels: int) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        _check_size(image.height, image.width, max_pixels)
        image.seek(0)  # animations: the first frame
        image.load()
        turn = _TURNS.get(_orientation(image))
        return torch.from_numpy(np.array(_to_rgb(image if turn is None else image.transpose(turn))))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none that can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises whatever it meets in damaged EXIF
        return 1


def image_format(data: bytes) -> str:
    """Pillow's name of an image's format in lower case, from its first bytes; not decoded."""
    with Image.open(io.BytesIO(without_metadata(data) or data), formats=_formats()) as image:
        return (image.format or "").lower()


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # Pillow may be built without


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; deep grey is scaled to 8 bits, transparency is laid on white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1e-9)
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decode_text(data: bytes, member: str) -> tuple[str, bool]:
    """The first caption of `decode_captions`, and whether it was repaired; raises as it does."""
    found, repaired = decode_captions(data, member)
    return found[0], repaired


def decode_captions(data: bytes, member: str) -> tuple[list[str], bool]:
    """(captions, whether they were repaired) from a `txt` or `json:field` member.

    Raises BadSample for bytes in another encoding than those of `read_text`, and where nothing
    readable remains.  The one repair: JSON can spell halves of characters, which are dropped.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample("absurd caption", f"{len(data)} bytes")
    text, repaired = read_text(data), False
    if ":" in member:
        value = read_json_field(text, member.split(":", 1)[1])
        if isinstance(value, str):
            text = value.encode("utf-8", "ignore").decode()
            found, repaired = read_captions(text), text != value
        else:  # a list of captions, say
            found = read_captions(value)
            if not found:
                raise BadSample("no caption", f"there is none in {member}")
    else:
        found = read_captions(read_json(text) if member == "json" else text)
    if not found:
        raise BadSample("bad UTF-8" if repaired else "empty caption")
    return found, repaired


def decode_category(data: bytes, member: str, classes: Mapping[str, int] | None = None) -> int:
    """Non-negative class index from a `cls` or `json:field` member; `classes` numbers names."""
    value: Any = read_text(data)
    if ":" in member:
        value = read_json_field(value, member.split(":", 1)[1])
    try:
        category = category_of(read_label(value), classes or {})
    except ValueError as error:
        raise BadSample("bad category", str(error)) from None
    if category is None:
        raise BadSample("bad category", repr(value)[:40])
    return category
