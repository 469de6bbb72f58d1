import pytest
import torch

from helpers.run_folder import networks
from helpers.shards import write_images
from m3i_scale.transfer.evaluation import Options, TaskScore, evaluate, markdown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def both(config):
    return {"trained": networks(config, seed=1), "untrained": networks(config, seed=2)}


@pytest.fixture(scope="module")
def indexes(folder):
    return {
        "text": write_images(folder, "text", range(24), "text"),
        "category": write_images(folder, "category", range(24), "category"),
        "copies": write_images(folder, "copies", range(4, 16), "both"),
    }


def by_task(result):
    return {row.task: row for row in result.rows}


def test_copies_of_gallery_images_find_themselves(config, both, indexes):
    result = evaluate(
        config,
        both,
        [indexes["text"], indexes["category"]],
        [indexes["copies"]],
        Options(probe=True, neighbours=1, subject="thing", category="class"),
    )
    rows = by_task(result)
    assert rows["kNN thing"] == TaskScore("kNN thing", 1.0, 1.0, pytest.approx(2 / 12), 12, 6)
    assert rows["kNN class"] == TaskScore("kNN class", 1.0, 1.0, pytest.approx(3 / 12), 12, 5)
    assert list(rows) == [
        "zero-shot thing, top-1",
        "zero-shot thing, top-5",
        "zero-shot whole caption, top-1",
        "pre-trained classifier, class",
        "kNN thing",
        "kNN class",
        "linear probe thing",
        "linear probe class",
    ]
    assert rows["zero-shot whole caption, top-1"].labels == 12  # the distinct captions
    assert len(result.gallery) == 48


def test_figures_are_those_of_the_networks_by_themselves(config, both, indexes):
    """Trained and untrained exchanged: the columns are exchanged, nothing else."""
    swapped = {"trained": both["untrained"], "untrained": both["trained"]}
    first, second = (
        evaluate(config, pair, [indexes["text"]], [indexes["copies"]], Options(neighbours=5))
        for pair in (both, swapped)
    )
    for one, other in zip(first.rows, second.rows, strict=True):
        assert (one.trained, one.untrained) == (other.untrained, other.trained)
        assert one.chance == other.chance


def test_the_classifier_is_judged_by_its_own_scores(config, both, indexes):
    result = evaluate(config, both, [indexes["category"]], [indexes["copies"]], Options())
    row = by_task(result)["pre-trained classifier, category"]
    features = result.query_features
    scores = both["trained"].category_head(features)
    right = (scores.argmax(1) == result.queries.category).float().mean()
    assert row.trained == pytest.approx(float(right))


def test_queries_must_not_be_in_the_gallery(config, both, indexes):
    with pytest.raises(ValueError, match="gallery and queries at once"):
        evaluate(config, both, [indexes["text"]], [indexes["text"]], Options())


def test_categories_that_the_classifier_does_not_know(folder, indexes, both, config):
    model = config.model.model_copy(update={"categories": 2})
    fewer = config.model_copy(update={"model": model})
    pair = {"trained": networks(fewer, seed=1), "untrained": networks(fewer, seed=2)}
    with pytest.raises(ValueError, match="category 4 and the pre-trained classifier knows 0 to 1"):
        evaluate(fewer, pair, [indexes["category"]], [indexes["copies"]], Options())


def test_nothing_to_compare(config, indexes, folder):
    targets = [t for t in config.objective.targets if t.dense]
    objective = config.objective.model_copy(update={"targets": targets, "balance": None})
    dense = config.model_copy(update={"objective": objective})
    pair = {"trained": networks(dense, seed=1), "untrained": networks(dense, seed=2)}
    other = write_images(folder, "more", range(30, 34), "category")
    with pytest.raises(ValueError, match="no kind of label in common"):
        evaluate(dense, pair, [indexes["text"]], [other], Options())
    result = evaluate(dense, pair, [indexes["category"]], [other], Options())
    assert list(by_task(result)) == ["kNN category"]
    assert torch.isfinite(result.query_features).all()


def test_table():
    table = markdown([TaskScore("kNN thing", 0.5, 0.125, 0.01, 200, 100)])
    assert table.splitlines()[-1].split("|")[1:-1] == [
        " kNN thing   ", "    50.0 ", "      12.5 ", "    1.0 ", "     200 ", "    100 ",
    ]  # fmt: skip
    assert len({len(line) for line in table.splitlines()}) == 1
