"""Icons of several sets: subjects, styles and tags from their names, some sets held out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m3i_scale.cli import main
from m3i_scale.data import load_labelled
from m3i_scale.shards import icons

SQUARE = '<path fill="currentColor" d="M2 2h12v12H2z"/>'
BAR = '<path fill="currentColor" d="M2 7h12v2H2z"/>'
HELD_OUT = ["x", "y"]


def icon_set(prefix: str, icons: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = {
        name: body if isinstance(body, dict) else {"body": body} for name, body in icons.items()
    }
    return {"prefix": prefix, "info": {"palette": False}, "icons": made, **more}


SETS = [
    icon_set("a", {"box": SQUARE, "box-filled": SQUARE, "arrow-left": BAR, "arrow-left-2": BAR},
             categories={"Shapes": ["box", "box-filled"], "Arrows": ["arrow-left"]}),
    icon_set("b", {"24-box-light": SQUARE, "arrow-left": BAR, "box": {"body": BAR, "hidden": True},
                   "lone": BAR, "box-thin": '<image href="/etc/passwd"/>'},
             prefixes={"24": "24"}, suffixes={"": "Regular", "light": "Light"},
             categories={"Shapes": ["24-box-light"]}, width=24, height=24),
    icon_set("c", {"box": "", "flat": {"body": SQUARE, "width": 48, "height": 12}}),
    icon_set("x", {"box": SQUARE, "arrow-left": BAR, "flat": BAR}),
    icon_set("y", {"box-outline": SQUARE, "arrow-left": BAR, "flat": BAR}),
    {**icon_set("many-colours", {"box": SQUARE, "arrow-left": BAR}), "info": {"palette": True}},
]  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "json").mkdir(parents=True)
    for content in SETS:
        (folder / "json" / f"{content['prefix']}.json").write_text(json.dumps(content))
    return folder


def test_names_are_subjects_and_styles(package: Path):
    found = {icon.key: (icon.caption, icon.tags) for icon in icons.read(package)}
    assert found["a_box_"] == ("Box", ("shapes",))
    assert found["a_box_filled"] == ("Box, filled", ("shapes",))
    assert found["b_box_light"] == ("Box, light", ("shapes",))
    assert found["a_arrow-left_"][0] == "Arrow left"
    assert "b_lone_" in found
    # hidden, of many colours, or with an element that names a file
    assert not {"b_box_", "many-colours_box_", "b_box-thin_"} & set(found)


def test_sets_are_held_out_and_every_subject_is_taught(package: Path):
    trained, held = icons.select(list(icons.read(package)), 2, HELD_OUT)
    assert {icon.set_name for icon in held} == set(HELD_OUT)
    assert not {icon.set_name for icon in trained} & set(HELD_OUT)
    assert {icon.subject for icon in trained} == {icon.subject for icon in held}
    assert {icon.subject for icon in trained} == {"box", "arrow left"}  # three and two sets
    numbered = [icon for icon in trained if (icon.set_name, icon.subject) == ("a", "arrow left")]
    assert len(numbered) == 1


def test_a_category_is_the_tag_of_most_sets(package: Path):
    trained, _ = icons.select(list(icons.read(package)), 3, HELD_OUT)
    assert icons.categories_of(trained) == {
        "box": "shapes",
        "arrow left": "arrows",
        "flat": "other",
    }


@pytest.mark.parametrize("packed", [False, True])
def test_three_sources_are_built(package: Path, tmp_path: Path, packed: bool):
    source = package
    if packed:
        source = tmp_path / "iconify-json-1.0.0.tgz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(package, "package")
    options: dict[str, Any] = {"subjects": 3, "held_out": HELD_OUT, "image_size": 32, "shards": 1}
    data = icons.build(source, tmp_path / "out", **options)
    assert data.categories == ("arrows", "shapes", "other")
    loaded = {s.name: load_labelled(s, 32) for s in (data.text, data.category, data.heldout)}
    # c's box draws nothing; what remains is split in halves
    assert sum(len(loaded[name].key) for name in ("text", "category")) == 6
    held = loaded["heldout"]
    assert sorted(held.captions) == [
        "Arrow left", "Arrow left", "Box", "Box, outline", "Flat", "Flat",
    ]  # fmt: skip
    named = {c: data.categories[n] for c, n in zip(held.captions, held.category, strict=True)}
    assert named["Box, outline"] == "shapes"
    assert named["Flat"] == "other"
    for labelled in loaded.values():
        assert (labelled.images.float().std(dim=(1, 2)) > 20).all()
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    icons.build(source, tmp_path / "out", **options)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == first


def test_another_version_is_drawn_anew(package: Path, tmp_path: Path):
    options: dict[str, Any] = {"held_out": HELD_OUT, "image_size": 32, "shards": 1, "subjects": 1}
    for version, subject in (("1.0.0", "Box"), ("1.1.0", "Flat")):
        (package / "package.json").write_text(json.dumps({"version": version}))
        data = icons.build(package, tmp_path / "out", **options)
        assert subject in load_labelled(data.heldout, 32).captions
        for prefix in "ab":  # from now on most sets draw something else
            content = icon_set(prefix, {"flat": SQUARE})
            (package / "json" / f"{prefix}.json").write_text(json.dumps(content))


def test_an_icon_keeps_its_shape_in_the_middle_of_the_picture(package: Path):
    (flat,) = (i for i in icons.read(package) if i.key == "c_flat_")
    jpg = icons.render(flat.svg.replace(SQUARE, '<path d="M0 0h48v12H0z"/>'), 64)
    assert jpg is not None
    dark = Image.open(io.BytesIO(jpg)).convert("L").point(lambda level: 255 * (level < 128))
    left, top, right, bottom = dark.getbbox()  # type: ignore[misc]
    assert (right - left) / (bottom - top) == pytest.approx(4, rel=0.15)
    assert (left + right, top + bottom) == (pytest.approx(64, abs=2), pytest.approx(64, abs=2))


def test_what_cannot_be_built_is_one_sentence(package: Path, tmp_path: Path, capsys):
    words = ["--out", str(tmp_path / "out"), "--held-out", *HELD_OUT]
    assert main(["icons", str(tmp_path / "nothing.tgz"), *words]) == 2
    assert "npm pack @iconify/json" in capsys.readouterr().err
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(b"not an archive")
    assert main(["icons", str(broken), *words]) == 2
    assert "broken.tgz is not npm's archive" in capsys.readouterr().err
    assert main(["icons", str(package), *words]) == 2
    assert "share 3 subjects, 100 are asked for" in capsys.readouterr().err
    assert main(["icons", str(package), *words, "elsewhere"]) == 2
    assert "no one-coloured set is called ['elsewhere']" in capsys.readouterr().err
    (package / "json" / "z.json").write_text('{"icons": 3}')
    assert main(["icons", str(package), *words]) == 2
    assert "z.json is not a set of icons" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
