"""Test of a network: windows, mIoU against numpy, ranks, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.ranks import run_ranks
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError
from m3i_scale.config.segmentation import (
    IGNORED,
    MaskedImages,
    SegmentationData,
    SegmentationEvaluation,
)
from m3i_scale.tasks.segmentation.dataset import SegmentationSet
from m3i_scale.tasks.segmentation.evaluation import Result, evaluate
from m3i_scale.tasks.segmentation.inference import Planner, windows
from m3i_scale.tasks.segmentation.networks import Inputs
from m3i_scale.tasks.segmentation.pictures import save_pictures

CLASSES, IMAGES, CROP = 4, 7, 32
NAMES = ["wall", "sky", "tree", "never"]
ALONE = World(0, 0, 1, torch.device("cpu"))


class Brightness(torch.nn.Module):
    """Scores of classes by the colour of a pixel, and how often it was called."""

    calls = 0

    def forward(self, inputs: Inputs) -> Mapping[str, Tensor]:
        self.calls += 1
        assert all(side % 8 == 0 for side in inputs.images.shape[-2:])
        red = inputs.images[:, :1].float()
        centres = torch.tensor([-1.5, 0.0, 1.5, 9.0])[:, None, None]
        return {"scores": -((red - centres) ** 2)}


def write_set(folder: Path) -> MaskedImages:
    """Images of different sizes, whose mask is about what `Brightness` says of them."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(IMAGES):
        size = (40 + 8 * number, 64)
        mask = rng.integers(0, 3, size).astype(np.uint8)
        shade = (mask.astype(int) * 90 + 20 + rng.integers(-40, 40, size)).clip(0, 255)
        mask[: 3 * number] = IGNORED
        pixels = np.repeat(shade[..., None], 3, 2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
    return MaskedImages(images=str(folder / "images"), masks=str(folder / "masks"))


def data_of(files: MaskedImages) -> SegmentationData:
    return SegmentationData(train=files, crop=CROP)


def planner(files: MaskedImages, device: str = "cpu", **test: Any) -> Planner:
    settings = {"short_side": 64, "long_side": 256, "round_to": 1, **test}
    return Planner(
        SegmentationEvaluation.model_validate(settings), data_of(files), 8, torch.device(device),
        torch.float32,
    )  # fmt: skip


def run(files: MaskedImages, world: World = ALONE, **test: Any) -> tuple[Result, int]:
    networks = Brightness()
    data = SegmentationSet(files, data_of(files), CLASSES)
    return evaluate(networks, data, NAMES, planner(files, **test), world, 3), networks.calls


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> MaskedImages:
    return write_set(tmp_path_factory.mktemp("set"))


def predicted(files: MaskedImages) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks and predictions of all images at their size, by numpy."""
    pairs = []
    for number in range(IMAGES):
        mask = np.asarray(Image.open(f"{files.masks}/{number}.png"))
        red = np.asarray(Image.open(f"{files.images}/{number}.png"))[..., 0] / 255
        scores = -(
            (((red - 0.485) / 0.229)[None] - np.array([-1.5, 0, 1.5, 9])[:, None, None]) ** 2
        )
        pairs.append((mask, scores.argmax(0)))
    return pairs


def test_figures_are_those_of_numpy(files: MaskedImages):
    # At their own size: `long_side` is the only bound, and all images have 64 columns or more rows.
    data = SegmentationSet(files, data_of(files), CLASSES)

    class Sizes(Planner):
        def plan(self, image: Tensor) -> Any:
            own = {"short_side": min(image.shape[1:]), "long_side": max(image.shape[1:])}
            self.test = self.test.model_copy(update=own)
            return super().plan(image)

    exact = Sizes(planner(files).test, data_of(files), 8, torch.device("cpu"), torch.float32)
    result = evaluate(Brightness(), data, NAMES, exact, ALONE, 3)
    truth = np.concatenate([mask.flatten() for mask, _ in predicted(files)])
    guess = np.concatenate([found.flatten() for _, found in predicted(files)])
    labelled = truth != IGNORED
    truth, guess = truth[labelled], guess[labelled]
    iou = [
        ((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(3)
    ]
    accuracy = [((truth == c) & (guess == c)).sum() / (truth == c).sum() for c in range(3)]
    figures = result.figures()
    assert figures["mIoU"] == pytest.approx(np.mean(iou), abs=1e-12)
    assert figures["mean_accuracy"] == pytest.approx(np.mean(accuracy), abs=1e-12)
    assert figures["pixel_accuracy"] == pytest.approx((truth == guess).mean(), abs=1e-12)
    assert 0.5 < figures["mIoU"] < 0.99
    assert figures["images"] == IMAGES
    table = json.loads(json.dumps(result.table(), allow_nan=False))
    assert table["classes"]["sky"]["IoU"] == pytest.approx(iou[1])
    assert table["classes"]["never"] == {"IoU": None, "accuracy": None, "pixels": 0}


def test_classes_of_which_only_the_prediction_has_any():
    confusion = torch.tensor([[6, 2, 0], [0, 0, 0], [0, 0, 0]])
    result = Result(confusion, ["a", "b", "c"], 1, 0, None)  # type: ignore[arg-type]
    assert result.figures()["mIoU"] == pytest.approx((6 / 8 + 0) / 2)
    assert result.figures()["mean_accuracy"] == 6 / 8


def test_windows():
    assert windows((32, 48), 32, 20) == [(0, 0, 32, 32), (0, 16, 32, 32)]
    assert windows((30, 20), 32, 20) == [(0, 0, 30, 20)]
    assert windows((72, 32), 32, 20) == [(0, 0, 32, 32), (20, 0, 32, 32), (40, 0, 32, 32)]
    for size in ((33, 100), (64, 64), (57, 90)):
        seen = torch.zeros(size)
        for top, left, height, width in windows(size, 32, 23):
            assert seen[top : top + height, left : left + width].shape == (height, width)
            seen[top : top + height, left : left + width] += 1
        assert seen.min() >= 1


def test_a_window_as_large_as_the_image_is_the_whole_image(files: MaskedImages):
    whole, _ = run(files)
    settings = SegmentationEvaluation(
        mode="window", stride=200, short_side=64, long_side=256, round_to=1
    )
    large = Planner(
        settings, SegmentationData(train=files, crop=256), 8, torch.device("cpu"), torch.float32
    )
    data = SegmentationSet(files, data_of(files), CLASSES)
    window = evaluate(Brightness(), data, NAMES, large, ALONE, 0)
    assert torch.equal(whole.confusion, window.confusion)
    # Scores of single pixels do not depend on the window that they are seen through.
    small, calls = run(files, mode="window", stride=20, batch=3)
    assert torch.equal(whole.confusion, small.confusion)
    assert calls > 2 * IMAGES


def test_sizes_and_mirrors(files: MaskedImages):
    plan = planner(files, scales=[0.5, 1.0], flip=True).plan(
        torch.randint(255, (3, 50, 70), dtype=torch.uint8)
    )
    assert [(view.image.shape[-2:], view.flipped) for view in plan.views] == [
        ((32, 45), False), ((32, 45), True), ((64, 90), False), ((64, 90), True)
    ]  # fmt: skip
    assert torch.equal(plan.views[1].image, plan.views[0].image.flip(-1))
    answers = [Brightness()(Inputs(x))["scores"] for x in plan.inputs()]
    prediction = plan.prediction(answers)
    assert prediction.shape == (50, 70)
    assert prediction.dtype == torch.uint8
    # Mirrored scores are mirrored back: only they together leave an image's sides alone.
    one = planner(files, flip=True).plan(torch.randint(255, (3, 64, 64), dtype=torch.uint8))
    plain, mirrored = (Brightness()(Inputs(x))["scores"] for x in one.inputs())
    assert torch.equal(one.prediction([plain, mirrored]), plain[0].argmax(0).to(torch.uint8))


def test_windows_without_gaps(files: MaskedImages):
    with pytest.raises(ConfigError, match=r"evaluation.stride 33 is above data.crop 32"):
        planner(files, mode="window", stride=33)


def test_images_that_cannot_be_read_are_counted(tmp_path: Path, caplog: Any):
    files = write_set(tmp_path)
    Path(files.images, "2.png").write_bytes(b"nothing")
    result, _ = run(files)
    assert result.figures()["images"] == IMAGES - 1
    assert result.figures()["left_out"] == 1
    assert "left out: undecodable image: 2.png" in caplog.text
    data = SegmentationSet(files, data_of(files), CLASSES)
    for path in Path(files.images).iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 7 images could be tested: 7 undecodable image"):
        evaluate(Brightness(), data, NAMES, planner(files), ALONE)


def on_a_rank(world: World, folder: Path, files: MaskedImages, **test: Any) -> Any:
    result, calls = run(files, world, **test)
    worst = [(index, right) for index, right, _ in result.tiles.worst]
    pictures = torch.stack([picture for _, _, picture in result.tiles.chosen])
    return result.confusion, calls, worst, pictures


@pytest.mark.distributed
def test_ranks_find_the_same_and_call_equally_often(files: MaskedImages, tmp_path: Path):
    """Seven images on two ranks, with different numbers of windows."""
    options: dict[str, Any] = {"mode": "window", "stride": 20, "batch": 1}
    expected, _ = run(files, **options)
    worst = [(index, right) for index, right, _ in expected.tiles.worst]
    chosen = torch.stack([picture for _, _, picture in expected.tiles.chosen])
    first, second = run_ranks(2, on_a_rank, tmp_path / "ranks", files=files, **options)
    for found in (first, second):
        assert torch.equal(found[0], expected.confusion)
        assert found[2] == worst
        assert torch.equal(found[3], chosen)
    assert first[1] == second[1]


def test_pictures(files: MaskedImages, tmp_path: Path):
    result, _ = run(files)
    assert [index for index, _, _ in result.tiles.chosen] == [0, 2, 4]
    rights = [right for _, right, _ in result.tiles.worst]
    assert rights == sorted(rights)
    assert len(rights) == 3
    written = save_pictures(tmp_path / "pictures", result, lambda index: f"{index}.png")
    assert [path.name for path in written] == ["predictions.png", "worst.png", "confusion.png"]
    for path in written:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    none, _ = run(files)
    empty = Result(none.confusion, NAMES, 1, 0, type(none.tiles)([]))
    assert [path.name for path in save_pictures(tmp_path / "few", empty, str)] == ["confusion.png"]
