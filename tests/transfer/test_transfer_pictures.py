import json
import math

import pytest
from PIL import Image

from helpers.run_folder import networks
from helpers.shards import write_images
from m3i_scale.transfer.evaluation import Options, evaluate
from m3i_scale.transfer.pictures import read_metrics, save_curves, save_retrieval, smooth


def colours(path):
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


GREEN, RED = (0x1A, 0x7F, 0x37), (0xB4, 0x23, 0x18)


def test_copies_are_framed_as_right(tmp_path, config):
    """With one neighbour for each query, the query itself, no frame can be red."""
    both = {"trained": networks(config, 1), "untrained": networks(config, 2)}
    gallery = [write_images(tmp_path, "gallery", range(8), "category")]
    queries = [write_images(tmp_path, "queries", range(2, 5), "category")]
    result = evaluate(config, both, gallery, queries, Options())
    save_retrieval(tmp_path / "one.png", result, 64, columns=1)
    assert GREEN in colours(tmp_path / "one.png")
    assert RED not in colours(tmp_path / "one.png")
    save_retrieval(tmp_path / "three.png", result, 64, columns=3)
    assert RED in colours(tmp_path / "three.png")


def test_captions_without_comparable_images(tmp_path, config):
    both = {"trained": networks(config, 1), "untrained": networks(config, 2)}
    gallery = [write_images(tmp_path, "gallery", range(8), "category")]
    queries = [write_images(tmp_path, "queries", range(2, 5), "text")]
    result = evaluate(config, both, gallery, queries, Options())
    save_retrieval(tmp_path / "captions.png", result, 64)
    assert (tmp_path / "captions.png").stat().st_size > 5000


def test_a_resumed_run_is_read_once_per_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss/total": v} for s, v in ((0, 9.0), (1, 8.0), (2, 7.0), (1, 5.0))]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "loss/to')
    assert [(line["step"], line["loss/total"]) for line in read_metrics(path)] == [
        (0, 9.0), (1, 5.0), (2, 7.0),
    ]  # fmt: skip
    with path.open("a") as file:
        file.write('\n{"step": 4, "loss/total": 4.0, "evaluation/knn_caption": 12.5}')
    save_curves(tmp_path / "curves.png", path)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500


def test_metrics_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot read the metrics"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no step"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_smoothing_passes_over_what_is_not_finite():
    assert smooth([1.0, math.nan, 3.0, 5.0], share=0.5) == [1.0, 2.0, 4.0, 4.0]
    assert smooth([1.0, 2.0]) == [1.0, 2.0]
