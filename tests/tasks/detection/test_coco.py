"""Annotation files: what is read, and every fault by its name."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from helpers import coco as small
from m3i_scale.tasks.detection import coco
from m3i_scale.tasks.detection.annotation_faults import ImageEntry, compressed_lengths
from m3i_scale.tasks.detection.coco import read_coco, require_same_categories


@pytest.fixture
def content():
    return small.content()


@pytest.fixture
def reread(tmp_path, content):
    """Read the content as a file."""

    def read(**options):
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return read_coco(path, **options)

    return read


def test_categories_count_from_zero_in_the_order_of_their_ids(content, reread):
    file = reread()
    assert [c.name for c in file.categories] == ["car", "boat", "cup"]
    wanted = {3: 0, 9: 1, 40: 2}
    for index, image in enumerate(file.images):
        listed = [a for a in content["annotations"] if a["image_id"] == image.id]
        found = file.annotations(index)
        assert [a.category for a in found] == [wanted[a["category_id"]] for a in listed]
        assert [a.crowd for a in found] == [bool(a["iscrowd"]) for a in listed]
    assert file.findings.lines() == []
    assert not file.lvis


def test_the_ground_truth_is_the_file(content, reread):
    truth = reread().ground_truth()
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    ours = [{k: a[k] for k in keys} for a in truth["annotations"]]
    assert ours == [{k: a[k] for k in keys} for a in content["annotations"]]
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(ours) + 1))


# cause -> what is done to the first annotation, whether it stays in the ground truth
FAULTS = {
    "annotation without image_id": (lambda a: a.pop("image_id"), False),
    "annotation of an image that is not listed": (lambda a: a.update(image_id=5), False),
    "unknown category": (lambda a: a.update(category_id=41), False),
    "unknown category ": (lambda a: a.update(category_id=[3]), False),
    "box that is not four numbers": (lambda a: a.update(bbox=[1, 2, 3]), False),
    "box that is not four numbers ": (lambda a: a.update(bbox=[1, 2, 3, math.nan]), False),
    "box that is not four numbers  ": (lambda a: a.update(bbox=[1, 10**400, 3, 4]), False),
    "annotation without image_id ": (lambda a: a.update(image_id=2**63), False),
    "empty box": (lambda a: a.update(bbox=[1, 2, 0, 5]), True),
    "empty box ": (lambda a: a.update(bbox=[9, 9, -5, 5]), True),
    "box outside its image": (lambda a: a.update(bbox=[500, 2, 4, 5]), True),
    "damaged polygon": (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), False),
    "damaged polygon ": (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), False),
    "polygon far outside its image": (
        lambda a: a.update(segmentation=[[1e30, 1e30, -1e30, 5, 6, 1e30]]),
        False,
    ),
    "damaged mask": (lambda a: a.update(segmentation="x"), False),
    "damaged mask ": (
        lambda a: a.update(segmentation={"size": [40, 72], "counts": [1, 2]}),
        False,
    ),
    "damaged mask  ": (
        lambda a: a.update(segmentation={"size": [40, 72], "counts": "\x7f\x00"}),
        False,
    ),
    "mask of another size than its image": (
        lambda a: a.update(segmentation={"size": [72, 40], "counts": [72 * 40]}),
        False,
    ),
    "no mask": (lambda a: a.pop("segmentation"), False),
}


@pytest.mark.parametrize("cause", FAULTS)
def test_a_faulty_annotation_is_left_out_named_and_counted(content, reread, cause):
    change, stays = FAULTS[cause]
    change(content["annotations"][0])
    file = reread(masks=True)
    (line,) = file.findings.lines()
    assert line.startswith(f"left out 1 {cause.strip()}: annotation 7 of image ")
    assert len(file.annotations(0)) == 2
    kept = len(file.ground_truth()["annotations"])
    assert kept == len(content["annotations"]) - (not stays)


def test_an_area_without_bounds_is_computed_anew(content, reread):
    content["annotations"][0].update(bbox=[1, 2, 3, 4], area=10**400)
    assert reread().ground_truth()["annotations"][0]["area"] == 12


def test_a_box_that_reaches_beyond_its_image_is_cut_off(content, reread):
    content["annotations"][0]["bbox"] = [60, 30, 40, 40]
    file = reread()
    assert file.annotations(0)[0].box == (60, 30, 72, 40)
    assert "cut off 1 box that reaches beyond its image: " in file.findings.lines()[0]
    assert file.ground_truth()["annotations"][0]["bbox"] == [60, 30, 40, 40]


def test_many_faults_are_counted_and_few_are_named(content, reread):
    for annotation in content["annotations"][:5]:
        annotation["category_id"] = 1
    (line,) = reread().findings.lines()
    assert line.startswith("left out 5 unknown category: annotation 7 of image 100, ")
    assert line.endswith(", ...")


def _drop(key):
    return lambda c: c.pop(key)


WHOLE = {
    "has no list annotations": _drop("annotations"),
    "has no list images, categories": lambda c: (c.pop("images"), c.pop("categories")),
    "lists no categories": lambda c: c["categories"].clear(),
    "lists no images": lambda c: c["images"].clear(),
    "two categories have the id 3": lambda c: c["categories"].append({"id": 3, "name": "van"}),
    "has no whole number as id": lambda c: c["categories"].append({"name": "van"}),
    "number as id": lambda c: c["categories"].append({"id": 2**63, "name": "van"}),
    "two images have the id 100": lambda c: c["images"].append(c["images"][0]),
    "no image that can be used": lambda c: [i.pop("file_name") for i in c["images"]],
    "no annotation that can be used: left out 9 unknown category": lambda c: [
        a.update(category_id=1) for a in c["annotations"]
    ],
}


@pytest.mark.parametrize("message", WHOLE)
def test_a_file_that_cannot_be_used_is_refused(content, reread, message):
    WHOLE[message](content)
    with pytest.raises(ValueError, match=message):
        reread()


@pytest.mark.parametrize("text", ["", '{"images": [', "[1, 2]", "\ufffd\x00", "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"damaged or no JSON|no annotation file"):
        read_coco(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no file"):
        read_coco(tmp_path / "instances.json")


def test_an_image_without_a_size_is_left_out_with_its_annotations(content, reread):
    content["images"][0]["width"] = "wide"
    file = reread()
    assert [image.id for image in file.images] == [101, 102, 103]
    assert file.findings.counts["image without id, file_name, height or width"] == 1
    assert file.findings.counts["annotation of an image that is not listed"] == 3


def test_lvis_files_name_images_by_url_and_keep_their_lists(content, reread):
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [9]}
    for category, frequency in zip(content["categories"], "rcf", strict=True):
        category["frequency"] = frequency
    file = reread()
    assert file.lvis
    assert file.images[0].file == "train2017/0.png"
    truth = file.ground_truth()
    assert truth["images"][0]["neg_category_ids"] == [3]
    assert [c["frequency"] for c in truth["categories"]] == ["c", "f", "r"]


def test_validation_must_have_the_categories_of_training(content, reread):
    train = reread()
    require_same_categories(train, reread())
    content["categories"][0]["name"] = "bowl"
    with pytest.raises(ValueError, match="1 differ, first id 40 \\('cup' in training, 'bowl'"):
        require_same_categories(train, reread())


def test_compressed_run_lengths_are_those_of_the_library():
    from faster_coco_eval.core import mask

    generator = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        pixels = np.asfortranarray(generator.random((37, 53, 1)) < density, np.uint8)
        encoded = mask.encode(pixels)[0]["counts"]
        text = encoded if isinstance(encoded, str) else encoded.decode()
        lengths = list(compressed_lengths(text))
        values = np.arange(len(lengths)) % 2
        assert (np.repeat(values, lengths) == pixels[..., 0].flatten(order="F")).all()
    with pytest.raises(ValueError, match="middle of a number"):
        list(compressed_lengths("P"))


def test_selecting_images_keeps_their_annotations(content, reread):
    before = copy.deepcopy(content)
    file = reread()
    fewer = file.select([2, 3])
    assert [fewer.entries(i) for i in range(2)] == [file.entries(2), file.entries(3)]
    assert before == content


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", ".", "x/../..", "a/../../b.jpg"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    image = ImageEntry(7, name, 4, 4)
    with pytest.raises(ValueError, match="of image 7 leads out of"):
        coco.absent_files([image], tmp_path / "images")


def test_a_file_name_may_be_absolute_inside_the_folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").touch()
    monkeypatch.chdir(tmp_path)
    names = [str(tmp_path / "images/a.jpg"), "a.jpg", "../images/a.jpg", "b.jpg"]
    found = coco.absent_files([ImageEntry(i, n, 4, 4) for i, n in enumerate(names)], "images")
    assert found == [3]
