"""Folders of images and masks: what is read, what is refused, what training does to a sample."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import IGNORED, MaskedImages, SegmentationData
from m3i_scale.data.bad_sample import BadSample, remedy
from m3i_scale.tasks.segmentation.augmentation import TrainingCrop, choose_crop, fitted
from m3i_scale.tasks.segmentation.dataset import (
    Sample,
    SegmentationSet,
    collate,
    decode_mask,
    read_class_names,
)

CLASSES = 5


def write(folder: Path, name: str, mask: Any, size: tuple[int, int] = (24, 32)) -> None:
    """An image of rows x columns pixels, and its mask."""
    for part in ("images", "masks"):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
    if mask is not None:
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(folder / "masks" / f"{name}.png")


def full(value: int, size: tuple[int, int] = (24, 32), kind: Any = np.uint8) -> Any:
    return np.full(size, value, dtype=kind)


def open_set(folder: Path, split: str | None = None, **data: Any) -> SegmentationSet:
    files = MaskedImages(images=str(folder / "images"), masks=str(folder / "masks"), split=split)
    return SegmentationSet(files, SegmentationData(train=files, **data), CLASSES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        mask = full(number)
        mask[:4] = IGNORED
        write(tmp_path, f"street/{number}", mask)
    return tmp_path


def test_samples_are_images_with_their_masks(folder: Path):
    data = open_set(folder)
    assert [data.name(i) for i in range(len(data))] == [f"street/{i}.jpg" for i in range(3)]
    sample = data.load(1)
    assert sample.image.shape == (3, 24, 32)
    assert sample.image.dtype == sample.mask.dtype == torch.uint8
    assert sample.mask[:4].unique().tolist() == [IGNORED]
    assert sample.mask[4:].unique().tolist() == [1]
    batch = collate([data.load(0), sample])
    assert batch.images.shape == (2, 3, 24, 32)
    assert batch.key == ("street/0.jpg", "street/1.jpg")
    assert len(batch.to("cpu")) == 2


def test_zero_may_stand_for_no_class(folder: Path):
    data = open_set(folder, zero_is_unlabelled=True)
    assert data.load(0).mask.unique().tolist() == [IGNORED]
    assert data.load(2).mask[4:].unique().tolist() == [1]
    write(folder, "street/3", full(CLASSES))  # the last class
    assert open_set(folder, zero_is_unlabelled=True).load(3).mask.unique().tolist() == [CLASSES - 1]
    with pytest.raises(
        BadSample, match=r"mask value beyond the classes: street/3.jpg: 5, of 5 classes up to 4"
    ):
        open_set(folder).load(3)


@pytest.mark.parametrize(
    ("mask", "values"),
    [
        (Image.fromarray(full(1)).convert("P"), None),
        (Image.fromarray(full(255)).convert("1"), None),
        (full(3, kind=np.uint16), [3]),
    ],
)
def test_kinds_of_png(tmp_path: Path, mask: Any, values: list[int] | None):
    if isinstance(mask, Image.Image) and mask.mode == "P":
        mask.putdata([2] * (24 * 32))
        values = [2]
    write(tmp_path, "a", mask)
    assert open_set(tmp_path).load(0).mask.unique().tolist() == (values or [1])


def test_bad_samples_are_named(folder: Path, caplog: pytest.LogCaptureFixture):
    write(folder, "bad/colours", np.zeros((24, 32, 3), np.uint8))
    write(folder, "bad/large", full(1, (25, 32)))
    write(folder, "bad/deep", full(1000, kind=np.uint16))
    write(folder, "bad/beyond", full(254))
    write(folder, "bad/cut_mask", full(1))
    mask = folder / "masks/bad/cut_mask.png"
    mask.write_bytes(mask.read_bytes()[:40])
    write(folder, "bad/cut_image", full(1))
    (folder / "images/bad/cut_image.jpg").write_bytes(b"no image")
    data = open_set(folder)
    causes = {}
    for index in range(len(data)):
        with contextlib.suppress(BadSample):
            data.load(index)
            continue
        with pytest.raises(BadSample) as bad:
            data.load(index)
        causes[data.name(index)] = bad.value.cause
    assert all(remedy(cause) for cause in causes.values())
    assert causes == {
        "bad/colours.jpg": "mask in colours",
        "bad/large.jpg": "mask of another size",
        "bad/deep.jpg": "mask value beyond the classes",
        "bad/beyond.jpg": "mask value beyond the classes",
        "bad/cut_mask.jpg": "undecodable mask",
        "bad/cut_image.jpg": "undecodable image",
    }
    assert (folder / "masks/bad/large.png").unlink() is None
    (folder / "masks/street/0.png").unlink()
    fewer = open_set(folder)
    assert len(fewer) == len(data) - 2
    (note,) = fewer.notes()
    assert note.startswith("2 images of ")
    assert note.endswith("left out: bad/large.jpg, street/0.jpg")
    assert note in caplog.text
    assert not data.notes()
    assert fewer.identity()["fingerprint"] != data.identity()["fingerprint"]
    (folder / "masks/bad/deep.png").chmod(0)
    (folder / "images/bad/deep.jpg").unlink()
    data._pairs[0][0].unlink()  # gone since the set was opened
    with pytest.raises(BadSample, match="unreadable file"):
        data.load(0)


def test_sets_that_cannot_be_used_are_refused(folder: Path):
    names = folder / "names.txt"

    def refused(change: str, match: str, **data: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            open_set(folder, **data)

    names.write_text("street/0\nstreet/2.jpg\n\n")
    assert len(open_set(folder, split=str(names))) == 2
    names.write_text("street/0\nstreet/7\nstreet/8\n")
    refused(
        "absent", r"data.train.split: .*lists 2 of 3 images.*street/7, street/8", split=str(names)
    )
    names.write_text("\n")
    refused("empty", r"lists no image", split=str(names))
    refused("no file", r"cannot read .*gone.txt", split=str(folder / "gone.txt"))
    write(folder, "street/0.b", None)
    (folder / "images/street/0.png").write_bytes((folder / "images/street/0.jpg").read_bytes())
    refused("twice", r"differ only in their suffix")
    for path in (folder / "images").rglob("*.*"):
        path.unlink()
    refused("empty", r"data.train.images: .* has no images")
    write(folder, "other", None)
    refused("no mask", r"none of the 1 images has a mask: for .*other.jpg there is no .*other.png")
    write(folder, "street/0", full(9))
    refused("values", r"none of 1 samples can be used: 1 mask value beyond.*street/0.jpg: 9, of 5")
    with pytest.raises(ConfigError, match=r"is no folder"):
        open_set(folder / "nowhere")


def test_class_names(tmp_path: Path):
    path = tmp_path / "names.txt"
    path.write_text("wall\nsky\ntree\n", encoding="utf-8")
    assert read_class_names(str(path), 3) == ["wall", "sky", "tree"]
    assert read_class_names(None, 2) == ["0", "1"]
    with pytest.raises(ConfigError, match=r"has 3 names and model.classes is 4"):
        read_class_names(str(path), 4)
    path.write_text("wall\nsky\nwall\n")
    with pytest.raises(ConfigError, match=r"has wall more than once"):
        read_class_names(str(path), 3)
    path.write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t5\t1\t1\twall\n2\t0.1\t5\t1\t1\tsky\n"
    )
    assert read_class_names(str(path), 2) == ["wall", "sky"]
    named = tmp_path / "names.json"
    named.write_text('{"sky": 1, "wall": 0}')
    assert read_class_names(str(named), 2) == ["wall", "sky"]
    for wrong in ('{"sky": 1, "wall": 2}', '["sky"]', "{"):
        named.write_text(wrong)
        with pytest.raises(ConfigError, match="numbers from 0 on"):
            read_class_names(str(named), 2)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_class_names(str(path), 3)


def sample(rows: int = 40, columns: int = 60) -> Sample:
    """Colours that say the class: red is 40 times it, or 250 where there is none."""
    mask = torch.randint(CLASSES, (rows // 16 + 1, columns // 16 + 1)).repeat_interleave(16, 0)
    mask = mask.repeat_interleave(16, 1)[:rows, :columns].to(torch.uint8)
    mask[:4] = IGNORED
    red = torch.where(mask == IGNORED, 250, mask * 40)
    return Sample(torch.stack([red, red, red]), mask, "a")


def augmentation(**changes: Any) -> TrainingCrop:
    files = MaskedImages(images="i", masks="m")
    settings = {"short_side": 40, "long_side": 160, "photometric": 0.0} | changes
    return TrainingCrop(SegmentationData(train=files, crop=32, augmentation=settings))


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_image_and_mask_stay_together(scale: tuple[float, float]):
    torch.manual_seed(0)
    for _ in range(4):
        made = augmentation(scale=scale)(sample())
        assert made.image.shape == (3, 32, 32)
        assert made.mask.shape == (32, 32)
        assert set(made.mask.unique().tolist()) <= {*range(CLASSES), IGNORED}
        # Where a class's pixels are inside, interpolation leaves their colour.
        wanted = torch.where(made.mask == IGNORED, 250, made.mask * 40).int()
        inner = made.mask != IGNORED
        assert ((made.image[0].int() - wanted).abs() < 8)[inner].float().mean() > 0.6
    if scale == (0.5, 0.5):  # 20 x 30 of 32 x 32 pixels
        assert made.mask[20:].eq(IGNORED).all()
        assert made.mask[:, 30:].eq(IGNORED).all()
        assert made.image[:, 20:].flatten(1).unique(dim=1).squeeze().tolist() == [124, 116, 104]


def test_torch_alone_draws():
    augment = augmentation(scale=(0.5, 2.0), photometric=0.8)
    given = sample()
    torch.manual_seed(3)
    first = augment(given)
    np.random.seed(1)
    torch.manual_seed(3)
    again = augment(given)
    other = augment(given)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)


def test_a_crop_is_not_of_one_class():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 48:] = 1
    torch.manual_seed(0)
    shares = []
    for _ in range(50):
        top, left, height, width = choose_crop(mask, 32, 0.75)
        assert (height, width) == (32, 32)
        shares.append((mask[top : top + 32, left : left + 32] == 0).float().mean().item())
    assert sum(share > 0.75 for share in shares) <= 10  # a few of which all ten crops were bad
    free = [choose_crop(mask, 32, 1.0)[1] for _ in range(50)]
    assert min(free) < 8


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [((100, 200), 1, (50, 100)), ((100, 400), 1, (25, 100)), ((200, 100), 32, (128, 64)),
     ((10, 10), 1, (50, 50))],
)  # fmt: skip
def test_fitted(size: tuple[int, int], multiple: int, expected: tuple[int, int]):
    assert fitted(size, 50, 100, multiple) == expected


def test_masks_of_no_class_at_all_are_allowed(tmp_path: Path):
    write(tmp_path, "a", full(IGNORED))
    assert open_set(tmp_path).load(0).mask.unique().tolist() == [IGNORED]


def test_decode_mask_takes_png_only(tmp_path: Path):
    path = tmp_path / "a.jpg"
    Image.fromarray(full(1)).save(path)
    with pytest.raises(BadSample, match=r"undecodable mask: cannot identify image file$"):
        decode_mask(path.read_bytes(), CLASSES)
