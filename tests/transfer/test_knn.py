import math

import torch

from m3i_scale.transfer.knn import label_scores, neighbours


def test_votes_by_hand():
    gallery = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    label = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[3.0, 0.0]])
    scores = label_scores(query, gallery, label, 4, k=3, temperature=0.5)
    root = math.sqrt(0.5)
    # Relative to the nearest neighbour, whose cosine is 1.
    wanted = [1.0, math.exp((root - 1) / 0.5) + math.exp((0 - 1) / 0.5), 0.0, 0.0]
    torch.testing.assert_close(scores, torch.tensor([wanted]))


def test_neighbours_are_those_of_a_search_one_by_one():
    torch.manual_seed(0)
    queries, gallery = torch.randn(7, 5), torch.randn(11, 5)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    for chunk in (3, 100):
        values, index = neighbours(queries, gallery, 4, chunk)
        torch.testing.assert_close(values, cosine.sort(1, descending=True).values[:, :4])
        torch.testing.assert_close(cosine.gather(1, index), values)


def test_more_neighbours_than_images():
    scores = label_scores(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 2, k=50)
    assert scores.argmax(1).tolist() == [0, 1]


def test_strong_similarity_does_not_overflow():
    scores = label_scores(torch.ones(1, 3), torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), 1,
                          temperature=1e-4)  # fmt: skip
    assert torch.isfinite(scores).all()
