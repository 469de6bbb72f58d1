"""Whatever is wrong with the notes in a picture: its pixels are decoded; broken pixels are not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from helpers.shards import make_source, write_tar
from helpers.small import labelled_tree
from helpers.streams import make_stream
from m3i_scale.cli import main
from m3i_scale.config import Config
from m3i_scale.data import TooManyBadSamples
from m3i_scale.data.decode import BadSample, decode_image
from m3i_scale.shards.indexing import index_shards
from m3i_scale.shards.writing import Recipe, encode
from m3i_scale.tasks.samples import build_stream

RGB = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
).resize((40, 32))  # fmt: skip


def encoded(form: str, image: Image.Image = RGB, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PNG, CMYK = encoded("PNG"), encoded("JPEG", RGB.convert("CMYK"))
LARGE = zlib.compress(b"a" * (8 << 20))


def png(*chunks: bytes) -> bytes:
    """With chunks behind its header."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def png_after(*chunks: bytes) -> bytes:
    return PNG[:-12] + b"".join(chunks) + PNG[-12:]


def segment(marker: int, body: bytes, of: bytes) -> bytes:
    return of[:2] + struct.pack(">HH", marker, len(body) + 2) + body + of[2:]


def exif(kind: int, value: bytes) -> bytes:
    """Orientation 6 and a resolution of a given type and value."""
    entries = struct.pack("<IHHHIIHHIII", 8, 2, 0x112, 3, 1, 6, 0x11A, kind, 1, 38, 0)
    return b"Exif\0\0II*\0" + entries + value


DAMAGED_EXIF = {
    "garbage": b"Exif\0\0garbage here",
    "text of bytes": b"b'Exif\\x00\\x00'",
    "cut": exif(10, struct.pack("<ii", 1, 2))[:20],
    "offset beyond": b"Exif\0\0II*\0" + struct.pack("<I", 1 << 30),
    "empty": b"Exif\0\0",
}
DAMAGED_PNG = {
    "zTXt": png(chunk(b"zTXt", b"k\0\0" + LARGE)),
    "iTXt": png(chunk(b"iTXt", b"k\0\1\0\0\0" + LARGE)),
    "tEXt": png(*(chunk(b"tEXt", b"k%d\0" % n + b"a" * (1 << 20)) for n in range(66))),
    "text after the pixels": png_after(chunk(b"zTXt", b"k\0\0" + LARGE)),
    "large profile": png(chunk(b"iCCP", b"k\0\0" + LARGE)),
    "damaged profile": png(chunk(b"iCCP", b"k\0\0garbage")),
    "profile of another method": png(chunk(b"iCCP", b"k\0\7garbage")),
    "gAMA": png(chunk(b"gAMA", b"")),
    "cHRM": png(chunk(b"cHRM", b"12")),
    "pHYs": png(chunk(b"pHYs", b"12")),
    "sRGB": png(chunk(b"sRGB", b"")),
    "acTL": png(chunk(b"acTL", b"1")),
    "fcTL": png(chunk(b"acTL", struct.pack(">II", 3, 0)), chunk(b"fcTL", b"1" * 26)),
    "text with a wrong checksum": png(chunk(b"tEXt", b"k\0hello")[:-1] + b"?"),
    "EXIF with a wrong checksum": png(chunk(b"eXIf", b"II*\0")[:-1] + b"?"),
    "EXIF": png(chunk(b"eXIf", b"II*\0garbage")),
    "EXIF as text": png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 10\nnot hex")),
    "cut within text": png_after(chunk(b"tEXt", b"k\0" + b"a" * 1000))[:-500],
}
DAMAGED_JPEG = {
    "bytes between segments": encoded("JPEG")[:2] + b"garbage\0" + encoded("JPEG")[2:],
    "length of a segment": encoded("JPEG")[:2]
    + b"\xff\xe1\0\x08Exif\0\0more"
    + encoded("JPEG")[2:],
    "MPF": segment(0xFFE2, b"MPF\0II*\0garbage garbage", CMYK),
    "Photoshop": segment(0xFFED, b"Photoshop 3.0\x008BIM\0\0", CMYK),
    "JFIF": segment(0xFFE0, b"JFIF", CMYK),
    "profile": segment(0xFFE2, b"ICC_PROFILE\0", CMYK),
}


@pytest.mark.parametrize("name", DAMAGED_EXIF)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "CMYK"])
def test_damaged_exif(form, name):
    image = RGB.convert("CMYK") if form == "CMYK" else RGB
    data = encoded("JPEG" if form == "CMYK" else form, image, exif=DAMAGED_EXIF[name])
    assert decode_image(data).shape == (32, 40, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "CMYK"])
@pytest.mark.parametrize(
    ("kind", "value"), [(10, struct.pack("<ii", -1, 0)), (5, struct.pack("<II", 1, 0)), (2, b"")]
)
def test_the_orientation_beside_a_damaged_tag_is_applied(form, kind, value):
    image = RGB.convert("CMYK") if form == "CMYK" else RGB
    data = encoded("JPEG" if form == "CMYK" else form, image, exif=exif(kind, value))
    assert decode_image(data).shape == (40, 32, 3)


@pytest.mark.parametrize("name", DAMAGED_PNG)
def test_damaged_and_large_notes_in_png(name):
    assert (decode_image(DAMAGED_PNG[name]).numpy() == np.asarray(RGB)).all()


def test_the_orientation_beside_large_text_in_png_is_applied():
    turned = exif(10, struct.pack("<ii", -1, 0))[6:]
    data = png(chunk(b"zTXt", b"k\0\0" + LARGE), chunk(b"eXIf", turned))
    assert decode_image(data).shape == (40, 32, 3)


@pytest.mark.parametrize("name", DAMAGED_JPEG)
def test_damaged_notes_in_jpeg(name):
    assert decode_image(DAMAGED_JPEG[name]).shape == (32, 40, 3)


def test_damaged_notes_in_webp_and_avif():
    notes = {"icc_profile": b"garbage", "xmp": b"<x", "exif": b"Exif\0\0garbage"}
    assert decode_image(encoded("WEBP", lossless=True, **notes)).shape == (32, 40, 3)
    assert decode_image(encoded("WEBP", lossless=True, **notes)[:-4]).shape == (32, 40, 3)
    if features.check("avif"):
        sound = encoded("AVIF", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", icc_profile=b"garbage")
        damaged = sound.replace(b"II*\0\x08", b"garbg")
        assert damaged != sound
        assert decode_image(damaged).shape == (32, 40, 3)


BOMB = PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(
    b"iCCP", b"k\0\0" + LARGE
) + PNG[33:]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        pytest.param(DAMAGED_PNG["zTXt"][:-60], "undecodable image", id="cut png"),
        pytest.param(DAMAGED_PNG["gAMA"].replace(b"IDAT", b"IDAU"), "undecodable image", id="none"),
        pytest.param(encoded("WEBP", exif=b"x")[:60], "undecodable image", id="cut webp"),
        pytest.param(CMYK[:400], "undecodable image", id="cut jpeg"),
        pytest.param(BOMB, "too many pixels", id="bomb"),
    ],
)
def test_broken_pixels_and_bombs_stay_refused(data, cause):
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    assert caught.value.cause == cause


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "JPEG", "CMYK"])
def test_pictures_above_pillows_own_limit_are_decoded_if_asked(form, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = RGB.convert("CMYK") if form == "CMYK" else RGB
    data = encoded("JPEG" if form == "CMYK" else form, image)
    assert decode_image(data, max_pixels=40 * 32).shape == (32, 40, 3)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(data, max_pixels=40 * 32 - 1)


def test_build_keeps_them_too():
    for name, data in DAMAGED_PNG.items():
        assert encode(data, Recipe(0, False, 90)) == ("png", data), name


def test_a_stream_of_them_replaces_none(tmp_path: Path):
    members = [(f"{n:02d}.{kind}", data) for n, picture in enumerate(DAMAGED_PNG.values())
               for kind, data in (("png", picture), ("cls", b"%d" % n))]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    index_shards([str(path)], str(tmp_path / "i.parquet"), kind="category", progress=False)
    source = make_source("notes", str(tmp_path / "i.parquet"), "category")
    loader = make_stream([source]).loader(start=0, micro_batch=6, end=len(DAMAGED_PNG))
    assert sorted(int(c) for batch in loader for c in batch.category) == [*range(len(DAMAGED_PNG))]
    assert not loader.faults


def test_the_largest_picture_is_a_setting_of_the_run_and_of_check(tmp_path, capsys):
    members = [("0.png", PNG), ("0.cls", b"0"), ("1.png", encoded("PNG", RGB.resize((9, 9)))),
               ("1.cls", b"1")]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    index = str(tmp_path / "i.parquet")
    index_shards([str(path)], index, kind="category", progress=False)
    assert main(["shards", "check", index, "--max-pixels", "100"]) == 1
    assert "1 too many pixels: raise data.max_pixels" in capsys.readouterr().out
    assert main(["shards", "check", index]) == 0
    config = Config.model_validate(
        labelled_tree(
            index, {"data.max_pixels": 100, "data.bad_window": 1, "data.max_bad_rate": 0.0}
        )
    )
    stream = build_stream(config)
    with pytest.raises(TooManyBadSamples, match="1 of the last 1 samples"):
        list(stream.loader(start=0, micro_batch=2, end=2))
