"""AP against pycocotools and by hand, sharing over ranks, pictures and their errors."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import coco as small
from m3i_scale.cluster.launch import World
from m3i_scale.config.detection import DetectionData
from m3i_scale.tasks.detection import evaluation, pictures
from m3i_scale.tasks.detection.batch import Batch
from m3i_scale.tasks.detection.coco import CocoFile, read_coco
from m3i_scale.tasks.detection.dataset import TestImages, open_test
from m3i_scale.tasks.detection.detections import Detections
from m3i_scale.tasks.detection.evaluation import COCO_FIGURES, coco_results, detect, measure


def alone() -> World:
    """The only rank."""
    return World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> TestImages:
    folder = tmp_path_factory.mktemp("coco")
    small.write(folder, small.content(8, seed=3))
    return open_test(small.data(folder), masks=True)[0]


def guesses(file: CocoFile, *, seed: int = 0, spare: int = 4) -> list[evaluation.Result]:
    """Detections near the truth and elsewhere, some of the wrong category; masks are boxes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, entry in enumerate(file.images):
        boxes = [list(a.box) for a in file.annotations(index)]
        boxes += [[4.0, 4.0, 20.0, 24.0]] * spare
        corners = torch.tensor(boxes) + torch.randn(len(boxes), 4, generator=generator) * 1.5
        corners[:, 2:] = torch.maximum(corners[:, 2:], corners[:, :2] + 2)
        labels = [a.category for a in file.annotations(index)] + [0] * spare
        labels[-1] = 2
        masks = torch.zeros(len(boxes), entry.height, entry.width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
            mask[max(0, top) : bottom, max(0, left) : right] = True
        scores = torch.rand(len(boxes), generator=generator)
        one = Detections(corners, torch.tensor(labels), scores, masks)
        found += list(coco_results(one, entry.id, file))
    return found


def reference(path: str, results: list[evaluation.Result], kind: str) -> list[float]:
    """The twelve numbers of pycocotools for the file as it is."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(path)
        copied = json.loads(json.dumps(results))
        theirs = COCOeval(truth, truth.loadRes(copied), {"box": "bbox", "mask": "segm"}[kind])
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    return theirs.stats.tolist()


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_pycocotools(images, kind, seed):
    results = guesses(images.file, seed=seed)
    found = measure(images.file, results, kind)
    wanted = reference(images.file.path, results, kind)
    assert list(found) == [f"{kind}/{name}" for name in COCO_FIGURES]
    assert list(found.values()) == pytest.approx(wanted, abs=1e-12)
    assert 0.05 < found[f"{kind}/AP"] < 0.95
    assert any(a["iscrowd"] for a in images.file.ground_truth()["annotations"])
    assert any(not images.file.entries(i) for i in range(len(images)))


def test_no_detections_at_all(images):
    found = measure(images.file, [], "box")
    assert found["box/AP"] == 0


class Oracle:
    """Networks that know the truth: what is asked of them is counted."""

    def __init__(self, images: TestImages) -> None:
        self.images, self.calls = images, 0
        self.truth = {entry.id: i for i, entry in enumerate(images.file.images)}

    def __call__(self, inputs: Batch) -> dict[str, list[Detections]]:
        self.calls += 1
        return {"detections": [self._one(image_id) for image_id in inputs.image_ids]}

    def _one(self, image_id: int) -> Detections:
        entry = self.images.file.images[self.truth[image_id]]
        known = self.images.file.annotations(self.truth[image_id])
        masks = torch.zeros(len(known), entry.height, entry.width, dtype=torch.bool)
        for mask, thing in zip(masks, known, strict=True):
            left, top, right, bottom = (int(value) for value in thing.box)
            mask[top:bottom, left:right] = True
        return Detections(
            torch.tensor([thing.box for thing in known]).reshape(-1, 4),
            torch.tensor([thing.category for thing in known], dtype=torch.int64),
            torch.linspace(0.9, 0.5, len(known)),
            masks,
        )


def test_the_truth_has_an_ap_of_one(images):
    results, left_out = detect(Oracle(images), images, alone(), batch=3)
    assert left_out == 0
    for kind in ("box", "mask"):
        assert measure(images.file, results, kind)[f"{kind}/AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_images_and_run_equally_many_batches(images, monkeypatch, size):
    wanted, _ = detect(Oracle(images), images, alone())
    monkeypatch.setattr(evaluation, "gather_objects", lambda value, world: [value])
    parts, calls = [], []
    for rank in range(size):
        oracle = Oracle(images)
        world = alone()._replace(rank=rank, size=size)
        parts += detect(oracle, images, world, batch=2)[0]
        calls.append(oracle.calls)
    assert len(set(calls)) == 1
    assert sorted(parts, key=lambda r: r["image_id"]) == wanted


def test_nothing_is_found_in_an_unreadable_image(tmp_path, caplog):
    small.write(tmp_path, small.content())
    images, _ = open_test(small.data(tmp_path), masks=True)
    whole, _ = detect(Oracle(images), images, alone())
    gone = next(image.id for image in images.file.images if image.file == "2.png")
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    results, left_out = detect(Oracle(images), images, alone(), batch=2)
    assert left_out == 1
    assert results == [result for result in whole if result["image_id"] != gone]
    assert len(results) < len(whole)
    assert "left out of the test set: undecodable image" in caplog.text
    assert "2.png" in caplog.text


def lvis(tmp_path, detections: int) -> tuple[CocoFile, list[evaluation.Result]]:
    """One image with one object, found behind so many wrong detections of higher scores."""
    image = {
        "id": 1,
        "file_name": "a.png",
        "height": 64,
        "width": 64,
        "neg_category_ids": [2],
        "not_exhaustive_category_ids": [],
    }
    box = [10.0, 10.0, 20.0, 20.0]
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 400.0}
    thing["segmentation"] = small.polygon(box)
    content = {
        "images": [image],
        "annotations": [thing],
        "categories": [
            {"id": 1, "name": "cup", "frequency": "r"},
            {"id": 2, "name": "car", "frequency": "f"},
            {"id": 3, "name": "van", "frequency": "c"},
        ],
    }
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    wrong = {"image_id": 1, "category_id": 3, "bbox": [40.0, 40.0, 5.0, 5.0], "score": 0.9}
    right = {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5}
    return read_coco(path), [*[dict(wrong) for _ in range(detections)], right]


@pytest.mark.parametrize(("before", "wanted"), [(299, 1.0), (300, 0.0)])
def test_lvis_counts_the_best_three_hundred_detections(tmp_path, before, wanted):
    file, results = lvis(tmp_path, before)
    found = measure(file, results, "box")
    assert found["box/AP"] == found["box/AP_rare"] == pytest.approx(wanted)
    assert found["box/AP_frequent"] == -1  # no object: nothing to measure


def test_lvis_counts_no_detection_of_a_category_nobody_looked_for(tmp_path):
    file, results = lvis(tmp_path, 3)  # category 3 is in no list of the image
    assert measure(file, results, "box")["box/AP"] == pytest.approx(1.0)
    results.append({"image_id": 1, "category_id": 2, "bbox": [1.0, 1, 5, 5], "score": 0.99})
    assert measure(file, results, "box")["box/AP"] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------- pictures


def test_errors_are_named_and_the_surest_come_first(images):
    file = images.file
    index = next(i for i in range(len(file)) if len(file.annotations(i)) == 3)
    first, second, third = file.annotations(index)
    entry = file.images[index]
    other = (first.category + 1) % 3

    def result(box, category, score):
        left, top, right, bottom = box
        bbox = [left, top, right - left, bottom - top]
        return {
            "image_id": entry.id,
            "category_id": file.categories[category].id,
            "bbox": bbox,
            "score": score,
        }

    only = CocoFile(file.path, [entry], file.categories, [file.entries(index)], file.findings, {})
    results = [
        result(first.box, first.category, 0.95),
        result(first.box, first.category, 0.6),
        result(first.box, other, 0.7),
        result(second.box, second.category, 0.9),
    ]
    found = pictures.mistakes(only, results)
    names = [c.name for c in file.categories]
    missed = [] if third.crowd else [f"missed {names[third.category]}"]
    assert [m.words for m in found] == [
        f"{names[other]}, is {names[first.category]}",
        f"{names[first.category]} twice",
        *missed,
    ]
    assert [m.weight for m in found] == [0.7, 0.6, *[0.5 for _ in missed]]


def test_a_detection_in_a_crowd_is_no_error(images):
    file = images.file
    index, crowd = next((i, a) for i in range(len(file)) for a in file.annotations(i) if a.crowd)
    others = [a for a in file.annotations(index) if not a.crowd]
    left, top, right, bottom = crowd.box
    result = {
        "image_id": file.images[index].id,
        "category_id": file.categories[crowd.category].id,
        "bbox": [left, top, (right - left) / 2, (bottom - top) / 2],
        "score": 0.99,
    }
    found = [m for m in pictures.mistakes(file, [result]) if m.image == index]
    assert [m.words.split()[0] for m in found] == ["missed"] * len(others)


def test_pictures_are_drawn(images, tmp_path):
    results = guesses(images.file)
    pictures.save_detections(tmp_path / "detections.png", images, results, count=3)
    pictures.save_mistakes(tmp_path / "mistakes.png", images, results, count=7)
    pictures.save_curves(tmp_path / "curves.png", images.file, results, ["box", "mask"])
    for name in ("detections", "mistakes", "curves"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10


def test_pictures_of_nothing_are_drawn(images, tmp_path):
    pictures.save_detections(tmp_path / "detections.png", images, [], count=1)
    pictures.save_curves(tmp_path / "curves.png", images.file, [], ["box"])
    one = images.file.select([1])  # without objects
    empty = TestImages(one, images.folder, images.data, masks=True)
    pictures.save_mistakes(tmp_path / "mistakes.png", empty, [])
    assert isinstance(images.data, DetectionData)
    assert len(list(tmp_path.iterdir())) == 3
