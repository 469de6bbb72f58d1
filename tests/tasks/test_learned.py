"""Evaluation while pre-training: the figures of `m3i eval`, and no trace in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor

from helpers.ranks import run_ranks
from helpers.run_folder import captioned_config, networks
from helpers.shards import write_images
from helpers.small import small_config, small_targets, small_tree
from helpers.training import full_weights, open_small, train
from m3i_scale.cluster.launch import World
from m3i_scale.config import ConfigError, load_config
from m3i_scale.engine import loop
from m3i_scale.engine.checkpoint import CheckpointReader
from m3i_scale.engine.state import snapshot
from m3i_scale.tasks.learned import Learned
from m3i_scale.transfer import evaluation, loading

ALL = ["knn", "zero_shot", "retrieval", "classifier", "rank"]
STEPS = {
    "optimizer.duration": "3 steps",
    "checkpoint.every": "1 steps",
    "optimizer.teacher_momentum": 0.5,
}
KEYS = {  # in the metrics, and in the table
    "knn_caption": "kNN caption subject",
    "knn_category": "kNN category",
    "zero_shot_top1": "zero-shot caption subject, top-1",
    "zero_shot_top5": "zero-shot caption subject, top-5",
    "zero_shot_caption": "zero-shot whole caption, top-1",
    "classifier": "pre-trained classifier, category",
    **{
        f"retrieval_{way.replace(' ', '_')}_{k}": f"retrieval, {way}, R@{k}"
        for way in ("image to text", "text to image")
        for k in (1, 5, 10)
    },
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gallery and queries that no number of ranks divides; one of the queries is damaged."""
    folder = tmp_path_factory.mktemp("sets")
    gallery = [write_images(folder, kind, range(n, n + 11), kind)
               for n, kind in ((0, "text"), (20, "category"))]  # fmt: skip
    queries = [write_images(folder, "queries", range(5, 14), "both")]
    tar = (folder / "queries.tar").read_bytes()
    begin = tar.index(b"\xff\xd8\xff", tar.index(b"00007.jpg"))
    (folder / "queries.tar").write_bytes(tar[:begin] + b"\0" * 400 + tar[begin + 400 :])
    tokenizer = captioned_config(folder).model.text.tokenizer  # type: ignore[union-attr]
    return {
        "model.text.tokenizer": tokenizer,
        "evaluation": {"tasks": ALL, "gallery": gallery, "queries": queries, "batch": 4,
                       "neighbours": 5, "every": "1 steps"},
    }  # fmt: skip


def end_of(run: loop.Run) -> dict[str, Tensor]:
    """All that a checkpoint would hold of this rank, generators included, and whole weights."""
    tensors, _ = snapshot(run.sharded, run.world, run.progress, run.task)
    return tensors | {f"whole/{name}": value for name, value in full_weights(run).items()}


def train_and_evaluate(
    world: World, folder: Path, overrides: dict[str, Any], kinds: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A run without evaluation, with it in every step, and resumed amid; a step of other kinds."""
    ends, middle = {}, folder / "with" / "small" / "checkpoints" / "step-00000002"
    for way, more, resume in (
        ("without", {"evaluation": None}, "never"),
        ("with", {}, "never"),
        ("resumed", {}, str(middle)),
    ):
        run = open_small(world, folder / way, overrides | STEPS | more, resume)
        assert train(run)
        ends[way] = end_of(run)
    found: dict[str, Any] = {way: same(ends["without"], ends[way]) for way in ends}
    for kind, own in kinds.items():
        run = open_small(world, folder / kind, overrides | STEPS | own, "never")
        loop.train_step(run, loop.open_batches(run))
        run.progress.step, before = 1, end_of(run)
        alive = mock.Mock()
        found[kind] = loop.evaluate(run, alive)
        found[f"{kind}, signs of life"] = alive.call_count
        found[f"{kind}, state"] = same(before, end_of(run))
        loop.save(run)
        run.saver.finish()
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def named(values: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation among those of a step."""
    return {
        name.removeprefix("evaluation/"): value
        for name, value in values.items()
        if name.startswith("evaluation/")
    }


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Figures of the evaluations of the run `small`, by step."""
    lines = map(json.loads, (folder / "small" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: named(line) for line in lines}


KINDS: dict[str, dict[str, Any]] = {
    "sharded": {"engine.teacher": "sharded"},
    "stage 1": {"engine.zero.stage": 1},
    "student": {"evaluation.weights": "student"},
    "text": {"objective.targets": small_targets("text_i"), "objective.balance": None,
             "evaluation.tasks": ["zero_shot", "knn", "rank"]},
}  # fmt: skip


@pytest.mark.distributed
def test_figures_are_those_of_eval_and_the_run_is_as_without(tmp_path: Path, sets: dict[str, Any]):
    for rank in run_ranks(2, train_and_evaluate, tmp_path, overrides=sets, kinds=KINDS):
        assert rank["with"]
        assert rank["resumed"]
        assert all(rank[f"{kind}, state"] for kind in KINDS)
        # Queries and gallery in batches of 4, each rank its half.
        assert all(rank[f"{kind}, signs of life"] >= 2 + 3 for kind in KINDS)
    found, resumed = figures(tmp_path / "with"), figures(tmp_path / "resumed")
    assert list(found) == [0, 1, 2]
    assert resumed == {2: found[2]}
    assert figures(tmp_path / "without") == {0: {}, 1: {}, 2: {}}
    assert set(found[2]) == {*KEYS, "rank", "left_out"}
    assert found[2]["left_out"] == 1
    assert len({of["rank"] for of in found.values()}) == 3
    for step in (0, 2):
        expected = of_eval(tmp_path / "with", sets, step + 1)
        assert found[step] == pytest.approx(expected, rel=1e-4), step
    for kind, own in KINDS.items():
        expected = of_eval(tmp_path / kind, sets | own, 1)
        measured = named(rank[kind])
        assert measured == pytest.approx(expected, rel=1e-4), kind
    assert rank["student"] != rank["sharded"]


def of_eval(folder: Path, overrides: dict[str, Any], step: int) -> dict[str, float]:
    """What `m3i eval --which teacher` (or the student, without one) says of a checkpoint."""
    config = small_config(folder, STEPS | overrides)
    spec, which = config.evaluation, config.evaluated_encoder
    assert spec is not None
    reader = CheckpointReader(config.run_folder / "checkpoints" / f"step-{step:08d}")
    trained = loading.build_trained(config, reader, which)
    both = {evaluation.TRAINED: trained, evaluation.UNTRAINED: loading.build_untrained(config)}
    options = evaluation.Options(
        neighbours=spec.neighbours,
        progress=False,
        recall_at=evaluation.RECALL_AT if "retrieval" in spec.tasks else (),
    )
    result = evaluation.evaluate(config, both, spec.gallery, spec.queries, options)
    rows = {row.task: 100 * row.trained for row in result.rows}
    accuracies = {key: rows[task] for key, task in KEYS.items() if task in rows}
    ranks = {"rank": result.ranks["trained"]}
    return accuracies | ranks | {"left_out": len(result.left_out)}


ALONE = World(0, 0, 1, torch.device("cpu"))


def test_images_that_vanish_in_the_night_do_not_end_the_run(
    tmp_path: Path, sets: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    queries = write_images(tmp_path, "vanishing", range(5, 9), "both")
    config = small_config(tmp_path, sets | {"evaluation.queries": [queries]})
    learned, model = Learned(config), networks(config, seed=1)
    with_teacher = learned.figures(model, ALONE)
    assert set(with_teacher) == {*KEYS, "rank", "left_out"}
    (tmp_path / "vanishing.tar").unlink()
    assert learned.figures(model, ALONE) == {"left_out": 26}
    assert "this evaluation is left out: there is no usable sample in" in caplog.text


def test_a_sample_that_is_left_out_is_named_once(
    tmp_path: Path, sets: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    config = small_config(tmp_path, sets | {"evaluation.tasks": ["rank"], "evaluation.gallery": []})
    learned, model = Learned(config), networks(config, seed=1)
    assert [learned.figures(model, ALONE)["left_out"] for _ in range(2)] == [1, 1]
    assert caplog.text.count("left out sample 00007") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.tasks": ["knm"]}, "knn"),
        ({"evaluation.tasks": []}, "evaluation.tasks"),
        ({"evaluation.tasks": ["rank", "rank"]}, "twice"),
        ({"evaluation.gallery": []}, "knn finds neighbours in a gallery; set gallery"),
        ({"evaluation.tasks": ["rank"]}, "tasks has neither; remove one of them"),
        ({"evaluation.queries": []}, "evaluation.queries"),
        (
            {"objective.targets": small_targets("image_i", "category_i")},
            "evaluation.tasks has zero_shot, which needs a text tower",
        ),
        (
            {"objective.targets": small_targets("image_i", "text_i")},
            "evaluation.tasks has classifier, which needs a classifier of categories",
        ),
        (
            KINDS["text"] | {"evaluation.weights": "teacher"},
            "no target of the objective uses one; set it to student, or to auto",
        ),
    ],
)
def test_impossible_evaluations_are_refused_by_the_configuration(
    tmp_path: Path, sets: dict[str, Any], changes: dict[str, Any], message: str
):
    tree = small_tree(overrides={"folder": str(tmp_path), **sets, **changes})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.yaml")


def test_sets_that_do_not_fit_are_refused_before_training(tmp_path: Path, sets: dict[str, Any]):
    texts, classes = (
        write_images(tmp_path, kind, range(3), kind)  # type: ignore[arg-type]
        for kind in ("text", "category")
    )

    def refused(**changes: Any) -> str:
        own = {f"evaluation.{name}": value for name, value in changes.items()}
        with pytest.raises(ConfigError) as caught:
            Learned(small_config(tmp_path, sets | own)).require(4)
        return str(caught.value)

    assert "there is no index nowhere.parquet" in refused(queries=["nowhere.parquet"])
    assert "is gallery and queries at once" in refused(gallery=[texts], queries=[texts])
    assert "knn needs labels that both sides have" in refused(gallery=[texts], queries=[classes])
    assert "zero_shot is judged by captions" in refused(
        tasks=["zero_shot"], gallery=[texts], queries=[classes]
    )
    assert "classifier is judged by categories" in refused(
        tasks=["classifier"], gallery=[], queries=[texts]
    )
    assert "evaluation.queries has 3 images for 4 ranks" in refused(
        tasks=["rank"], gallery=[], queries=[texts]
    )
    assert "evaluation.gallery has 3 images for 4 ranks" in refused(gallery=[classes])
    assert "evaluation.queries has 2 images for 4 ranks" in refused(limit=2)
