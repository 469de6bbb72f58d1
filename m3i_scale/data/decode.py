"""One encoded image or target member -> pixels, caption, category; every defect has a name.

Grey and colour JPEG goes to torchvision's libjpeg, everything else (CMYK, PNG, WebP, animations,
rare formats) to Pillow; torchvision's PNG decoder is not used because damaged files crash the
process in it.  The header is read first, so that no bomb is ever unpacked.
"""

from __future__ import annotations

import io
import json
import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode  # registers the operators of torch.ops.image

# torchvision.io.decode_jpeg without its per-call logging and warning.
_decode_jpeg = torch.ops.image.decode_jpeg.default
_RGB = ImageReadMode.RGB.value
MAX_PIXELS = 100_000_000
MAX_TEXT_BYTES = 1 << 20
# Frame headers of JPEG: SOF0 to SOF15 without DHT (C4), JPG (C8), DAC (CC).
_SOF = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
_STANDALONE = frozenset(range(0xFFD0, 0xFFD8)) | {0xFF01}
_SEGMENT = struct.Struct(">HH")  # marker, length
_FRAME = struct.Struct(">4xBHHB")  # after these: bits per sample, height, width, components
# What Pillow may be asked for: some of its other formats start programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


class BadSample(Exception):  # noqa: N818  (a finding about data, not an error of the program)
    """A sample that cannot be used; `cause` is the short name under which it is counted."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def decode_image(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode to uint8 (H, W, 3), upright (EXIF orientation applied); raise BadSample otherwise."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, simple = _jpeg_header(data)
            _check_size(height, width, max_pixels)
            if simple:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                rgb = _decode_jpeg(encoded, _RGB, True)
                return rgb.permute(1, 2, 0)
        return _decode_with_pillow(data, max_pixels)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", _one_line(error)) from None
    except Exception as error:
        raise BadSample("undecodable image", _one_line(error)) from None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise BadSample("undecodable image", f"{width}x{height} pixels")
    if height * width > max_pixels:
        raise BadSample("too many pixels", f"{width}x{height}, allowed are {max_pixels} in all")


def _jpeg_header(data: bytes | memoryview) -> tuple[int, int, bool]:
    """(height, width, whether libjpeg gives RGB by itself) from the frame header."""
    at = 2
    while at + 9 < len(data):
        marker, length = _SEGMENT.unpack_from(data, at)
        if marker in _SOF:
            precision, height, width, components = _FRAME.unpack_from(data, at)
            return height, width, precision == 8 and components in (1, 3)
        if marker < 0xFF00:
            break
        if marker == 0xFFFF:  # fill byte
            at += 1
        else:
            at += 2 if marker in _STANDALONE else 2 + length
    raise BadSample("undecodable image", "JPEG without a frame header")


def _decode_with_pillow(data: bytes | memoryview, max_pixels: int) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        _check_size(image.height, image.width, max_pixels)
        image.seek(0)  # animations: the first frame
        upright = ImageOps.exif_transpose(image)
        return torch.from_numpy(np.array(_to_rgb(upright)))


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
    """(caption, whether bad UTF-8 was repaired) from a `txt` or `json:field` member.

    Bytes that are not UTF-8 are dropped; raises BadSample where nothing readable remains.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample("absurd caption", f"{len(data)} bytes")
    text = data.decode("utf-8", "replace")
    repaired = "\ufffd" in text and b"\xef\xbf\xbd" not in data
    if ":" in member:
        value = _json_field(text, member)
        if not isinstance(value, str):
            raise BadSample("no caption", f"{member} is {type(value).__name__}")
        text = value.encode("utf-8", "ignore").decode()  # JSON can spell halves of characters
        repaired |= text != value
    if repaired:
        text = text.replace("\ufffd", "")
    text = " ".join(text.replace("\0", " ").split())
    if not text:
        raise BadSample("bad UTF-8" if repaired else "empty caption")
    return text, repaired


def decode_category(data: bytes, member: str) -> int:
    """Non-negative class index from a `cls` or `json:field` member."""
    value = _json_field(data.decode("utf-8", "replace"), member) if ":" in member else data
    try:
        category = int(value)
    except (TypeError, ValueError, OverflowError):  # JSON knows Infinity
        raise BadSample("bad category", repr(value)[:40]) from None
    if isinstance(value, float | bool) or not 0 <= category < 1 << 31:
        raise BadSample("bad category", repr(value)[:40])
    return category


def _json_field(text: str, member: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSample("bad JSON") from None
    if not isinstance(document, dict):
        raise BadSample("bad JSON", f"a {type(document).__name__}, not an object")
    return document.get(member.split(":", 1)[1])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
