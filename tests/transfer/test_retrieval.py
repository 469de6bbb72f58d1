"""Recall at K against sorting by hand; ties; several captions of an image in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from helpers.run_folder import captioned_config, networks
from helpers.shards import jpeg, write_tar
from m3i_scale.models.tokenizer import load_tokenizer
from m3i_scale.shards.indexing import index_shards
from m3i_scale.transfer import retrieval
from m3i_scale.transfer.evaluation import Options, evaluate
from m3i_scale.transfer.features import encode_captions
from m3i_scale.transfer.prompts import Prompts

CAPTIONS = [["Thing a", "Thing b"], ["Thing c"], ["Thing b", "Thing d", "Thing e"], ["Thing f"]]


def by_hand(scores: list[list[float]], belong: list[set[int]], k: int) -> float:
    """Sort all candidates of each query, what does not belong first among equals."""
    found = 0
    for row, own in zip(scores, belong, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c in own))
        found += bool(own & set(order[:k]))
    return found / len(scores)


def write_set(folder: Path, name: str, first: int) -> str:
    members = []
    for number, captions in enumerate(CAPTIONS, first):
        members += [(f"{number}.jpg", jpeg(number, (72, 64))),
                    (f"{number}.json", json.dumps({"captions": captions}).encode())]  # fmt: skip
    index = folder / f"{name}.parquet"
    index_shards([str(write_tar(folder / f"{name}.tar", members))], str(index), kind="text",
                 text_member="json:captions", progress=False)  # fmt: skip
    return str(index)


def test_recall_of_several_captions_is_that_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "_SCORES", 11)  # two images at once
    config = captioned_config(tmp_path)
    both = {"trained": networks(config, seed=1), "untrained": networks(config, seed=2)}
    gallery, queries = write_set(tmp_path, "gallery", 10), write_set(tmp_path, "queries", 20)
    result = evaluate(config, both, [gallery], [queries], Options(recall_at=(1, 2, 3)))
    rows = {row.task: row for row in result.rows}
    texts = sorted({caption for own in CAPTIONS for caption in own})
    text = config.model.text
    tokenizer = load_tokenizer(text.tokenizer)
    embedded = encode_captions(both["trained"], tokenizer, texts, text.max_length)
    scores = result.query_texts @ embedded.T
    to_text = [{texts.index(caption) for caption in own} for own in CAPTIONS]
    to_image = [{i for i, own in enumerate(CAPTIONS) if caption in own} for caption in texts]
    for k in (1, 2, 3):
        found = rows[f"retrieval, image to text, R@{k}"]
        assert found.trained == by_hand(scores.tolist(), to_text, k)
        assert (found.queries, found.labels) == (4, 6)
        found = rows[f"retrieval, text to image, R@{k}"]
        assert found.trained == by_hand(scores.T.tolist(), to_image, k)
        assert (found.queries, found.labels) == (6, 4)
    chances = [rows[f"retrieval, text to image, R@{k}"].chance for k in (1, 2, 3)]
    assert chances == [3 / 6, 5 / 6, 1.0]  # images of three, two, one and one captions


@pytest.mark.parametrize("levels", [2, 1000])
def test_ranks_of_many_scores_with_ties(levels):
    torch.manual_seed(levels)
    scores = torch.randint(levels, (40, 25)).float()
    belong = [sorted({int(c) for c in torch.randint(25, (3,))}) for _ in range(40)]
    rank = retrieval.before(scores, belong)
    for k in (1, 5, 10):
        expected = by_hand(scores.tolist(), [set(own) for own in belong], k)
        assert float((rank < k).float().mean()) == pytest.approx(expected)


def test_a_network_that_says_nothing_finds_nothing():
    same = torch.zeros(3, 20)
    assert retrieval.before(same, [[0], [1], [2]]).tolist() == [19, 19, 19]
    assert retrieval.before(same.fill_(torch.nan), [[0], [1], [2]]).tolist() == [19, 19, 19]


def test_a_category_is_the_mean_of_its_sentences(tmp_path):
    (tmp_path / "names").write_text("cat\ndog\n")
    (tmp_path / "templates").write_text("a {}\nthe {} there\nmy {}\n")
    asked = Prompts.read(tmp_path / "names", tmp_path / "templates")
    assert asked.sentences[3:5] == ["a dog", "the dog there"]
    rows = F.normalize(torch.randn(6, 8), dim=1)
    dog = rows[3:].sum(0)
    assert torch.allclose(asked.of_classes(rows)[1], dog / dog.norm())
