"""Images with objects: augmentation, bad images, batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from helpers import coco as small
from m3i_scale.config.detection import Jitter, Sides
from m3i_scale.data.bad_sample import BadSample
from m3i_scale.tasks.detection import resizing
from m3i_scale.tasks.detection.batch import Objects, collate, normalised
from m3i_scale.tasks.detection.dataset import decoded_mask, open_test, open_training


@pytest.fixture
def folder(tmp_path):
    small.write(tmp_path, small.content())
    return tmp_path


def scene(height: int = 60, width: int = 80):
    boxes = torch.tensor([[5.0, 6, 25, 30], [40, 10, 78, 55], [0, 0, 80, 60]])
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    image = masks[:1].expand(3, -1, -1).to(torch.uint8) * 255
    return resizing.scene(image, Objects(boxes, torch.tensor([4, 7, 1]), masks))


@pytest.mark.parametrize("resize", [Jitter(size=64), Sides(shorter=[32, 50], longest=70)])
def test_boxes_masks_and_pixels_stay_together(resize):
    torch.manual_seed(0)
    kept = 0
    for _ in range(40):
        found = resizing.for_training(scene(), resize, flip_probability=0.5, least_box=2.0)
        image, objects = resizing.unwrapped(found)
        side = resize.size if isinstance(resize, Jitter) else resize.longest
        assert max(image.shape[-2:]) <= side
        assert objects.masks.shape[1:] == image.shape[-2:]
        assert ((objects.boxes[:, 2:] - objects.boxes[:, :2]) >= 2).all()
        tight = masks_to_boxes(objects.masks).float() + torch.tensor([0, 0, 1, 1])
        torch.testing.assert_close(objects.boxes, tight, atol=1.01, rtol=0)
        if 4 in objects.labels:  # the object that the image shows in white
            mask = objects.masks[objects.labels.tolist().index(4)]
            assert ((image[0] > 127) == mask).float().mean() > 0.85
            kept += 1
    assert kept > 10


def test_the_box_of_a_cut_object_fits_what_is_left_of_its_mask():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, :, :8] = True  # an L: a column,
    masks[0, 56:, :] = True  # and a row at the bottom
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    whole = resizing.scene(
        image, Objects(torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([0]), masks)
    )
    found = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, objects = resizing.unwrapped(resizing._cropped(whole, 40))
        if objects.masks.any():
            tight = masks_to_boxes(objects.masks) + torch.tensor([0, 0, 1, 1])
            assert torch.equal(objects.boxes, tight.float())
            found.append(tuple(objects.boxes[0].tolist()))
    assert len(set(found)) > 3


def test_everything_random_comes_from_torch(folder):
    images, _ = open_training(small.data(folder), masks=True)

    def draw(seed: int):
        torch.manual_seed(seed)
        return images.load(0)

    first = draw(1)
    random.seed(5)
    np.random.seed(5)
    again = draw(1)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.objects.boxes, again.objects.boxes)
    assert any(draw(seed).image.shape != first.image.shape for seed in range(2, 6))


def test_masks_are_those_of_pycocotools(folder):
    coco = pytest.importorskip("pycocotools.coco").COCO(str(folder / "instances.json"))
    images, _ = open_test(small.data(folder), masks=True)
    for index, entry in enumerate(images.file.images):
        listed = coco.loadAnns(coco.getAnnIds(imgIds=[entry.id]))
        ours = [decoded_mask(a, entry) for a in images.file.annotations(index)]
        assert len(ours) == len(listed)
        for mask, annotation in zip(ours, listed, strict=True):
            assert (mask == coco.annToMask(annotation)).all()


def test_crowds_and_images_without_objects_are_not_trained_on(folder):
    images, lines = open_training(small.data(folder), masks=False)
    assert [entry.id for entry in images.file.images] == [100, 102, 103]
    assert lines == ["left out 1 images without objects"]
    _, objects = images.read(2)
    assert len(objects) == 2  # the third is a crowd
    every, lines = open_training(small.data(folder, without_objects=True), masks=True)
    assert len(every) == 4
    assert lines == []
    empty = every.load(1)
    assert len(empty.objects) == 0
    assert empty.objects.masks.shape == (0, *empty.image.shape[-2:])


def test_test_images_keep_the_order_and_the_whole_image(folder):
    images, _ = open_test(small.data(folder), masks=False)
    found = [images.load(i) for i in range(len(images))]
    assert [sample.image_id for sample in found] == [100, 101, 102, 103]
    assert [tuple(sample.image.shape[-2:]) for sample in found] == [
        (53, 96), (64, 85), (64, 64), (85, 64),
    ]  # fmt: skip
    assert found[0].original == (40, 72)
    batch = images.collate(found[:2])
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.sizes.tolist() == [[53, 96], [64, 85]]


def test_padding_is_zero_after_normalisation(folder):
    images, _ = open_test(small.data(folder), masks=False)
    batch = collate([images.load(0), images.load(1)])
    found = normalised(batch, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.float32)
    assert (found[0, :, 53:] == 0).all()
    assert (found[1, :, :, 85:] == 0).all()
    wanted = (batch.images[0, :, :53].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(found[0, :, :53], wanted)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda path: path.unlink(), "unreadable file"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "undecodable image"),
        (lambda path: path.write_bytes((path.parent / "2.png").read_bytes()), "image of another"),
    ],
)
def test_a_bad_image_is_a_bad_sample_with_the_name_of_its_file(folder, damage, cause):
    images, _ = open_training(small.data(folder), masks=True)
    damage(folder / "images" / "0.png")
    with pytest.raises(BadSample, match=r"images/0\.png") as found:
        images.load(0)
    assert found.value.cause.startswith(cause)
    assert str(found.value).count(found.value.cause) == 1


def test_few_absent_images_are_left_out_and_many_refused(folder):
    (folder / "images" / "0.png").unlink()
    images, lines = open_training(small.data(folder, max_bad_rate=0.3), masks=False)
    assert "1 of 4 images are listed and not there: 0.png; they are left out" in lines
    assert [entry.id for entry in images.file.images] == [102, 103]
    with pytest.raises(ValueError, match="1 of 4 images are listed and not there"):
        open_training(small.data(folder), masks=False)
    with pytest.raises(ValueError, match="1 of 4 images are listed and not there"):
        open_test(small.data(folder, max_bad_rate=0.3), masks=False)


def test_a_missing_image_folder_is_refused(folder):
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(ValueError, match="is no folder"):
        open_training(small.data(folder), masks=False)


def test_a_set_with_nothing_to_learn_from_is_refused(tmp_path):
    content = small.content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    small.write(tmp_path, content)
    with pytest.raises(ValueError, match="no image has an object"):
        open_training(small.data(tmp_path), masks=False)
