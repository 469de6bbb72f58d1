"""Every kind of image is decoded faithfully or refused by name; nothing is executed or unpacked."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.shards import jpeg
from m3i_scale.data.decode import BadSample, decode_category, decode_image, decode_text

WIDTH, HEIGHT = 24, 16


def gradient() -> Image.Image:
    """Red grows to the right, green grows downwards, blue is constant."""
    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], -1).astype(np.uint8))


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def close(data: bytes, expected: Image.Image, tolerance: float) -> None:
    got = decode_image(data).numpy()
    assert got.dtype == np.uint8
    wanted = np.asarray(expected)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted.astype(int)).mean() < tolerance


RGB = gradient()
GREY = RGB.convert("L")


def before_frame(inserted: bytes) -> bytes:
    """A JPEG with these bytes between its first marker and the next."""
    data = encode(RGB, "JPEG", quality=95, subsampling=0)
    return data[:2] + inserted + data[2:]


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        pytest.param(encode(RGB, "JPEG", quality=95, subsampling=0), RGB, 4, id="jpeg"),
        pytest.param(
            encode(RGB, "JPEG", quality=95, subsampling=0, progressive=True), RGB, 4, id="progr."
        ),
        pytest.param(encode(GREY, "JPEG", quality=95), GREY.convert("RGB"), 4, id="grey jpeg"),
        pytest.param(before_frame(b"\xff\xff\xff"), RGB, 4, id="jpeg, fill bytes"),
        pytest.param(before_frame(b"\xff\xfe\0\6a \xff\xc0"), RGB, 4, id="jpeg, comment"),
        pytest.param(
            encode(RGB.convert("CMYK"), "JPEG", quality=95), RGB, 6, id="cmyk"
        ),
        pytest.param(encode(RGB, "PNG"), RGB, 0.1, id="png"),
        pytest.param(encode(GREY, "PNG"), GREY.convert("RGB"), 0.1, id="grey png"),
        pytest.param(
            encode(RGB.quantize(256), "PNG"), RGB.quantize(256).convert("RGB"), 0.1, id="palette"
        ),
        pytest.param(
            encode(GREY.convert("1"), "PNG"), GREY.convert("1").convert("RGB"), 0.1, id="1 bit"
        ),
        pytest.param(
            encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
            GREY.convert("RGB"), 1, id="16 bit",
        ),
        pytest.param(
            encode(RGB.quantize(256), "GIF", save_all=True, append_images=[GREY, GREY]),
            RGB.quantize(256).convert("RGB"), 1, id="animated gif",
        ),
        pytest.param(
            encode(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)]), RGB, 0.1, id="apng"
        ),
        pytest.param(encode(RGB, "WEBP", lossless=True), RGB, 0.1, id="webp"),
        pytest.param(encode(RGB, "BMP"), RGB, 0.1, id="bmp"),
        pytest.param(encode(RGB, "TIFF"), RGB, 0.1, id="tiff"),
    ],
)  # fmt: skip
def test_formats(data, expected, tolerance):
    close(data, expected, tolerance)


def test_transparency_is_laid_on_white():
    image = RGB.convert("RGBA")
    image.putalpha(0)
    assert (decode_image(encode(image, "PNG")).numpy() == 255).all()
    grey = Image.new("L", (4, 4), 7)
    transparent = encode(grey, "PNG", transparency=7)
    assert (decode_image(transparent).numpy() == 255).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    close(data, expected, 4)


def bomb_png(side: int) -> bytes:
    """A valid PNG of side x side black pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    packed = zlib.compress(b"\0" * (side + 1) * 64, 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_from_the_header():
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(bomb_png(30_000))
    small = jpeg(size=(100, 50))
    assert decode_image(small, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(small, max_pixels=4999)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(encode(RGB, "GIF"), max_pixels=100)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0\x00\x00",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"cposix\nsystem\n(S'touch /tmp/pwned'\ntR.",
        jpeg(size=(64, 64))[:-400],
        encode(RGB, "PNG")[:-60],
    ],
    ids=["empty", "soi", "zero length", "png magic", "gif", "svg", "pickle", "cut jpeg", "cut png"],
)
def test_unusable_images_have_a_cause(data):
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    assert caught.value.cause == "undecodable image"


def test_random_damage_never_does_anything_but_decode_or_refuse():
    rng = np.random.default_rng(0)
    originals = [jpeg(size=(64, 48)), encode(RGB, "PNG"), encode(RGB, "WEBP"), encode(RGB, "GIF")]
    for number in range(400):
        data = bytearray(originals[number % len(originals)])
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] ^= 1 << int(rng.integers(8))
        try:
            image = decode_image(bytes(data), max_pixels=1_000_000)
        except BadSample:
            continue
        assert image.ndim == 3
        assert image.shape[2] == 3


@pytest.mark.parametrize(
    ("data", "member", "text", "repaired"),
    [
        (b"a  cat\n", "txt", "a cat", False),
        ("größe 漢字".encode(), "txt", "größe 漢字", False),
        (b'{"caption": "half \\ud83d"}', "json:caption", "half", True),
        ("kept \ufffd".encode(), "txt", "kept \ufffd", False),
        (b'{"caption": "from json"}', "json:caption", "from json", False),
    ],
)
def test_captions(data, member, text, repaired):
    assert decode_text(data, member) == (text, repaired)


@pytest.mark.parametrize(
    ("data", "member", "cause"),
    [
        (b" \n", "txt", "empty caption"),
        (b"\xff\xfe", "txt", "empty caption"),  # the byte order mark of UTF-16 alone
        (b"caf\xe9 au lait", "txt", "bad UTF-8"),
        (b"{", "json:caption", "bad JSON"),
        (b"[1]", "json:caption", "bad JSON"),
        (b'{"caption": null}', "json:caption", "no caption"),
        (b"x" * (2 << 20), "txt", "absurd caption"),
        (b"[" * 100_000, "json:caption", "bad JSON"),
    ],
)
def test_bad_captions(data, member, cause):
    with pytest.raises(BadSample) as caught:
        decode_text(data, member)
    assert caught.value.cause == cause


def test_categories():
    assert decode_category(b"12\n", "cls") == 12
    assert decode_category(b'{"label": 3}', "json:label") == 3
    assert decode_category(b'{"label": 3.0}', "json:label") == 3
    assert decode_category(b" dog\n", "cls", {"cat": 0, "dog": 1}) == 1
    for data, member in [(b"x", "cls"), (b"-1", "cls"), (b"1.5", "cls"), (b"", "cls"),
                         (b'{"label": 1.5}', "json:label"), (b'{"label": [1]}', "json:label"),
                         (b"9" * 5000, "cls")]:  # fmt: skip
        with pytest.raises(BadSample, match="bad category"):
            decode_category(data, member)


def test_a_jpeg_of_scans_without_end_is_refused():
    buffer = io.BytesIO()
    RGB.save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scans = [n for n in range(len(data)) if data[n : n + 2] == b"\xff\xda"]
    again = data[:-2] + data[scans[1] : scans[2]] * 300 + data[-2:]
    assert decode_image(data).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(BadSample, match="more than 200 scans"):
        decode_image(again)
