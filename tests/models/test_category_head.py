import pytest
import torch

from m3i_scale.models.category_head import CategoryHead


def test_scores_are_products_with_category_embeddings():
    head = CategoryHead(6, 4)
    z = torch.randn(3, 6)
    scores = torch.stack([z @ category for category in head.classifier.weight], 1)
    torch.testing.assert_close(head(z), scores)
    assert [name for name, _ in head.named_parameters()] == ["classifier.weight"]


def test_bias_on_request():
    head = CategoryHead(6, 4, bias=True)
    assert head(torch.zeros(1, 6)).tolist() == [head.classifier.bias.tolist()]


def test_no_categories():
    with pytest.raises(ValueError, match="num_categories=0"):
        CategoryHead(6, 0)
