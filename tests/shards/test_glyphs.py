"""The demo's data: real characters, split without leakage, the same on every machine."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from m3i_scale.data import load_labelled
from m3i_scale.shards import glyphs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs")
    return glyphs.build(folder, blocks=["Greek", "Arrows"], image_size=48, shards=2)


@pytest.fixture(scope="module")
def loaded(data):
    return {s.name: load_labelled(s, 32) for s in (data.text, data.category, data.heldout)}


def names(labelled) -> list[str]:
    return [key.rsplit("/", 1)[1] for key in labelled.key]


def test_sources_are_disjoint_and_held_out_fonts_stay_out(loaded):
    text, category, heldout = (set(names(loaded[n])) for n in ("text", "category", "heldout"))
    assert not text & category
    assert not any("stix" in key for key in text | category)
    assert heldout
    assert all("stix" in key for key in heldout)


def test_every_held_out_character_is_taught_in_another_typeface(loaded):
    taught = {key.split("_")[0] for n in ("text", "category") for key in names(loaded[n])}
    assert {key.split("_")[0] for key in names(loaded["heldout"])} <= taught


def test_captions_and_categories(data, loaded):
    assert data.categories == ("Greek", "Arrows")
    captions = dict(zip(names(loaded["heldout"]), loaded["heldout"].captions, strict=True))
    assert captions["u03b1_stixgeneralbol"] == "Greek small letter alpha, serif bold"
    for key, category in zip(names(loaded["heldout"]), loaded["heldout"].category, strict=True):
        block = "Greek" if int(key[1:5], 16) < 0x2000 else "Arrows"
        assert data.categories[category] == block
    assert set(loaded["text"].category.tolist()) == {-1}
    assert set(loaded["category"].captions) == {""}


def test_images_show_something(loaded):
    for labelled in loaded.values():
        contrast = labelled.images.float().std(dim=(1, 2)).amax(dim=1)
        assert (contrast > 3).all()


def test_plain_ones_are_the_same_characters_without_colour(loaded, tmp_path):
    made = glyphs.build(tmp_path, blocks=["Greek", "Arrows"], image_size=48, shards=2, plain=True)
    plain, coloured = load_labelled(made.heldout, 32), loaded["heldout"]
    assert names(plain) == names(coloured)
    images = plain.images.int()
    assert (images.amax(-1) - images.amin(-1)).max() <= 2  # grey, but for JPEG's rounding
    darkness = [255 - i.float().mean(-1).flatten(1) for i in (images, coloured.images)]
    alike = F.cosine_similarity(*(d - d.mean(1, keepdim=True) for d in darkness))
    assert alike.median() > 0.98  # in the same place


def test_building_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        glyphs.build(tmp_path / name, blocks=["Box Drawing"], image_size=32, shards=1)
    tars = [sorted((tmp_path / name).rglob("*.tar")) for name in ("one", "two")]
    assert len(tars[0]) == 3
    assert [p.read_bytes() for p in tars[0]] == [p.read_bytes() for p in tars[1]]


def test_there_are_about_46000_named_glyphs():
    trained, held = glyphs.glyphs(glyphs.typefaces(), None)
    assert 40_000 < len(trained) < 52_000
    assert len(held) > 4_000
    assert not any("LastResort" in g.typeface.path.name for g in trained + held)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="unknown blocks"):
        glyphs.build(tmp_path, blocks=["Klingon"])
    with pytest.raises(ValueError, match="category_share is 1"):
        glyphs.build(tmp_path, category_share=1)
    with pytest.raises(ValueError, match="m3i glyphs"):
        glyphs.load(tmp_path)
