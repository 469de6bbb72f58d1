from __future__ import annotations

import torch

from m3i_scale.objective.key_queue import KeyQueue


def test_the_newest_keys_are_kept():
    queue = KeyQueue(7, 3)
    assert not queue.exists.any()
    batches = [torch.randn(4, 3) for _ in range(3)]
    queue.push(batches[0])
    assert queue.exists.tolist() == [True] * 4 + [False] * 3
    assert torch.equal(queue.keys[:4], batches[0])
    for batch in batches[1:]:
        queue.push(batch)
    assert queue.exists.all()
    assert torch.equal(queue.keys, torch.cat([batches[2], batches[1]])[:7])


def test_a_batch_larger_than_the_queue():
    queue = KeyQueue(3, 2)
    queue.push(torch.arange(10.0).view(5, 2))
    assert torch.equal(queue.keys, torch.arange(6.0).view(3, 2))
    assert queue.filled == 3


def test_a_batch_that_is_not_finite_stays_out():
    queue = KeyQueue(6, 2)
    good = torch.randn(3, 2)
    queue.push(good)
    queue.push(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    assert queue.filled == 3
    assert torch.equal(queue.keys[:3], good)


def test_scores_of_before_can_still_be_differentiated():
    queue = KeyQueue(4, 2)
    queue.push(torch.randn(4, 2))
    query = torch.randn(3, 2, requires_grad=True)
    before = queue.keys.clone()
    scores = query @ queue.keys.T
    queue.push(torch.randn(4, 2))
    scores.sum().backward()
    torch.testing.assert_close(query.grad, before.sum(0).expand(3, 2))
