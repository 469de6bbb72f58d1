import pytest
import torch

from m3i_scale.transfer import labels
from m3i_scale.transfer.features import Known


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("Greek small letter alpha, serif bold", "Greek small letter alpha"),
        ("a dog, on a mat, in the sun", "a dog"),
        ("no comma here ", "no comma here"),
    ],
)
def test_subject(caption, wanted):
    assert labels.subject(caption) == wanted


def test_images_without_a_label_are_left_out():
    known = Known(["a, x", "", "b"], torch.tensor([-1, 4, 0]), [], [])
    assert labels.subjects(known) == ["a", None, "b"]
    assert labels.categories(known) == [None, "4", "0"]
    assert labels.rows_with(labels.subjects(known)).tolist() == [0, 2]


def test_numbering():
    number = labels.Numbering(["b", None, "a", "b"])
    assert number.names == ["a", "b"]
    assert number(["b", None, "a"]).tolist() == [1, 0]
    with pytest.raises(KeyError):
        number(["c"])


def test_hits():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.1], [0.3, 0.2, 0.1]])
    truth = torch.tensor([1, 1, 2])
    assert labels.hits(scores, truth).tolist() == [True, False, False]
    assert labels.hits(scores, truth, k=2).tolist() == [True, True, False]
    assert labels.hits(scores, truth, k=3).all()


def test_equal_scores_for_everything_are_not_right():
    assert not labels.hits(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)).any()


def test_no_score_at_all_is_not_right():
    scores = torch.tensor([[-torch.inf, 0.2]])
    assert not labels.hits(scores, torch.tensor([0])).any()


def test_chance_is_the_best_answer_that_ignores_the_image():
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    assert labels.chance(truth) == pytest.approx(3 / 6)
    assert labels.chance(truth, k=2) == pytest.approx(5 / 6)
