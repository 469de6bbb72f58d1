"""AP of boxes and masks over all ranks, in COCO's and in LVIS's way; figures equal pycocotools'."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m3i_scale.cluster.launch import World, gather_objects
from m3i_scale.data.map_stream import shares
from m3i_scale.tasks.detection.batch import Batch
from m3i_scale.tasks.detection.coco import CocoFile
from m3i_scale.tasks.detection.dataset import TestImages
from m3i_scale.tasks.detection.detections import Detections

Result = dict[str, Any]  # one detection as COCO's result files have it
LVIS_DETECTIONS = 300
# COCO's twelve numbers: name here, name in faster-coco-eval.
COCO_FIGURES = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "AP_small": "AP_small",
    "AP_medium": "AP_medium",
    "AP_large": "AP_large",
    "AR1": "AR_all",
    "AR10": "AR_second",
    "AR100": "AR_third",
    "AR_small": "AR_small",
    "AR_medium": "AR_medium",
    "AR_large": "AR_large",
}
LVIS_FIGURES = {
    **{name: COCO_FIGURES[name] for name in list(COCO_FIGURES)[:6]},
    "AP_rare": "APr",
    "AP_common": "APc",
    "AP_frequent": "APf",
    "AR300": "AR_all",
}


@torch.no_grad()
def detect(
    networks: Any, images: TestImages, world: World, *, batch: int = 1, workers: int = 0
) -> tuple[list[Result], int]:
    """Detections in the order of the images' ids, and how many images cannot be used (collective).

    Nothing is found in an image that cannot be used, and its objects are missed ones.

    Args:
        networks: detectors in evaluation mode; "detections" of a batch.
        images: what is evaluated.
        world: this rank.
        batch: images at once, on each rank.
        workers: processes that load images.

    Raises:
        ValueError: no image can be used.
    """
    own: list[Result] = []
    left_out = 0
    each = shares(images, batch, rank=world.rank, world_size=world.size, workers=workers)
    for share in each:
        left_out += len(share.bad)
        data: Batch = share.batch.to(world.device)
        found: list[Detections] = networks(data)["detections"]
        for index, image_id, one in zip(share.indices, data.image_ids, found, strict=True):
            own += coco_results(one, image_id, images.file) if index >= 0 else []
    every = gather_objects((own, left_out), world)
    results: list[Result] = [result for part, _ in every for result in part]
    return sorted(results, key=lambda result: result["image_id"]), sum(count for _, count in every)


def measure(file: CocoFile, results: Sequence[Result], kind: str) -> dict[str, float]:
    """The figures of `kind` ("box" or "mask") of detections in the images of an annotation file.

    LVIS, known by its fields, is measured in its way over the best 300 detections of an image.
    """
    evaluator = _evaluated(file, results, kind)
    evaluator.summarize()
    names = LVIS_FIGURES if file.lvis else COCO_FIGURES
    figures = evaluator.stats_as_dict
    return {f"{kind}/{name}": float(figures[theirs]) for name, theirs in names.items()}


def precision_recall(
    file: CocoFile, results: Sequence[Result], kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(recall (R,), overlap thresholds (T,), precision (T, R, K)) over all sizes of objects.

    Precision is -1 for a category without objects.
    """
    evaluator = _evaluated(file, results, kind)
    precision = torch.from_numpy(evaluator.eval["precision"].copy())[:, :, :, 0, -1]
    parameters = evaluator.params
    recall = torch.as_tensor(parameters.recThrs, dtype=torch.float32)
    return recall, torch.as_tensor(parameters.iouThrs, dtype=torch.float32), precision.float()


def _evaluated(file: CocoFile, results: Sequence[Result], kind: str) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(file.ground_truth())
    chosen = best_of_each_image(results, LVIS_DETECTIONS) if file.lvis else results
    found = truth.loadRes([dict(result) for result in chosen])
    iou = {"box": "bbox", "mask": "segm"}[kind]
    evaluator = COCOeval_faster(
        truth, found, iou, lvis_style=file.lvis, print_function=logging.getLogger(__name__).debug
    )
    if file.lvis:
        evaluator.params.maxDets = [LVIS_DETECTIONS]
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def best_of_each_image(results: Sequence[Result], count: int) -> list[Result]:
    """The `count` best detections of each image, in a stable order."""
    by_image: dict[int, list[Result]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    return [
        result
        for found in by_image.values()
        for result in sorted(found, key=lambda r: -r["score"])[:count]
    ]


def coco_results(found: Detections, image_id: int, file: CocoFile) -> Iterator[Result]:
    """Detections of an image as COCO's result files have them."""
    runs = [None] * len(found) if found.masks is None else _run_lengths(found.masks)
    corners = found.boxes.tolist()
    rows = zip(corners, found.labels.tolist(), found.scores.tolist(), runs, strict=True)
    for (left, top, right, bottom), label, score, mask in rows:
        result: Result = {
            "image_id": image_id,
            "category_id": file.categories[label].id,
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        yield result if mask is None else {**result, "segmentation": mask}


def _run_lengths(masks: Tensor) -> list[Any]:
    import numpy as np
    from faster_coco_eval.core import mask as coco_mask

    columns = np.asfortranarray(masks.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    encoded = coco_mask.encode(columns) if len(masks) else []
    for runs in encoded:
        if isinstance(runs["counts"], bytes):
            runs["counts"] = runs["counts"].decode("ascii")
        runs["size"] = [int(side) for side in runs["size"]]
    return list(encoded)
