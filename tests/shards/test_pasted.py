"""The pasted set: boxes and masks of what is seen, a validation split of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from m3i_scale.cli import main
from m3i_scale.shards import pasted
from m3i_scale.shards.pasted import IGNORE, Pasted, Recipe, build, run_lengths

RECIPE = Recipe(image_size=64, train=24, val=4, characters="AK8", objects=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Pasted:
    return build(tmp_path_factory.mktemp("pasted") / "set", RECIPE)


def decoded(segmentation: dict) -> np.ndarray:
    """The mask of uncompressed run lengths, (H, W)."""
    values = np.arange(len(segmentation["counts"])) % 2
    flat = np.repeat(values, segmentation["counts"])
    return flat.reshape(segmentation["size"], order="F").astype(bool)


def content(data: Pasted, split: str) -> dict:
    return json.loads(data.annotations(split).read_text())


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_and_masks_are_what_is_seen(data, split):
    coco = content(data, split)
    assert len(coco["images"]) == getattr(RECIPE, split)
    seen = 0
    for image in coco["images"]:
        categories = np.array(
            Image.open(data.masks(split) / image["file_name"].replace("jpg", "png"))
        )
        things = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        masks = [decoded(a["segmentation"]) for a in things]
        seen += len(things)
        for thing, mask in zip(things, masks, strict=True):
            rows, columns = np.nonzero(mask)
            left, top, width, height = thing["bbox"]
            assert (left, left + width) == (columns.min(), columns.max() + 1)
            assert (top, top + height) == (rows.min(), rows.max() + 1)
            assert thing["area"] == mask.sum()
            # A pixel belongs to one object; only the edge of a later letter may cover it.
            assert set(np.unique(categories[mask])) <= {thing["category_id"], IGNORE}
            assert (categories[mask] == thing["category_id"]).mean() > 0.6
        together = np.sum(masks, axis=0) if masks else np.zeros_like(categories)
        assert together.max() <= 1
        assert not np.isin(categories[together == 0], range(1, 4)).any()
    assert seen > len(coco["images"])


def test_the_validation_split_has_typefaces_and_photographs_of_its_own():
    names = {
        split: {name for names in folders.values() for name in names}
        for split, folders in pasted.PHOTOGRAPHS.items()
    }
    assert not names["train"] & names["val"]
    faces = {split: {f.path.name for f in pasted._faces(split, "AK8")} for split in names}
    assert not faces["train"] & faces["val"]
    assert all(name.startswith("STIX") for name in faces["val"])


def test_the_same_set_on_every_machine(data, tmp_path):
    again = build(tmp_path, RECIPE)
    assert content(again, "train") == content(data, "train")
    one = sorted(data.images("val").iterdir())[0]
    assert one.read_bytes() == (again.images("val") / one.name).read_bytes()


def test_a_built_set_stays_and_another_recipe_replaces_it(data, tmp_path):
    first = build(tmp_path, Recipe(image_size=32, train=1, val=1))
    image = next(first.images("train").iterdir())
    made = image.stat().st_mtime_ns
    build(tmp_path, Recipe(image_size=32, train=1, val=1))
    assert image.stat().st_mtime_ns == made
    build(tmp_path, Recipe(image_size=40, train=1, val=1))
    assert Image.open(image).size == (40, 40)


def test_characters_are_as_large_as_the_recipe_says(tmp_path):
    out = str(tmp_path / "set")
    options = ["--train", "40", "--val", "1", "--objects", "1", "--sizes", "0.4", "0.6"]
    assert main(["pasted", "--out", out, *options]) == 0
    made = content(Pasted(tmp_path / "set"), "train")["annotations"]
    longer = [max(thing["bbox"][2:]) / 128 for thing in made]
    assert 0.36 < min(longer) < 0.45
    assert 0.55 < max(longer) < 0.64


def test_run_lengths_begin_with_zeros():
    assert run_lengths(np.array([[True, False], [False, False]])) == [0, 1, 3]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


def test_the_folder_of_somebody_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert main(["pasted", "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--characters", "AA"], "different ones"),
        (["--characters", "漢"], "no typeface of train"),
        (["--image-size", "8"], "32 is the least"),
        (["--sizes", "0.5", "0.2"], "the smaller one first"),
    ],
)
def test_impossible_recipes_end_in_a_sentence(tmp_path, capsys, options, message):
    assert main(["pasted", "--out", str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_missing_photographs_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(pasted.importlib.util, "find_spec", lambda name: None)
    pasted._inside.cache_clear()
    with pytest.raises(ValueError, match=r"m3i-scale\[transfer\]"):
        build(tmp_path / "new", RECIPE)
    pasted._inside.cache_clear()


def test_a_crop_shows_one_object_as_it_stands_in_its_image(data):
    for entry in content(data, "val")["annotations"]:
        character = RECIPE.characters[entry["category_id"] - 1]
        crop = Image.open(data.crops("val") / character / f"{entry['id']}.jpg")
        assert crop.width == crop.height >= max(entry["bbox"][2:])
    count = len(list(data.crops("val").rglob("*.jpg")))
    assert count == len(content(data, "val")["annotations"])
